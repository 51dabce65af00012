"""Each second of a run belongs to one kind, over any restarts: the sum is the wall time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.data.storage import Storage
from pipeline.training.accounting import KINDS, Account, Ledger, metrics, read, spent


def life(at: float, ended: bool = False, restarts: int = 0, **seconds: float) -> dict:
    return {"at": at, "seconds": dict.fromkeys(KINDS, 0.0) | seconds, "restarts": restarts, "ended": ended}


def shown(account: Account) -> dict[str, int]:
    return {kind: round(value) for kind, value in account.seconds().items() if round(value)}


def test_time_belongs_to_what_the_rank_is_in() -> None:
    account = Account()
    time.sleep(0.2)
    account.enter("training")
    time.sleep(0.4)
    account.enter("data_wait")
    seconds = account.seconds()
    assert seconds["startup"] == pytest.approx(0.2, abs=0.1)
    assert seconds["training"] == pytest.approx(0.4, abs=0.1)
    assert seconds["data_wait"] < 0.1


def test_what_came_after_the_checkpoint_is_lost_and_the_rest_of_the_gap_is_the_restart() -> None:
    # Begun at 1000; at the checkpoint 10 + 50 + 5 s; the last sign of life at 1100; started again at 1130.
    before = life(1100, startup=10.0, training=82.0, data_wait=6.0, checkpoint=2.0)
    account = Account(before, now=1130)
    account.goes_on_from({"startup": 10.0, "training": 50.0, "data_wait": 5.0, "checkpoint": 1.0})
    expected = {"startup": 10, "training": 50, "data_wait": 5, "checkpoint": 2, "lost_work": 33, "restart": 30}
    assert shown(account) == expected
    assert sum(account.seconds().values()) == pytest.approx(130, abs=0.5)
    assert account.restarts == 1


def test_a_process_that_died_before_its_first_step_loses_nothing_more() -> None:
    before = life(1200, restarts=1, startup=10.0, training=50.0, lost_work=33.0, restart=107.0)
    account = Account(before, now=1210)
    account.goes_on_from({"startup": 10.0, "training": 50.0})
    assert shown(account) == {"startup": 10, "training": 50, "lost_work": 33, "restart": 117}


def test_a_checkpoint_later_than_the_last_sign_of_life_is_believed() -> None:
    account = Account(life(1020, startup=10.0, training=10.0), now=1060)
    account.goes_on_from({"startup": 10.0, "training": 30.0, "checkpoint": 1.0})
    assert shown(account) == {"startup": 10, "training": 30, "checkpoint": 1, "restart": 19}


def test_without_a_checkpoint_all_is_lost() -> None:
    account = Account(life(1050, startup=10.0, training=40.0), now=1050)
    account.goes_on_from({})
    assert shown(account) == {"startup": 10, "lost_work": 40}


def test_a_run_that_ended_and_is_given_more_to_do_was_not_down() -> None:
    account = Account(life(1050, ended=True, startup=10.0, training=40.0), now=90000)
    assert shown(account) == {"startup": 10, "training": 40}
    assert account.restarts == 0


def test_goodput_is_the_share_of_steps_that_stand() -> None:
    seconds = dict.fromkeys(KINDS, 0.0) | {"training": 60.0, "lost_work": 30.0, "restart": 30.0}
    assert metrics(seconds)["perf/goodput"] == 0.5
    assert metrics(seconds)["time/lost_work_s"] == 30.0


def test_the_ledger_lies_in_the_runs_folder_and_an_evaluation_adds_to_it(tmp_path: Path) -> None:
    storage, folder = Storage(), str(tmp_path)
    assert read(storage, folder) is None
    ledger = Ledger(storage, folder, writes=True)
    ledger.start()
    ledger.close(ended=True)
    with spent(storage, folder, "evaluation"):
        time.sleep(0.1)
    found = read(storage, folder)
    assert found is not None
    assert found["ended"]
    assert found["seconds"]["evaluation"] >= 0.1


def test_a_damaged_ledger_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "time.json").write_text("{", encoding="utf-8")
    assert read(Storage(), str(tmp_path)) is None
