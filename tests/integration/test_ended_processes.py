"""Processes of a run that hang, are killed, or were replaced by a later start of the run."""

import ctypes
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import Superseded
from pipeline.data.storage import Storage
from pipeline.training import goodput
from pipeline.training.collectives import Collectives
from pipeline.training.ownership import Ownership
from pipeline.training.supervisor import Watchdog
from tests.support.ranks import exit_codes, run_ranks
from tests.support.short_run import STEPS, BeforeStep, committed, journal, losses, train_short
from tests.support.train_process import TrainProcess

ALLOWED = 3.0  # seconds that a step may take in the tests of hung ranks


def _stacks(folder: Path) -> dict[int, str]:
    return {int(file.stem[-5:]): file.read_text(encoding="utf-8") for file in folder.glob("stacks/*.rank-*.txt")}


def _stuck(folder: str, how: str, victim: int) -> None:
    """Enter a barrier that one rank does not reach, for the reason `how`."""
    os.dup2(os.open(f"{folder}/log-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT, 0o644), 2)  # also what C writes
    logging.basicConfig(force=True)
    collectives = Collectives()
    watchdog = Watchdog(collectives, Storage(), folder, {"startup": 60.0, "training": ALLOWED, "data_wait": 30.0})
    watchdog.start()
    collectives.barrier()
    is_victim = collectives.rank == victim
    watchdog.enter("data_wait" if is_victim and how == "waits for data" else "training", 7)
    match how if is_victim else "":
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "holds the interpreter":
            time.sleep(ALLOWED / 2)  # its watchdog has seen the step begin
            ctypes.PyDLL(None).sleep(600)
        case "waits for data":
            time.sleep(3 * ALLOWED)
    collectives.barrier()
    watchdog.close()


@pytest.mark.parametrize("victim", [1, 0])  # rank 0 holds the board of heartbeats
def test_stopped_rank_is_named_in_the_stacks_of_the_others(tmp_path: Path, victim: int) -> None:
    other = 1 - victim
    assert exit_codes(_stuck, 2, str(tmp_path), "stopped", victim, of=other)[other] == 75
    stacks = _stacks(tmp_path)[other]
    assert "in 'training' of step 7" in stacks
    assert "barrier" in stacks
    assert victim == 0 or "no heartbeat from rank(s) 1" in stacks
    assert "Thread 0x" in (tmp_path / f"log-{other}").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rank_that_holds_the_gil_writes_its_stacks(tmp_path: Path) -> None:
    assert exit_codes(_stuck, 2, str(tmp_path), "holds the interpreter", 1) == [75, 1]
    assert "rank(s) 1" in _stacks(tmp_path)[0]  # not reached by it, or already without a sign of life
    assert "_stuck" in (tmp_path / "log-1").read_text(encoding="utf-8")


def test_ranks_wait_for_one_within_its_own_limit(tmp_path: Path) -> None:
    assert exit_codes(_stuck, 2, str(tmp_path), "waits for data", 1) == [0, 0]
    assert not _stacks(tmp_path)


def _sleeping(folder: str) -> None:
    hang = BeforeStep(3, lambda _: time.sleep(600) if os.environ["RANK"] == "1" else None)
    train_short(folder, callbacks=[hang], guards__hang_seconds=5 * ALLOWED)


def test_run_with_a_hung_rank_ends_with_all_stacks(tmp_path: Path) -> None:
    assert exit_codes(_sleeping, 2, str(tmp_path)) == [75, 75]
    stacks = _stacks(tmp_path / "run")
    assert sorted(stacks) == [0, 1]
    assert all("not reached by rank(s) 1" in text and "of step 3 for" in text for text in stacks.values())
    assert any(name in stacks[1] for name in ("_sleeping", "act", "lambda"))
    assert "step.py" in stacks[0]


STEP_SECONDS = 0.3  # in addition to the step itself
BEAT_SECONDS = 0.1  # time of a killed process after its last heartbeat counts as down time


def _slow(folder: str, killed_at: int) -> None:
    """Train one rank with steps of some length; kill it before the step `killed_at`."""
    goodput.HEARTBEAT_SECONDS = BEAT_SECONDS
    slow = [BeforeStep(step, lambda _: time.sleep(STEP_SECONDS)) for step in range(STEPS)]
    kill = BeforeStep(killed_at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    Path(folder, f"begun-{killed_at}").touch()
    train_short(folder, callbacks=[kill, *slow], cluster__workers=1)
    Path(folder, "ended").touch()


def test_every_second_of_a_resumed_run_is_accounted_for(tmp_path: Path) -> None:
    assert exit_codes(_slow, 1, str(tmp_path), STEPS - 1) == [-signal.SIGKILL]
    time.sleep(3.0)
    assert exit_codes(_slow, 1, str(tmp_path), -1) == [0]
    begun, ended = ((tmp_path / name).stat().st_mtime for name in (f"begun-{STEPS - 1}", "ended"))
    account = json.loads((tmp_path / "run" / "time.json").read_text(encoding="utf-8"))
    seconds = account["seconds"]
    assert sum(seconds.values()) == pytest.approx(ended - begun, abs=1.0)
    assert (account["restarts"], account["ended"]) == (1, True)
    # Killed before step 7 with a checkpoint of 6 steps: one step is lost work, the other sixteen count as training.
    assert seconds["lost_work"] >= STEP_SECONDS - 2 * BEAT_SECONDS
    assert seconds["training"] >= 2 * STEPS * STEP_SECONDS
    assert seconds["restart"] >= 3.0
    assert min(seconds["startup"], seconds["checkpoint"]) > 0
    *_, last = (record["values"] for record in journal(tmp_path) if "perf/goodput" in record.get("values", {}))
    phases = {phase: last[f"time/{phase}_s"] for phase in seconds}
    assert phases["lost_work"] == pytest.approx(seconds["lost_work"])
    assert 0 < last["perf/goodput"] < 1
    assert last["perf/goodput"] == pytest.approx(phases["training"] / sum(phases.values()))


def _superseded(folder: str) -> None:
    """Take the run away in the middle of a stage and in its last steps, then resume it."""
    train_short(folder, "whole", cluster__workers=1)

    def take(state: Any) -> None:
        state.checkpoints.wait()  # the checkpoint before this step is committed
        Ownership.take(Storage(), f"{folder}/run")

    # Step 6 is reached and not saved the first time; no stage is handed over the second time.
    for step, expected in {4: ["step-00000003"], STEPS - 1: ["step-00000003", "step-00000006"]}.items():
        with pytest.raises(Superseded, match="owned by a later start"):
            train_short(folder, callbacks=[BeforeStep(step, take)], cluster__workers=1)
        assert committed(Path(folder, "run")) == expected
    ended = [record for record in journal(folder) if record["kind"] in ("stage_end", "run_end")]
    assert not ended, "how the run ends is for its owner to say"
    train_short(folder, cluster__workers=1)


def test_superseded_run_commits_nothing(tmp_path: Path) -> None:
    run_ranks(_superseded, 1, str(tmp_path))
    assert losses(tmp_path) == losses(tmp_path, "whole")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ranks_of_a_superseded_run_are_not_restarted(tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "run", 12).start()
    run.wait_for(lambda: run.step() >= 6, "the first steps")
    Ownership.take(Storage(), run.url)
    assert run.status() == Superseded.exit_status
    assert "owned by a later start" in run.log_text()
    assert not (tmp_path / "run" / "failure.json").exists(), "what its successor's ranks would give up for"
