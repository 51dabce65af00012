"""Short messages between a run's driver and its ranks, through the key-value store of the Ray cluster they share.

Nothing here waits long for the cluster, and no fault of it stops anybody: what could not be said may be lost.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

NAMESPACE = b"mome"
ANSWER_SECONDS = 2.0
POST_SECONDS = 1.0
FORWARDED = ("jobs", "mome", "pipeline")  # begin the names of our own loggers
MOST_WAITING = 1000  # lines that are kept while the cluster does not take them

Message = dict[str, Any]


class Mailbox:
    """What the driver and the ranks of one start of a run say to one another; `start` names it."""

    def __init__(self, start: str):
        self._prefix = f"{start}/"

    def ask_to_stop(self) -> bool:
        """Ask the ranks to save and end; return whether the cluster took it."""
        return self._put("stop", b"1")

    def asked_to_stop(self) -> bool:
        return self._get("stop") is not None

    def say_placed(self, ranks: int) -> None:
        self._put("placed", str(ranks).encode())

    def placed(self) -> int | None:
        """Return how many ranks run now; None if the cluster does not say."""
        found = self._get("placed")
        return None if found is None else int(found)

    def post(self, message: Message) -> bool:
        """Send the driver a message; return whether the cluster took it."""
        return self._put(f"told/{time.time_ns():020d}", json.dumps(message).encode())

    def take(self) -> list[Message]:
        """Return the messages that came since the last call, the oldest first."""
        found = []
        try:
            client = _client()
            names = client.internal_kv_keys(f"{self._prefix}told/".encode(), NAMESPACE, ANSWER_SECONDS)
            for name in sorted(names):
                value = client.internal_kv_get(name, NAMESPACE, ANSWER_SECONDS)
                client.internal_kv_del(name, False, NAMESPACE, ANSWER_SECONDS)
                if value is not None:
                    found.append(json.loads(value))
        except Exception as error:  # the head is away; it is asked again
            log.debug("messages of the ranks not read: %s", error)
        return found

    def clear(self) -> None:
        """Forget all that was said."""
        try:
            _client().internal_kv_del(self._prefix.encode(), True, NAMESPACE, ANSWER_SECONDS)
        except Exception as error:
            log.debug("messages not cleared: %s", error)

    def _put(self, name: str, value: bytes) -> bool:
        try:
            _client().internal_kv_put((self._prefix + name).encode(), value, True, NAMESPACE, ANSWER_SECONDS)
        except Exception as error:
            log.debug("'%s' not said: %s", name, error)
            return False
        return True

    def _get(self, name: str) -> bytes | None:
        try:
            found: bytes | None = _client().internal_kv_get((self._prefix + name).encode(), NAMESPACE, ANSWER_SECONDS)
        except Exception as error:
            log.debug("'%s' not asked: %s", name, error)
            return None
        return found


@contextmanager
def forwarded_warnings(mail: Mailbox) -> Iterator[None]:
    """Within `with`, our own warnings of this process reach the driver too, which shows them."""
    waiting: queue.Queue[Message] = queue.Queue(MOST_WAITING)
    handler = _Forwarder(waiting)
    over = threading.Event()

    def post() -> None:
        message = None
        while not over.is_set() or message is not None or not waiting.empty():
            if message is None:
                try:
                    message = waiting.get(timeout=POST_SECONDS)
                except queue.Empty:
                    continue
            if mail.post(message) or over.is_set():
                message = None
            else:
                over.wait(POST_SECONDS)

    thread = threading.Thread(target=post, name="warnings for the driver", daemon=True)
    thread.start()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        over.set()
        thread.join(timeout=2 * ANSWER_SECONDS)


class _Forwarder(logging.Handler):
    """Puts records into a queue, never waiting."""

    def __init__(self, waiting: queue.Queue[Message]):
        super().__init__(logging.WARNING)
        self._waiting = waiting

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] not in FORWARDED:
            return
        try:
            alert = {name: getattr(record, name) for name in ("alert", "over") if hasattr(record, name)}
            self._waiting.put_nowait({"level": record.levelname, "text": record.getMessage(), **alert})
        except (queue.Full, TypeError, ValueError):
            pass


def _client() -> Any:
    """Return this process's client of the cluster's state. (Ray's public functions of it wait for ever.)"""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()
