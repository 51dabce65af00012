"""Options that commands share, and terminal output: results on standard output, the rest on standard error.

Imports neither torch nor the training package, so that `mome --help` starts quickly.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pipeline.config.background import PeriodicThread
from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.redaction import printable
from pipeline.config.urls import parse
from pipeline.pages.formatting import duration

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pipeline.training.callbacks import Progress

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # between progress lines where standard error is not a terminal

# Text from data is never interpreted as markup, and files receive whole lines.
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


# ---- arguments and options that several commands share


def local_file(value: str) -> Path:
    """Return a local path; a URL is an error, because pathlib would create a local folder named `s3:`."""
    try:
        protocol, path = parse(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if protocol != "file":
        raise typer.BadParameter(f"{value!r}: expected a file or folder of this machine, not a URL of a store")
    return Path(path)


Config = Annotated[Path, typer.Argument(parser=local_file, help="YAML config of a run, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys to change: stages.vision.steps=100 cluster.workers=4", metavar="KEY=VALUE"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


# ---- output


def notify(message: str, style: str = "") -> None:
    """Print a message on standard error."""
    console.print(Text(printable(message), style))


def echo(text: str, err: bool = False, newline: bool = True) -> None:
    """Print a result on standard output, or on standard error with `err`."""
    typer.echo(printable(text), err=err, nl=newline)


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show a status message on the terminal during the block; yield a function that replaces it."""
    with console.status(Text(printable(message))) as spinner:
        yield lambda text: spinner.update(Text(printable(text)))


@contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows a run's progress: a bar per stage on a terminal, else a line every ten seconds."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as ProgressBar

    name, state_column = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[state]}")
    bar = ProgressBar(name, BarColumn(bar_width=30), MofNCompleteColumn(), state_column, console=console)
    tasks: dict[str, TaskID] = {}
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        state = (
            f"loss {progress.loss:.4f}  {progress.samples_per_second:.0f} samples/s  "
            f"stage ends in {duration(progress.seconds_left)}"
        )
        if console.is_terminal:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.stage_steps, state="")
            bar.update(tasks[progress.stage], completed=progress.stage_step, state=state)
        elif progress.stage_step == progress.stage_steps or time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            notify(f"{progress.stage} {progress.stage_step}/{progress.stage_steps}  {state}")

    if console.is_terminal:
        bar.start()
    try:
        yield show
    finally:
        bar.stop()


@contextmanager
def poll(update: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `update` every `seconds` during the block, and once at its end; storage errors only delay the next call."""

    def guarded_update() -> None:
        try:
            update()
        except StorageError as error:
            log.debug("progress not read: %s", error)

    thread = PeriodicThread(guarded_update, seconds, "progress").start()
    try:
        yield
    finally:
        thread.stop(timeout=10)
        guarded_update()


def print_result(result: dict[str, Any] | None, as_json: bool, text: str | None = None) -> None:
    """Print a command's result on standard output, as one JSON object or as `text`; None prints nothing.

    Without `text`, print one line per value that is not None, under dotted names.
    """
    if result is None:  # under torchrun, rank 0 prints
        return
    if text is None:
        lines, pending = {}, list(result.items())
        while pending:
            key, value = pending.pop(0)
            if isinstance(value, dict):
                pending = [(f"{key}.{name}", inner) for name, inner in value.items()] + pending
            elif value is not None:
                items = value if isinstance(value, list) else [value]
                lines[key] = ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in items)
        width = max(map(len, lines), default=0)
        text = "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())
    echo(json.dumps(result) if as_json else text)


def aligned(lines: list[list[str]]) -> str:
    """Return a table whose columns are as wide as their widest cells; all lines have the same number of cells."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
