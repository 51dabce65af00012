"""Messages of ranks reach the driver once and in order, and neither side blocks the other."""

from __future__ import annotations

import logging

import pytest
from ray.experimental import internal_kv

from jobs import mailbox
from jobs.mailbox import NUM_PLACED, STOP, Mailbox, forwarded_warnings

ours = logging.getLogger("pipeline.training.alerts")


class KeyValues:
    """Key-value store of a Ray cluster, which may be unavailable."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self.is_away = False

    @property
    def values(self) -> dict[bytes, bytes]:
        if self.is_away:
            raise RuntimeError("the head does not answer")
        return self._values

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes | None:
        return self.values.get(key)

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float) -> int:
        self.values[key] = value
        return 1

    def internal_kv_keys(self, prefix: bytes, namespace: bytes, timeout: float) -> list[bytes]:
        return [key for key in self.values if key.startswith(prefix)][::-1]

    def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: bytes, timeout: float) -> int:
        doomed = [name for name in self.values if name == key or (by_prefix and name.startswith(key))]
        return len([self.values.pop(name) for name in doomed])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> KeyValues:
    values = KeyValues()
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: values)
    monkeypatch.setattr(mailbox, "RETRY_SECONDS", 0.01)
    return values


def test_our_warnings_reach_the_driver_once_and_in_order(store: KeyValues) -> None:
    mail = Mailbox("claim")
    with forwarded_warnings(mail):
        for number in range(20):
            ours.warning("alert %d", number, extra={"alert": "vision/itm_collapse"})
        ours.info("no warning")
        logging.getLogger("urllib3.connection").warning("none of ours")
    ours.warning("too late")
    received = mail.receive()
    assert [message["text"] for message in received] == [f"alert {number}" for number in range(20)]
    assert {message["alert"] for message in received} == {"vision/itm_collapse"}
    assert mail.receive() == []
    assert Mailbox("another").receive() == []


def test_warnings_of_a_rank_that_ends_itself_reach_the_driver(store: KeyValues) -> None:
    """`logging.shutdown` precedes `os._exit` in a hung rank, which leaves no block."""
    mail = Mailbox("claim")
    with forwarded_warnings(mail):
        ours.warning("hung")
        (handler,) = (handler for handler in logging.getLogger().handlers if type(handler).__name__ == "Forward")
        handler.flush()
        assert [message["text"] for message in mail.receive()] == ["hung"]


def test_unavailable_head_blocks_neither_side(store: KeyValues) -> None:
    mail = Mailbox("claim")
    store.is_away = True
    assert (mail.get(NUM_PLACED), mail.get(STOP), mail.put(STOP, 1), mail.receive()) == (None, None, False, [])
    with forwarded_warnings(mail):
        for number in range(3 * mailbox.MAX_QUEUED):
            ours.warning("line %d", number)
        store.is_away = False
    assert mail.receive()[0]["text"] == "line 0"


def test_driver_and_ranks_of_one_start_exchange_state(store: KeyValues) -> None:
    driver, rank, another = Mailbox("claim"), Mailbox("claim"), Mailbox("later")
    assert rank.get(STOP) is None
    assert driver.put(STOP, 1)
    assert (rank.get(STOP), another.get(STOP)) == ("1", None)
    assert rank.put(NUM_PLACED, 3)
    assert driver.get(NUM_PLACED) == "3"
    driver.clear()
    assert store.values == {}
