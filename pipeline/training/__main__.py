"""Train without Ray:  torchrun --nproc-per-node 2 -m pipeline.training configs/demo.yaml [key=value …]"""

import argparse
import os
import shlex
import sys
import time
from typing import NoReturn

from pipeline.config.errors import MomeError
from pipeline.config.load import load_config, profile_override
from pipeline.config.redaction import configure_logging, printable, redact
from pipeline.training.loop import train
from pipeline.training.preflight import preflight


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
            is_first = os.environ.get("RANK", "0") == "0"

            def show(text: str) -> None:
                print(f"{time.strftime('%H:%M:%S')} {config.name}: {text}", flush=True)

            if is_first:
                show(f"{os.environ.get('WORLD_SIZE', '1')} ranks, {len(config.stages)} stages, in {config.folder}")
            train(config, lambda progress: show(progress.line()))
            if is_first:
                show(f"every stage is finished; `mome evaluate {shlex.quote(config.folder)}` evaluates the last one")
    except MomeError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {printable(str(error))}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
