"""Messages of ranks reach the driver once and in order, and neither side blocks the other."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from jobs import mailbox
from jobs.mailbox import Mailbox, forwarded_warnings


class Store:
    """Key-value store of a Ray cluster, which may be unavailable."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.away = False

    def _ask(self) -> None:
        if self.away:
            raise RuntimeError("the head does not answer")

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes | None:
        self._ask()
        return self.values.get(key)

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float) -> int:
        self._ask()
        self.values[key] = value
        return 1

    def internal_kv_keys(self, prefix: bytes, namespace: bytes, timeout: float) -> list[bytes]:
        self._ask()
        return [key for key in self.values if key.startswith(prefix)][::-1]

    def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: bytes, timeout: float) -> int:
        self._ask()
        doomed = [each for each in self.values if each == key or (by_prefix and each.startswith(key))]
        return len([self.values.pop(each) for each in doomed])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(mailbox, "_client", lambda: found)
    monkeypatch.setattr(mailbox, "RETRY_SECONDS", 0.01)
    return found


def test_our_warnings_reach_the_driver_once_and_in_order(store: Store) -> None:
    mail = Mailbox("claim")
    with forwarded_warnings(mail):
        for number in range(20):
            logging.getLogger("pipeline.training.alerts").warning(
                "alert %d", number, extra={"alert": "vision/itm_collapse"}
            )
        logging.getLogger("pipeline.training").info("no warning")
        logging.getLogger("urllib3.connection").warning("none of ours")
    logging.getLogger("pipeline.training").warning("too late")
    found: list[Any] = mail.receive()
    assert [message["text"] for message in found] == [f"alert {number}" for number in range(20)]
    assert {message["alert"] for message in found} == {"vision/itm_collapse"}
    assert mail.receive() == []
    assert Mailbox("another").receive() == []


def test_unavailable_head_blocks_neither_side(store: Store) -> None:
    mail, other = Mailbox("claim"), logging.getLogger("pipeline.training")
    store.away = True
    assert (mail.num_placed(), mail.stop_requested(), mail.request_stop(), mail.receive()) == (None, False, False, [])
    with forwarded_warnings(mail):
        for number in range(3 * mailbox.MAX_QUEUED):
            other.warning("line %d", number)
        store.away = False
    assert mail.receive()[0]["text"] == "line 0"


def test_driver_and_ranks_of_one_start_exchange_state(store: Store) -> None:
    driver, rank, another = Mailbox("claim"), Mailbox("claim"), Mailbox("later")
    assert not rank.stop_requested()
    assert driver.request_stop()
    assert rank.stop_requested()
    assert not another.stop_requested()
    rank.set_num_placed(3)
    assert driver.num_placed() == 3
    driver.clear()
    assert store.values == {}
