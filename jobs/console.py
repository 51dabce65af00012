"""Options, terminal output and output files that commands share; without torch, so that `mome --help` is quick."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.text import Text

from pipeline.config.background import PeriodicThread
from pipeline.config.durable import atomic_write
from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.redaction import printable
from pipeline.config.urls import parse
from pipeline.pages.charts import duration

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pipeline.data.storage import Storage
    from pipeline.training.callbacks import Progress

log = logging.getLogger(__name__)

PLAIN_SECONDS = 10.0  # between progress lines where standard error is not a terminal
HEAD = 8192  # bytes of a page or image that contain its signature (`pipeline.pages.page.signature`)
SIGNATURE = re.compile(rb"mome [0-9a-f]{32}")
PREFIXES = ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)
REMEDY = "give another name, or delete it"
FINDING = {"shard", "key", "stage", "reason"}  # keys of each line of a list of bad samples

# Text from data is never interpreted as markup, and files receive whole lines.
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


class Stopped(BaseException):
    """A signal ended the command, with this exit status; no Exception, so that no handler takes it for a fault."""


def local_file(value: str) -> Path:
    """Return a local path; a URL is an error, because pathlib would create a local folder named `s3:`."""
    try:
        protocol, path = parse(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if protocol != "file":
        raise typer.BadParameter(f"{value!r}: expected a file or folder of this machine, not a URL of a store")
    return Path(path)


Config = Annotated[
    Path, typer.Argument(parser=local_file, help="YAML config of a run, or name of a recipe (`mome config list`).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys to change: stages.vision.steps=100 cluster.workers=4", metavar="KEY=VALUE"),
]
FileOption = partial(typer.Option, parser=local_file)
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


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
        speed, end = f"{progress.samples_per_second:.0f} samples/s", duration(progress.seconds_left)
        state = f"loss {progress.loss:.4f}  {speed}  stage ends in {end}"
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

    thread = PeriodicThread(guarded_update, seconds, "progress")
    thread.start()
    try:
        yield
    finally:
        thread.stop(timeout=10)
        guarded_update()


def print_result(result: dict[str, Any] | None, as_json: bool, text: str | None = None) -> None:
    """Print a result, unless it is None, as JSON or as `text` (default: a line per value, under dotted names)."""
    if result is None:  # under torchrun, rank 0 prints
        return
    if text is None:
        lines, pending = [], list(result.items())
        while pending:
            key, value = pending.pop(0)
            if isinstance(value, dict):
                pending = [(f"{key}.{name}", inner) for name, inner in value.items()] + pending
            elif value is not None:
                items = value if isinstance(value, list) else [value]
                lines.append([key, ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in items)])
        text = aligned(lines)
    echo(json.dumps(result) if as_json else text)


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = (), width: int | None = None) -> str:
    """Return a table whose columns are as wide as their widest cells; all lines have the same number of cells.

    `right` are the numbers of the right-aligned columns. With `width`, the last column is wrapped at that many
    characters, with a hanging indent; words, which may be paths, stay whole.
    """
    widths, rows = [max(map(len, column)) for column in zip(*lines, strict=True)], []
    start = sum(widths[:-1]) + 2 * len(widths[:-1])
    for *cells, last in lines:
        parts = [last]
        if width is not None:
            parts = textwrap.wrap(last, max(width - start, 24), break_long_words=False, break_on_hyphens=False) or [""]
        cells = [*cells, ("\n" + " " * start).join(parts)]
        rows.append("  ".join((str.rjust if n in right else str.ljust)(c, widths[n]) for n, c in enumerate(cells)))
    return "\n".join(line.rstrip() for row in rows for line in row.split("\n"))


def line_width() -> int:
    """Return the number of columns of the terminal, or of COLUMNS; 80 where standard output is a file."""
    return shutil.get_terminal_size((80, 24)).columns


def three_digits(value: float) -> str:
    """Return three significant digits, and whole numbers from 100: '0.0123', '1.5', '2,029'."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def short_time(seconds: float) -> str:
    """Return three significant digits of a time in the unit that fits it, from 'µs' to 'h'."""
    units = (1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (90.0, 1.0, "s"), (5400.0, 60.0, "min"), (math.inf, 3600.0, "h")
    _, size, unit = next(entry for entry in units if seconds < entry[0])
    return f"{three_digits(seconds / size)} {unit}"


def with_prefix(count: float, unit: str) -> str:
    """Return three significant digits of a number of bytes or operations: '12.1 MB', '8.86 GFLOP'."""
    prefix, size = next((entry for entry in PREFIXES if count >= entry[1]), PREFIXES[-1])
    return f"{three_digits(count / size)} {prefix}{unit}"


# ---- output files named on the command line, which never overwrite an unrelated file


def write_output(storage: Storage, url: str, data: bytes, option: str) -> None:
    """Write a page or image of ours to `url`, which `option` named. Raises ConfigError if another file is there."""
    check_output(storage, url, option, data)
    storage.write(url, data)


def check_output(storage: Storage, url: str, option: str, data: bytes | None = None) -> None:
    """Raise ConfigError if `write_output` would; without `data`, check what is known before they are computed."""
    if not storage.exists(url):
        return
    stored = SIGNATURE.search(storage.read(url)[:HEAD])
    own = stored if data is None else SIGNATURE.search(data[:HEAD])
    if own is None or stored is None or own[0] != stored[0]:
        kind = "a file that mome did not write" if stored is None else "a page or image of something else"
        raise ConfigError(f"{option} {url}: would overwrite {kind}; {REMEDY}")


@contextmanager
def list_of_findings(path: Path | None, option: str) -> Iterator[BinaryIO | None]:
    """Yield the file for a list of bad samples, complete if the block succeeds. Raises ConfigError for another file."""
    if path is None:
        yield None
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        with path.open("wb") as device:
            yield device
        return
    if path.exists():
        with path.open("rb") as earlier:
            line = earlier.readline(2**20)
        try:
            is_own = not line or json.loads(line).keys() >= FINDING
        except (ValueError, AttributeError, RecursionError):
            is_own = False
        if not is_own:
            raise ConfigError(f"{option} {path}: would overwrite a file that mome did not write; {REMEDY}")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(atomic_write(path))
        except OSError as error:
            raise ConfigError(f"{option} {path}: cannot be written ({error}); give another name") from error
        yield file
