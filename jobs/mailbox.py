"""Messages between a run's driver and its ranks, through the key-value store of their Ray cluster.

Calls return within seconds, and a cluster that does not answer is no error: a message may then be lost.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pipeline.config.background import PeriodicThread, in_background

log = logging.getLogger(__name__)

NAMESPACE = b"mome"
STOP, NUM_PLACED = "stop", "placed"  # values: the driver asks the ranks to save and stop; number of running ranks
ANSWER_SECONDS = 2.0
RETRY_SECONDS = 1.0
FORWARDED = ("jobs", "mome", "pipeline")  # first components of our loggers' names
MAX_QUEUED = 1000  # log records kept while the cluster does not answer

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
        """Call the key-value store; return None if it has no value or does not answer.

        `call("del", "", True)` deletes all values and messages. Ray's public functions for it have no timeout.
        """
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        try:
            call = getattr(internal_kv_get_gcs_client(), f"internal_kv_{operation}")
            return call(f"{self.start}/{name}".encode(), *arguments, NAMESPACE, ANSWER_SECONDS)
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
                wait([in_background(send_queued, "warnings for the driver")], 2 * ANSWER_SECONDS)

    handler = Forward(logging.WARNING)
    thread = PeriodicThread(send_queued, RETRY_SECONDS, "warnings for the driver").start()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        thread.stop(timeout=0.0)
        handler.flush()
