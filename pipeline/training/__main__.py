"""Train without Ray:  torchrun --nproc-per-node 2 -m pipeline.training configs/demo.yaml [key=value …]

`--preflight` checks everything on every rank and trains nothing; `--profile A:B` records a trace of these steps.
"""

import os
import sys

from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.load import load_config
from pipeline.config.redaction import configure_logging, printable
from pipeline.training.loop import train
from pipeline.training.preflight import preflight
from pipeline.training.profile import profile_override


def main(arguments: list[str]) -> int:
    configure_logging()
    try:
        rest = [argument for argument in arguments if argument != "--preflight"]
        if "--profile" in rest and rest[-1] != "--profile":
            position = rest.index("--profile")
            _, window = rest.pop(position), rest.pop(position)
            rest.append(profile_override(window))
        if not rest or any(argument.startswith("-") for argument in rest):
            raise ConfigError("usage: torchrun -m pipeline.training CONFIG [--preflight] [--profile A:B] [key=value …]")
        config = load_config(rest[0], rest[1:])
        if "--preflight" in arguments:
            preflight(config, lambda line: print(line, flush=True))
        else:
            train(
                config,
                lambda progress: print(
                    f"{progress.stage} {progress.stage_step}/{progress.stage_steps}  loss {progress.loss:.4f}  "
                    f"{progress.samples_per_second:.1f} samples/s  "
                    f"stage ends in {progress.seconds_left / 60:.1f} min",
                    flush=True,
                ),
            )
    except MomeError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {printable(str(error))}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
