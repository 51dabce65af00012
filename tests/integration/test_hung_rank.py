"""A hung rank: every rank's stacks are written to the run's folder and the processes end in time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import SECONDS, redirect_stderr, start_ranks
from tests.support.short_run import BeforeStep, train_short, without_mlflow

ALLOWED = 3.0  # seconds; of a step in these tests


@contextlib.contextmanager
def _started(function: Any, world_size: int, *arguments: Any) -> Iterator[list[Any]]:
    """Start ranks and kill those that remain at the end, as a launcher does."""
    processes = start_ranks(function, world_size, *arguments)
    try:
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(20)


def _stacks(folder: Path) -> dict[int, str]:
    return {int(file.stem[-5:]): file.read_text(encoding="utf-8") for file in folder.glob("stacks/*.rank-*.txt")}


def _stuck(folder: str, how: str, victim: int) -> None:
    """Enter a barrier that one rank does not reach, for the reason `how`."""
    import logging

    from pipeline.data.storage import Storage
    from pipeline.training.collectives import Collectives
    from pipeline.training.watchdog import Watchdog

    redirect_stderr(f"{folder}/log-{os.environ['RANK']}")
    logging.basicConfig(force=True)
    collectives = Collectives()
    allowed: dict[Any, float] = {"startup": 60.0, "training": ALLOWED, "data_wait": 30.0}
    watchdog = Watchdog(collectives, Storage(), folder, allowed)
    watchdog.start()
    collectives.barrier()
    is_victim = collectives.rank == victim
    watchdog.enter("data_wait" if is_victim and how == "waits for data" else "training", 7)
    if is_victim:
        _misbehave(how)
    collectives.barrier()
    watchdog.close()


def _misbehave(how: str) -> None:
    match how:
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "holds the interpreter":
            time.sleep(ALLOWED / 2)  # its watchdog has seen the step begin
            ctypes.PyDLL(None).sleep(600)
        case "waits for data":
            time.sleep(3 * ALLOWED)


@pytest.mark.parametrize("victim", [1, 0], ids=["", "and-it-holds-the-board"])
def test_stopped_rank_is_named_in_the_stacks_of_the_others(tmp_path: Path, victim: int) -> None:
    with _started(_stuck, 2, str(tmp_path), "stopped", victim) as ranks:
        ranks[1 - victim].join(SECONDS)
        assert ranks[1 - victim].exitcode == 75
    told = _stacks(tmp_path)[1 - victim]
    assert "in 'training' of step 7" in told
    assert "barrier" in told
    log = (tmp_path / f"log-{1 - victim}").read_text(encoding="utf-8")
    assert "Thread 0x" in log
    if victim == 1:
        assert "no heartbeat from rank(s) 1" in told


@pytest.mark.slow
def test_rank_that_holds_the_gil_writes_its_stacks(tmp_path: Path) -> None:
    with _started(_stuck, 2, str(tmp_path), "holds the interpreter", 1) as ranks:
        for rank in ranks:
            rank.join(SECONDS)
        assert [rank.exitcode for rank in ranks] == [75, 1]
    assert "rank(s) 1" in _stacks(tmp_path)[0]  # not reached by it, or already without a sign of life
    assert "_misbehave" in (tmp_path / "log-1").read_text(encoding="utf-8")


def test_ranks_wait_for_one_within_its_own_limit(tmp_path: Path) -> None:
    with _started(_stuck, 2, str(tmp_path), "waits for data", 1) as ranks:
        for rank in ranks:
            rank.join(SECONDS)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    assert not _stacks(tmp_path)


def _sleeping(folder: str) -> None:
    without_mlflow()
    redirect_stderr(f"{folder}/log-{os.environ['RANK']}")
    hang = BeforeStep(3, lambda _: time.sleep(600) if os.environ["RANK"] == "1" else None)
    train_short(folder, guards__hang_seconds=5 * ALLOWED, callbacks=[hang])


def test_run_with_a_hung_rank_ends_with_all_stacks(tmp_path: Path) -> None:
    with _started(_sleeping, 2, str(tmp_path)) as ranks:
        for rank in ranks:
            rank.join(SECONDS)
        assert [rank.exitcode for rank in ranks] == [75, 75]
    told = _stacks(tmp_path / "run")
    assert sorted(told) == [0, 1]
    for text in told.values():
        assert "not reached by rank(s) 1" in text
        assert "of step 3 for" in text
    assert "_sleeping" in told[1] or "act" in told[1] or "lambda" in told[1]
    assert "step.py" in told[0]
