"""SIGTERM and Ctrl-C of a run's driver: the first makes the ranks save and stop, the second ends the command at once.

Exit status: 75 after SIGTERM (sysexits' EX_TEMPFAIL: the same command resumes), 130 after Ctrl-C.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

from jobs.console import Stopped, notify
from jobs.mailbox import STOP, Mailbox
from pipeline.config.background import in_background
from pipeline.config.errors import Preempted, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import is_committed
from pipeline.training.checkpoint.retention import newest_first, parse_name
from pipeline.training.checkpoint.weights import stage_url
from pipeline.training.prepare import RUN_FILE

EXIT_STATUS = {signal.SIGTERM: Preempted.exit_status, signal.SIGINT: 130}
END_SECONDS = 20.0  # limit for the command to end once no rank is saving
ANSWER_SECONDS = 5.0  # limit for the store to report what is saved
UNREACHABLE_SECONDS = 30.0  # how long the store may be unreachable while the ranks save


class Interrupts:
    """Handling of SIGTERM and SIGINT: they raise Stopped in the main thread; ranks that run (`deferred`) save first."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._storage = Storage(config.storage).within(ANSWER_SECONDS)
        self._number: signal.Signals | None = None
        self._deferred = False
        self._request: Future[bool] | None = None  # to the store, while the ranks save
        self._last_answer = 0.0  # of the store, after the ranks were asked to save

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals during the block; after one, print how to resume, and leave the handlers in place."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, self.on_signal) for number in EXIT_STATUS}
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            threading.Thread(target=self._end_on_second, args=(read_end,), name="signals", daemon=True).start()
        try:
            yield
        except Stopped as stopped:  # a second signal still ends at once
            config, storage, reason = self._config, self._storage, f"stopped ({self._number and self._number.name})"
            try:
                stages = [is_committed(storage, stage_url(config, index)) for index in range(len(config.stages))]
                steps = [config.stage_start(index + 1) for index, finished in enumerate(stages) if finished]
                folder = join(config.folder, "checkpoints")
                for url in newest_first(storage, folder) if storage.exists(folder) else []:
                    if (key := parse_name(url.rpartition("/")[2])) is not None and is_committed(storage, url):
                        steps.append(key[0])
                        break
                saved = f"checkpoint at step {max(steps)}" if steps else "no checkpoint yet"
                saved = "every stage is finished" if all(stages) else saved
                notify(f"{reason}: {saved}; re-run the same command to resume")
            except StorageError:  # the report could not be written either
                _end_now(stopped.args[0], f"{reason}: the store does not answer; re-run the same command to resume\n")
            previous = {}
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if previous:
                os.close(signal.set_wakeup_fd(-1))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave signals to `check` during the block; raise Stopped at its end if there was one."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._number is not None:
            self._stop(self._number)

    def check(self, mail: Mailbox, ranks: int) -> None:
        """Ask the ranks to save after a signal; call it every second. Raises Stopped if none runs, or none can save."""
        if self._number is None:
            return
        if not ranks:
            self._stop(self._number)
        if self._request is None:
            if not mail.put(STOP, 1):
                return
            self._last_answer = time.monotonic()
            notify(f"{self._number.name}: the ranks save after this step and stop; another signal ends the run at once")
        elif self._request.done() and self._request.exception() is None:
            self._last_answer = time.monotonic()
        if time.monotonic() - self._last_answer > UNREACHABLE_SECONDS:
            notify(f"the store has not answered for {UNREACHABLE_SECONDS:.0f} s: the ranks cannot save")
            self._stop(self._number)
        if self._request is None or self._request.done():
            self._request = in_background(partial(self._storage.exists, join(self._config.folder, RUN_FILE)), "store")

    def on_signal(self, number: int, frame: object) -> None:
        """Handle the first signal; `_end_on_second` handles the second."""
        if self._number is None:
            self._number = signal.Signals(number)
            if not self._deferred:
                self._stop(self._number)

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

    def _stop(self, number: signal.Signals) -> NoReturn:
        """Raise Stopped, and end the process after a time limit whatever blocks the way out."""
        _end_later(number)
        raise Stopped(EXIT_STATUS[number])


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
