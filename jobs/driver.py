"""A run's driver: its messages to and from the ranks, and its signals.

Messages go through the key-value store of the Ray cluster. Calls return within seconds, and a cluster that does not
answer is no error: a message may then be lost. The first SIGTERM or Ctrl-C makes the ranks save and stop, the second
ends the command at once, with status 75 after SIGTERM (EX_TEMPFAIL: the same command resumes) and 130 after Ctrl-C.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from jobs.console import Stopped, notify
from jobs.describe_run import saved_steps
from pipeline.config.background import PeriodicThread, in_background
from pipeline.config.errors import Preempted, StorageError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.training.prepare import RUN_FILE

log = logging.getLogger(__name__)

NAMESPACE = b"mome"
STOP, NUM_PLACED = "stop", "placed"  # values: the driver asks the ranks to save and stop; number of running ranks
CALL_SECONDS = 2.0
RETRY_SECONDS = 1.0
FORWARDED = ("jobs", "mome", "pipeline")  # first components of our loggers' names
MAX_QUEUED = 1000  # log records kept while the cluster does not answer
EXIT_STATUS = {signal.SIGTERM: Preempted.exit_status, signal.SIGINT: 130}
END_SECONDS = 20.0  # limit for the command to end once no rank is saving
ANSWER_SECONDS = 5.0  # limit for the store to report what is saved
UNREACHABLE_SECONDS = 30.0  # how long the store may be unreachable while the ranks save

Message = dict[str, Any]


@dataclass(frozen=True)
class Mailbox:
    """Values and messages of the driver and the ranks of one start of a run, which `start` identifies."""

    start: str

    def put(self, name: str, value: object) -> bool:
        """Set a value, as text; return whether the cluster accepted it."""
        return self.call("put", name, str(value).encode(), True) is not None

    def get(self, name: str) -> str | None:
        """Return a value; None if there is none or the cluster does not answer."""
        value = self.call("get", name)
        return None if value is None else value.decode(errors="replace")  # another program may write here

    def receive(self) -> list[Message]:
        """Return the messages since the last call, oldest first."""
        messages = []
        for key in sorted(self.call("keys", "messages/") or ()):
            name = key.decode().removeprefix(f"{self.start}/")
            value = self.get(name)
            if value is None or self.call("del", name, False) is None:
                break  # the next call tries again
            with suppress(ValueError):
                messages.append(json.loads(value))
        return messages

    def call(self, operation: str, name: str, *arguments: Any) -> Any:
        """Call the key-value store, whose public functions have no timeout; return None without value or answer."""
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        try:
            call = getattr(internal_kv_get_gcs_client(), f"internal_kv_{operation}")
            return call(f"{self.start}/{name}".encode(), *arguments, NAMESPACE, CALL_SECONDS)
        except Exception as error:
            log.debug("'%s' of '%s' failed: %s", operation, name, error)
            return None


@contextmanager
def forwarded_warnings(mail: Mailbox) -> Iterator[None]:
    """Send our own log warnings of this process to the driver, which prints them, during the block."""
    queued: deque[Message] = deque()
    sending = threading.Lock()

    def send_queued() -> None:
        with sending:
            while queued and mail.put(f"messages/{time.time_ns():020d}", json.dumps(queued[0])):
                queued.popleft()

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.partition(".")[0] not in FORWARDED or len(queued) >= MAX_QUEUED:
                return
            with suppress(TypeError, ValueError):  # a malformed record
                alert = {name: getattr(record, name) for name in ("alert", "over") if hasattr(record, name)}
                queued.append({"level": record.levelname, "text": record.getMessage(), **alert})

        def flush(self) -> None:  # called by `logging.shutdown` too, before a hung rank ends its process
            if queued:
                wait([in_background(send_queued, "warnings for the driver")], 2 * CALL_SECONDS)

    handler = Forward(logging.WARNING)
    thread = PeriodicThread(send_queued, RETRY_SECONDS, "warnings for the driver")
    thread.start()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        thread.stop(timeout=0.0)
        handler.flush()


@dataclass
class Interrupts:
    """Handling of SIGTERM and SIGINT: they raise Stopped in the main thread; ranks that run (`deferred`) save first."""

    config: RunConfig
    storage: Storage = field(init=False)  # fails within ANSWER_SECONDS
    _number: signal.Signals | None = field(default=None, init=False)
    _deferred: bool = field(default=False, init=False)
    _request: Future[bool] | None = field(default=None, init=False)  # to the store, while the ranks save
    _last_answer: float = field(default=0.0, init=False)  # of the store, after the ranks were asked to save

    def __post_init__(self) -> None:
        self.storage = Storage(self.config.storage).within(ANSWER_SECONDS)

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
            config, storage, reason = self.config, self.storage, f"stopped ({self._number and self._number.name})"
            try:
                step = saved_steps(config, storage)
                saved = f"checkpoint at step {step}" if step else "no checkpoint yet"
                saved = "every stage is finished" if step >= config.total_steps else saved
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
            self._request = in_background(partial(self.storage.exists, join(self.config.folder, RUN_FILE)), "store")

    def on_signal(self, number: int, frame: object) -> None:
        """Handle the first signal; `_end_on_second` handles the second."""
        if self._number is None:
            self._number = signal.Signals(number)
            if not self._deferred:
                self._stop(self._number)

    def _end_on_second(self, read_end: int) -> None:
        """End the process at the second signal: the main thread handles none while it waits in a library."""
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
