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
from contextlib import contextmanager
from typing import Any

from pipeline.config.background import PeriodicThread, in_background

log = logging.getLogger(__name__)

NAMESPACE = b"mome"
ANSWER_SECONDS = 2.0
RETRY_SECONDS = 1.0
FORWARDED = ("jobs", "mome", "pipeline")  # first components of our loggers' names
MAX_QUEUED = 1000  # log records kept while the cluster does not answer

Message = dict[str, Any]


class Mailbox:
    """Messages of the driver and the ranks of one start of a run, which `start` identifies."""

    def __init__(self, start: str):
        self._prefix = f"{start}/"

    def request_stop(self) -> bool:
        """Ask the ranks to save and stop; return whether the cluster accepted the request."""
        return self._put("stop", b"1")

    def stop_requested(self) -> bool:
        return self._get("stop") is not None

    def set_num_placed(self, ranks: int) -> None:
        self._put("placed", str(ranks).encode())

    def num_placed(self) -> int | None:
        """Return the number of running ranks; None if it is unknown."""
        value = self._get("placed")
        return None if value is None else int(value)

    def send(self, message: Message) -> bool:
        """Send a message to the driver; return whether the cluster accepted it."""
        return self._put(f"messages/{time.time_ns():020d}", json.dumps(message).encode())

    def receive(self) -> list[Message]:
        """Return the messages since the last call, oldest first."""
        messages = []
        try:
            client = _client()
            names = client.internal_kv_keys(f"{self._prefix}messages/".encode(), NAMESPACE, ANSWER_SECONDS)
            for name in sorted(names):
                value = client.internal_kv_get(name, NAMESPACE, ANSWER_SECONDS)
                client.internal_kv_del(name, False, NAMESPACE, ANSWER_SECONDS)
                if value is not None:
                    messages.append(json.loads(value))
        except Exception as error:  # the head is unreachable; the next call tries again
            log.debug("messages of the ranks not read: %s", error)
        return messages

    def clear(self) -> None:
        """Delete all messages."""
        try:
            _client().internal_kv_del(self._prefix.encode(), True, NAMESPACE, ANSWER_SECONDS)
        except Exception as error:
            log.debug("messages not cleared: %s", error)

    def _put(self, name: str, value: bytes) -> bool:
        try:
            _client().internal_kv_put((self._prefix + name).encode(), value, True, NAMESPACE, ANSWER_SECONDS)
        except Exception as error:
            log.debug("'%s' not written: %s", name, error)
            return False
        return True

    def _get(self, name: str) -> bytes | None:
        try:
            value: bytes | None = _client().internal_kv_get((self._prefix + name).encode(), NAMESPACE, ANSWER_SECONDS)
        except Exception as error:
            log.debug("'%s' not read: %s", name, error)
            return None
        return value


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

    def send_queued() -> None:
        with sending:
            while queued and mail.send(queued[0]):
                queued.popleft()

    handler = Forward(logging.WARNING)
    thread = PeriodicThread(send_queued, RETRY_SECONDS, "warnings for the driver").start()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        thread.stop(timeout=0.0)
        wait([in_background(send_queued, "last warnings for the driver")], 2 * ANSWER_SECONDS)


def _client() -> Any:
    """Return this process's client of the cluster's state; Ray's public functions for it have no timeout."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()
