"""Train without Ray:  torchrun --nproc-per-node 2 -m pipeline.training configs/demo.yaml [key=value …]"""

from __future__ import annotations

import logging
import os
import sys

from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.load import load_config
from pipeline.training.loop import Progress, train


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if not arguments:
            raise ConfigError("usage: torchrun -m pipeline.training CONFIG [key=value …]")
        train(load_config(arguments[0], arguments[1:]), _print_progress)
    except MomeError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _print_progress(progress: Progress) -> None:
    print(
        f"{progress.stage} {progress.stage_step}/{progress.stage_steps}  loss {progress.loss:.4f}  "
        f"{progress.samples_per_second:.1f} samples/s  stage ends in {progress.seconds_left / 60:.1f} min",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
