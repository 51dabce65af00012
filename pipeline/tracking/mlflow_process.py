"""The process beside a trainer that ships its journal: `python -m pipeline.tracking.mlflow_process FOLDER`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.config.redaction import configure_logging, describe_error, redact, remember
from pipeline.tracking.mlflow_client import Outage
from pipeline.tracking.mlflow_replay import MlflowShipper, num_pending, shipping_alone

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two attempts while the server is away
ORPHAN_SECONDS = 30.0  # to ship what a dead trainer left


class Commands:
    """Lines from the process that started this one: 'ship', 'close SECONDS'.

    The end of input means that it died; so does another parent, where a child of its own keeps our input open.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._parent = os.getppid()
        self._buffer = b""
        self.deadline: float | None = None

    def wait(self, seconds: float) -> None:
        """Until a line comes, at most `seconds`."""
        if self.deadline is not None:
            time.sleep(max(0.0, min(seconds, 0.5, self.deadline - time.monotonic())))
        elif select.select([self._descriptor], [], [], seconds)[0]:
            data = os.read(self._descriptor, 65536)
            lines = (self._buffer + data).split(b"\n")
            self._buffer = lines.pop()
            closing = [line for line in lines if line.startswith(b"close ")]
            if closing or not data:
                self._close_in(float(closing[0].split()[1]) if closing else ORPHAN_SECONDS)
        elif os.getppid() != self._parent:
            self._close_in(ORPHAN_SECONDS)

    def _close_in(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def ship_until_closed(folder: Path, uri: str, every: float, commands: Commands, say: Callable[[str], None]) -> bool:
    """Ship again and again until told to close; True if nothing is left."""
    while True:
        with shipping_alone(folder) as alone:
            if alone:
                return _ship_repeatedly(folder, uri, every, commands, say)
        # The shipper of an earlier start or of an evaluation is at work: while it lives, it ships our records too.
        if commands.deadline is not None and (commands.late or not num_pending(folder, uri)):
            return not num_pending(folder, uri)
        commands.wait(1.0)


def _ship_repeatedly(folder: Path, uri: str, every: float, commands: Commands, say: Callable[[str], None]) -> bool:
    shipper, wait, away_since = MlflowShipper(folder, uri, say), FIRST_WAIT, None
    while True:
        closing = commands.deadline is not None
        try:
            shipper.ship()
        except Outage as error:
            if away_since is None:
                away_since = time.monotonic()
                say(f"tracking: {redact(uri)} takes no records; they are kept and sent later ({error})"[:500])
            commands.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        else:
            if away_since is not None:
                say(f"tracking: {redact(uri)} is back after {time.monotonic() - away_since:.0f} s; nothing was lost")
            wait, away_since = FIRST_WAIT, None
            if closing:
                return True
            commands.wait(every)
        if commands.late:
            return not num_pending(folder, uri)


def _speaker() -> Callable[[str], None]:
    """Says lines to the process that started this one; whatever else is printed goes to the log."""
    channel = os.dup(1)
    os.dup2(2, 1)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(channel, " ".join(line.split()).encode() + b"\n")

    return say


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def main() -> int:
    os.nice(10)  # the trainer comes first
    descriptor = sys.stdin.fileno()
    first = _read_line(descriptor)
    if not first:
        return 1
    settings = json.loads(first)
    folder = Path(sys.argv[1])
    configure_logging()
    remember(settings["uri"])
    try:
        done = ship_until_closed(folder, settings["uri"], settings["every"], Commands(descriptor), _speaker())
    except Exception as error:  # told in the log by its last line, without the password that libraries quote
        logging.getLogger("mome.tracking").exception("shipping stopped")
        print(describe_error(error), file=sys.stderr)
        return 1
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
