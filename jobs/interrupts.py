"""SIGTERM and Ctrl-C of a run's driver: the first makes the ranks save and stop, the second ends the command at once.

Exit status: 75 after SIGTERM (sysexits' EX_TEMPFAIL: the same command resumes), 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn

from jobs.console import notify
from jobs.mailbox import STOP, Mailbox
from pipeline.config.background import PeriodicThread
from pipeline.config.errors import Preempted, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint import is_committed, stage_url
from pipeline.training.checkpoint.retention import newest_first, parse_name

EXIT_STATUS = {signal.SIGTERM: Preempted.exit_status, signal.SIGINT: 130}
END_SECONDS = 20.0  # limit for the command to end once no rank is saving
ANSWER_SECONDS = 5.0  # limit for the store to report what is saved
UNREACHABLE_SECONDS = 30.0  # how long the store may be unreachable while the ranks save


class Stopped(BaseException):
    """A signal ended the command. Not an Exception, so that no handler on the way out mistakes it for a fault."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number, self.exit_status = number, EXIT_STATUS[number]


class Interrupts:
    """Context in which SIGTERM and SIGINT raise Stopped in the main thread; while ranks run (`deferred`), these save
    first. At the end, a message says how to resume."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._storage = Storage(config.storage).within(ANSWER_SECONDS)
        self._number: signal.Signals | None = None
        self._deferred = False
        self._last_answer = 0.0  # of the store, after the ranks were asked to save
        self._watch: PeriodicThread | None = None  # of the store, while the ranks save
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in EXIT_STATUS}
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            threading.Thread(target=self._end_on_second, args=(read_end,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):  # a second signal still ends at once
            stopped, resume = f"stopped ({error.number.name})", "re-run the same command to resume"
            try:
                notify(f"{stopped}: {self._saved()}; {resume}")
            except StorageError:  # the report could not be written either
                _end_now(error.exit_status, f"{stopped}: the store does not answer; {resume}\n")
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._previous:
            os.close(signal.set_wakeup_fd(-1))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave signals to `check` during the block; raise Stopped at its end if there was one."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            if self._watch is not None:
                self._watch.stop(timeout=0.0)
                self._watch = None
        if self._number is not None:
            self._stop()

    def check(self, mail: Mailbox, ranks: int) -> None:
        """Ask the ranks to save after a signal; call it every second. Raises Stopped if none runs, or none can save."""
        if self._number is None:
            return
        if not ranks:
            self._stop()

        def ask_store() -> None:
            with suppress(StorageError):
                self._storage.exists(join(self._config.folder, "run.json"))
                self._last_answer = time.monotonic()

        if self._watch is None and mail.put(STOP, 1):
            self._last_answer = time.monotonic()
            notify(f"{self._number.name}: the ranks save after this step and stop; another signal ends the run at once")
            self._watch = PeriodicThread(ask_store, 1.0, "store", immediately=True).start()
        if self._watch is not None and time.monotonic() - self._last_answer > UNREACHABLE_SECONDS:
            notify(f"the store has not answered for {UNREACHABLE_SECONDS:.0f} s: the ranks cannot save")
            self._stop()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._number is None:  # `_end_on_second` handles the second signal
            self._number = signal.Signals(number)
            if not self._deferred:
                self._stop()

    def _end_on_second(self, read_end: int) -> None:
        """End the process at the second signal.

        Runs in a thread: the main one handles no signal while it waits in a library for a store or a cluster.
        """
        first = None
        while numbers := os.read(read_end, 64):
            for number in (signal.Signals(number) for number in numbers if number in EXIT_STATUS):
                if first is not None:
                    _end_now(EXIT_STATUS[number], "ended at once; re-run the same command to resume\n")
                first = number
                _end_later(first, unless=lambda: self._number is not None)  # if the main thread never returns
        os.close(read_end)

    def _stop(self) -> NoReturn:
        """Raise Stopped, and end the process after a time limit whatever blocks the way out."""
        assert self._number is not None
        _end_later(self._number)
        raise Stopped(self._number)

    def _saved(self) -> str:
        """Return where the run would resume. Raises StorageError if the store does not answer."""
        config, storage = self._config, self._storage
        stages = [is_committed(storage, stage_url(config, index)) for index in range(len(config.stages))]
        if all(stages):
            return "every stage is finished"
        steps = [config.stage_start(index + 1) for index, finished in enumerate(stages) if finished]
        folder = join(config.folder, "checkpoints")
        for url in newest_first(storage, folder) if storage.exists(folder) else []:
            if (key := parse_name(url.rpartition("/")[2])) is not None and is_committed(storage, url):
                steps.append(key[0])
                break
        return f"checkpoint at step {max(steps)}" if steps else "no checkpoint yet"


def _end_later(number: signal.Signals, unless: Callable[[], bool] = lambda: False) -> None:
    """End this process after END_SECONDS unless `unless()` is true then."""
    message = f"not ended after {END_SECONDS:.0f} s: ended now; re-run to resume\n"
    timer = threading.Timer(END_SECONDS, lambda: unless() or _end_now(EXIT_STATUS[number], message))
    timer.daemon = True
    timer.start()


def _end_now(status: int, message: str) -> NoReturn:
    """Write the message and end this process, and with it a local Ray, immediately."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}".encode())
    os._exit(status)
