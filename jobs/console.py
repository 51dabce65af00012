"""Options, terminal output and output files that commands share; without torch, so that `mome --help` is quick."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import textwrap
import threading
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

LOADING_SECONDS = 0.6
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


_has_output = threading.Event()  # of this process, through the functions below


def announce_loading(command: str, seconds: float = LOADING_SECONDS) -> None:
    """Print that a command is loading unless it prints something within `seconds`: importing torch takes longer."""

    def announce() -> None:
        if not _has_output.wait(seconds):
            notify(f"mome {command}: loading", "dim")

    threading.Thread(target=announce, name="loading", daemon=True).start()


def notify(message: str, style: str = "") -> None:
    """Print a message on standard error."""
    _has_output.set()
    console.print(Text(printable(message), style))


def echo(text: str, err: bool = False, newline: bool = True) -> None:
    """Print a result on standard output, or on standard error with `err`."""
    _has_output.set()
    typer.echo(printable(text), err=err, nl=newline)


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show what a command does during the block; yield a function that replaces the message.

    Outside a terminal the message is printed at first, and the newest every `PLAIN_SECONDS`.
    """
    if console.is_terminal:
        with console.status(Text(printable(message))) as spinner:
            yield lambda text: spinner.update(Text(printable(text)))
        return
    newest, began = message, time.monotonic()

    def replace(text: str) -> None:
        nonlocal newest
        newest = text

    thread = PeriodicThread(lambda: notify(f"{newest} ({duration(time.monotonic() - began)})"), PLAIN_SECONDS, "status")
    notify(message)
    thread.start()
    try:
        yield replace
    finally:
        thread.stop(timeout=2.0)


class RunDisplay:
    """Shows the phases and the progress of a run: bars on a terminal, else lines with the time.

    Something is printed at least every `PLAIN_SECONDS`: newer metrics, or how long a phase or a step has taken.
    """

    def __init__(self, run: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as ProgressBar

        name, state = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[state]}")
        self._bar = ProgressBar(name, BarColumn(bar_width=20), MofNCompleteColumn(), state, console=console)
        self._run, self._lock = run, threading.RLock()
        self._tasks: dict[str, TaskID] = {}
        self._phase, self._stage, self._since, self._printed = "", "", time.monotonic(), 0.0
        self._newest: Progress | None = None  # not printed yet
        self._thread = PeriodicThread(self._beat, 1.0, "display")

    def __enter__(self) -> RunDisplay:
        if console.is_terminal:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.stop(timeout=2.0)
        with self._lock:
            self._begin("")
            if console.is_terminal:
                self._bar.stop()

    def phase(self, text: str) -> None:
        """Show what the run does while nothing trains, until the next phase or the next metrics."""
        with self._lock:
            if text == self._phase:
                return
            self._begin(text)
            if console.is_terminal:
                self._tasks[text] = self._bar.add_task(text, total=None, state="")
            else:
                self._print(text)

    def message(self, text: str, style: str = "yellow") -> None:
        """Print a message above the bars, or as a line with the time."""
        with self._lock:
            self._print(text, style)

    def show(self, progress: Progress) -> None:
        """Show new metrics: at once if they are the first or last of a stage."""
        with self._lock:
            is_first, self._stage = self._stage != progress.stage, progress.stage
            self._begin(f"training {progress.stage}")
            if console.is_terminal:
                if progress.stage not in self._tasks:
                    self._tasks[progress.stage] = self._bar.add_task(progress.stage, total=1, state="")
                state = progress.line().partition("  ")[2]
                task, total = self._tasks[progress.stage], progress.stage_steps
                self._bar.update(task, completed=progress.stage_step, total=total, state=state)
            elif is_first or progress.stage_step == progress.stage_steps:
                self._print(progress.line())
            else:
                self._newest = progress

    def _begin(self, phase: str) -> None:
        """Make `phase` the current one; a phase that is over leaves the terminal."""
        if self._phase != phase and (task := self._tasks.pop(self._phase, None)) is not None:
            self._bar.remove_task(task)
        self._phase, self._since, self._newest = phase, time.monotonic(), None

    def _print(self, text: str, style: str = "") -> None:
        self._printed = time.monotonic()
        notify(f"{time.strftime('%H:%M:%S')} {self._run}: {text}", style)

    def _beat(self) -> None:
        """Show for how long the phase has lasted; without a terminal, only if nothing was printed for a while."""
        with self._lock:
            elapsed = duration(round(time.monotonic() - self._since))
            if (task := self._tasks.get(self._phase)) is not None:
                self._bar.update(task, state=elapsed)
            elif self._phase and not console.is_terminal and time.monotonic() - self._printed >= PLAIN_SECONDS:
                self._print(self._newest.line() if self._newest is not None else f"{self._phase} ({elapsed})")
                self._newest = None


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


def print_result(
    result: dict[str, Any] | None, as_json: bool, text: str | Callable[[dict[str, Any]], str] | None = None
) -> None:
    """Print a result, unless it is None, as JSON or as `text` (default: `dotted`)."""
    if result is None:  # under torchrun, rank 0 prints
        return
    if as_json:
        echo(json.dumps(result))
    else:
        echo(text if isinstance(text, str) else (text or dotted)(result))


def dotted(result: dict[str, Any]) -> str:
    """Return a line for each value under its dotted name, without empty values."""
    pending, lines = list(result.items()), []
    while pending:
        key, value = pending.pop(0)
        if isinstance(value, dict):
            pending = [(f"{key}.{name}", inner) for name, inner in value.items()] + pending
        elif value is not None and value != []:
            items = value if isinstance(value, list) else [value]
            lines.append([key, ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in items)])
    return aligned(lines) if lines else ""


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
