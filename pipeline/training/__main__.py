"""Train without Ray:  torchrun --nproc-per-node 2 -m pipeline.training configs/demo.yaml [key=value …]"""

import argparse
import os
import sys
from typing import NoReturn

from pipeline.config.errors import MomeError
from pipeline.config.load import load_config
from pipeline.config.redaction import configure_logging, printable, redact
from pipeline.training.loop import train
from pipeline.training.preflight import preflight
from pipeline.training.profile import profile_override


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(redact(message)))  # it repeats the arguments, which may hold a password


def main(arguments: list[str]) -> int:
    configure_logging()
    parser = _Parser(prog="torchrun -m pipeline.training")
    parser.add_argument("config", help="Path of the run's config.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Values that replace the config's.")
    parser.add_argument("--preflight", action="store_true", help="Check everything on every rank and train nothing.")
    parser.add_argument("--profile", metavar="A:B", help="Global steps A:B (B excluded) to record a trace of.")
    options = parser.parse_intermixed_args(arguments)
    try:
        profiled = [] if options.profile is None else [profile_override(options.profile)]
        config = load_config(options.config, [*options.overrides, *profiled])
        if options.preflight:
            preflight(config, lambda line: print(line, flush=True))
        else:
            train(config, lambda progress: print(f"{config.name}: {progress.line()}", flush=True))
    except MomeError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {printable(str(error))}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
