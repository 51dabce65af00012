"""SIGTERM and Ctrl-C of a run's driver: the first has the ranks save and ends the command, the second ends it at once.

Exit statuses: 75 after SIGTERM (sysexits' EX_TEMPFAIL: the same command goes on), 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from jobs.console import notify
from jobs.mailbox import Mailbox
from pipeline.config.errors import Preempted, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint import is_committed, stage_url
from pipeline.training.checkpoint.retention import newest_first, step_of

EXIT_STATUS = {signal.SIGTERM: Preempted.exit_status, signal.SIGINT: 130}
END_SECONDS = 20.0  # that the command may take to end when no rank is saving any more
ANSWER_SECONDS = 5.0  # that the store is given to say what is saved
AWAY_SECONDS = 30.0  # that the store may be away while the ranks save


class Stopped(BaseException):
    """The command was told to end. No Exception: nothing on the way out may take it for a fault and go on."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number
        self.exit_status = EXIT_STATUS[number]


class Interrupts:
    """Within `with`, in a process's main thread, SIGTERM and SIGINT raise Stopped there; while ranks run (`deferred`)
    they have these save first. At the end one line says how to resume."""

    def __init__(self, config: RunConfig):
        deadline = min(ANSWER_SECONDS, config.storage.retry_timeout_seconds)
        self._config = config
        self._storage = Storage(config.storage.model_copy(update={"retry_timeout_seconds": deadline}))
        self._number: signal.Signals | None = None
        self._deferred = self._asked = self._over = False
        self._answered = 0.0  # when the store last did, after the ranks were asked to save
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in EXIT_STATUS}
            heard, told = os.pipe()
            os.set_blocking(told, False)
            signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            threading.Thread(target=self._end_on_second, args=(heard,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):  # a second signal still ends at once
            saved, resume = self._saved(), "re-run the same command to resume"
            if saved is None:  # no report can be written either
                _end_now(error.exit_status, f"stopped ({error.number.name}): the store does not answer; {resume}\n")
            notify(f"stopped ({error.number.name}): {saved}; {resume}")
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._before:
            os.close(signal.set_wakeup_fd(-1))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within `with`, a signal is heard by `look` alone; at its end, what was heard ends the command."""
        self._deferred, self._asked, self._over = True, False, False
        try:
            yield
        finally:
            self._deferred, self._over = False, True
        if self._number is not None:
            self._stop(self._number)

    def look(self, mail: Mailbox, ranks: int) -> None:
        """Every second while ranks are placed or run. Raises Stopped where none runs, or none can save."""
        if self._number is None:
            return
        if not ranks:
            self._stop(self._number)
        if not self._asked and mail.ask_to_stop():
            self._asked, self._answered = True, time.monotonic()
            notify(f"{self._number.name}: the ranks save after this step and end; a second signal ends all at once")
            threading.Thread(target=self._watch_store, name="store", daemon=True).start()
        if self._asked and time.monotonic() - self._answered > AWAY_SECONDS:
            notify(f"the store has not answered for {AWAY_SECONDS:.0f} s: the ranks cannot save")
            self._stop(self._number)

    def _watch_store(self) -> None:
        while not self._over:
            try:
                self._storage.exists(join(self._config.folder, "run.json"))
                self._answered = time.monotonic()
            except StorageError:
                pass
            time.sleep(1.0)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:  # the second is `_end_on_second`'s
            self._number = signal.Signals(number)
            if not self._deferred:
                self._stop(self._number)

    def _end_on_second(self, heard: int) -> None:
        """In a thread of its own: the main one hears nothing while it waits in a library for a store or a cluster."""
        first = None
        while numbers := os.read(heard, 64):
            for number in (each for each in numbers if each in EXIT_STATUS):
                if first is not None:
                    _end_now(EXIT_STATUS[signal.Signals(number)], "ended at once; re-run the same command to resume\n")
                first = signal.Signals(number)
                _end_later(first, unless=lambda: self._number is not None)  # where the main thread waits for ever
        os.close(heard)

    def _stop(self, number: signal.Signals) -> None:
        """Raise Stopped. Whatever it meets on its way out, such as a store that is away, the process ends in time."""
        _end_later(number)
        raise Stopped(number)

    def _saved(self) -> str | None:
        """Where the run would go on; None where the store does not say."""
        config, storage = self._config, self._storage
        try:
            stages = [is_committed(storage, stage_url(config, index)) for index in range(len(config.stages))]
            if all(stages):
                return "every stage is finished"
            steps = [config.stage_start(index + 1) for index, finished in enumerate(stages) if finished]
            folder = join(config.folder, "checkpoints")
            for url in newest_first(storage, folder) if storage.exists(folder) else []:
                step = step_of(url.rpartition("/")[2])
                if step is not None and is_committed(storage, url):
                    steps.append(step)
                    break
        except StorageError:
            return None
        return f"checkpoint at step {max(steps)}" if steps else "no checkpoint yet"


def _end_later(number: signal.Signals, unless: Callable[[], bool] = lambda: False) -> None:
    """End this process in END_SECONDS, unless it has ended by then or `unless` holds."""

    def end() -> None:
        time.sleep(END_SECONDS)
        if not unless():
            _end_now(EXIT_STATUS[number], f"not ended after {END_SECONDS:.0f} s: ended now; re-run to resume\n")

    threading.Thread(target=end, name="end", daemon=True).start()


def _end_now(status: int, told: str) -> None:
    """End this process, and with it a Ray of its own, without another word."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{told}".encode())
    os._exit(status)
