"""What a person sees of a run: a live line with stage, step, loss, speed and time left; plain lines in a log file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from pipeline.config.background import PeriodicThread
from pipeline.config.errors import StorageError
from pipeline.config.redaction import printable
from pipeline.pages.formatting import duration
from pipeline.training.progress import Progress as RunProgress

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0

# Standard error, for people. Data is never markup, and files get whole lines; print to it by `notify` and `status`.
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def notify(message: str, style: str = "") -> None:
    """Print a message on standard error."""
    console.print(Text(printable(message), style))


def echo(text: str, err: bool = False, newline: bool = True) -> None:
    """Print a result on standard output, or on standard error with `err`."""
    typer.echo(printable(text), err=err, nl=newline)


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show on the terminal what is being done; yield a function that replaces the message."""
    with console.status(Text(printable(message))) as shown:
        yield lambda text: shown.update(Text(printable(text)))


class ProgressDisplay:
    """Shows a run's progress on standard error; standard output stays free for results."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last = 0.0

    def __enter__(self) -> ProgressDisplay:
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: RunProgress) -> None:
        told = (
            f"loss {progress.loss:.4f}  {progress.samples_per_second:.0f} samples/s  "
            f"stage ends in {duration(progress.seconds_left)}"
        )
        if console.is_terminal:
            self._show_bar(progress, told)
        elif progress.stage_step == progress.stage_steps or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            notify(f"{progress.stage} {progress.stage_step}/{progress.stage_steps}  {told}")

    def _show_bar(self, progress: RunProgress, told: str) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(progress.stage, total=progress.stage_steps, told="")
        self._bar.update(self._tasks[progress.stage], completed=progress.stage_step, told=told)


@contextmanager
def repeatedly(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Within `with`, and once more at its end, `look` is called: for what goes on elsewhere, and is seen in a store."""

    def guarded() -> None:
        try:
            look()
        except StorageError as error:  # the picture may be late; the work goes on
            log.debug("progress not read: %s", error)

    thread = PeriodicThread(guarded, seconds, "progress").start()
    try:
        yield
    finally:
        thread.stop(timeout=10)
        guarded()


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """A command's result on standard output: a line for each value there is, or one JSON object for a machine."""
    if as_json:
        echo(json.dumps(result))
        return
    lines = dict(_lines(result))
    width = max(map(len, lines), default=0)
    for key, told in lines.items():
        echo(f"{key:<{width}}  {told}")


def _lines(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{key}.")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            yield prefix + key, ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)


def aligned(lines: list[list[str]]) -> str:
    """A table of equally many cells a line, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
