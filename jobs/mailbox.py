"""Messages between a run's driver and its ranks, through the key-value store of their Ray cluster.

Calls return within seconds, and a cluster that does not answer is no error: a message may then be lost.
"""

from __future__ import annotations

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
ANSWER_SECONDS = 2.0
RETRY_SECONDS = 1.0
FORWARDED = ("jobs", "mome", "pipeline")  # first components of our loggers' names
MAX_QUEUED = 1000  # log records kept while the cluster does not answer

Message = dict[str, Any]


@dataclass(frozen=True)
class Mailbox:
    """Messages of the driver and the ranks of one start of a run, which `start` identifies."""

    start: str

    def request_stop(self) -> bool:
        """Ask the ranks to save and stop; return whether the cluster accepted the request."""
        return self._call("put", "stop", b"1", True) is not None

    def stop_requested(self) -> bool:
        return self._call("get", "stop") is not None

    def set_num_placed(self, ranks: int) -> None:
        self._call("put", "placed", str(ranks).encode(), True)

    def num_placed(self) -> int | None:
        """Return the number of running ranks; None if it is unknown."""
        value = self._call("get", "placed")
        return None if value is None else int(value)

    def send(self, message: Message) -> bool:
        """Send a message to the driver; return whether the cluster accepted it."""
        name = f"messages/{time.time_ns():020d}"
        return self._call("put", name, json.dumps(message).encode(), True) is not None

    def receive(self) -> list[Message]:
        """Return the messages since the last call, oldest first."""
        messages = []
        for key in sorted(self._call("keys", "messages/") or ()):
            name = key.decode().removeprefix(f"{self.start}/")
            value = self._call("get", name)
            if value is None or self._call("del", name, False) is None:
                break  # the next call tries again
            with suppress(ValueError):  # another program may write to this namespace
                messages.append(json.loads(value))
        return messages

    def clear(self) -> None:
        """Delete all messages."""
        self._call("del", "", True)

    def _call(self, operation: str, name: str, *arguments: Any) -> Any:
        """Call the key-value store; return None if it has no value or does not answer.

        Ray's public functions for it have no timeout.
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

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.partition(".")[0] not in FORWARDED or len(queued) >= MAX_QUEUED:
                return
            try:
                alert = {name: getattr(record, name) for name in ("alert", "over") if hasattr(record, name)}
                queued.append({"level": record.levelname, "text": record.getMessage(), **alert})
            except (TypeError, ValueError):
                pass

        def flush(self) -> None:  # called by `logging.shutdown`, before a hung rank ends its process
            send_rest(ANSWER_SECONDS)

    def send_queued() -> None:
        with sending:
            while queued and mail.send(queued[0]):
                queued.popleft()

    def send_rest(seconds: float) -> None:
        if queued:
            wait([in_background(send_queued, "warnings for the driver")], seconds)

    handler = Forward(logging.WARNING)
    thread = PeriodicThread(send_queued, RETRY_SECONDS, "warnings for the driver").start()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        thread.stop(timeout=0.0)
        send_rest(2 * ANSWER_SECONDS)
