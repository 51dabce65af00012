"""A run that was started a second time: the earlier process ends at its next checkpoint and changes nothing more."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import Superseded
from pipeline.data.storage import Storage
from pipeline.training.ownership import OWNER_FILE, Ownership
from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, BeforeStep, journal, losses, short_config, train_short, without_mlflow
from tests.support.train_process import SECONDS, TrainProcess

TAKEN = 4  # before this step's forward


def test_only_the_latest_claim_holds(tmp_path: Path) -> None:
    storage, folder = Storage(), str(tmp_path)
    assert Ownership(storage, folder, "of a run that nobody claimed").holds()
    first = Ownership.take(storage, folder)
    first.check()
    second = Ownership.take(storage, folder)
    assert second.holds()
    assert Ownership(storage, folder, second.claim).holds(), "restarted ranks share their launcher's claim"
    with pytest.raises(Superseded, match=f"owned by a later start.*{OWNER_FILE}"):
        first.check()


def _superseded(folder: str) -> dict[str, Any]:
    """Take the run away in the middle of a stage and in its last steps, then resume it."""
    from pipeline.training.loop import train

    without_mlflow()
    train_short(folder, "whole", cluster__workers=1)
    config, committed = short_config(folder, "run", cluster__workers=1), []

    def take(state: Any) -> None:
        state.checkpoints.wait()  # the checkpoint before this step is committed
        Ownership.take(Storage(), config.folder)

    for step in (TAKEN, STEPS - 1):
        with pytest.raises(Superseded, match="owned by a later start"):
            train(config, lambda progress: None, callbacks=[BeforeStep(step, take)])
        committed.append(sorted(file.parent.name for file in Path(config.folder).glob("*/*/COMMIT.json")))
    ended = [record for record in journal(folder) if record["kind"] in ("stage_end", "run_end")]
    train(config, lambda progress: None)
    return {"committed": committed, "ended": ended}


def test_superseded_run_commits_nothing(tmp_path: Path) -> None:
    (found,) = run_ranks(_superseded, 1, str(tmp_path))
    first, second = found["committed"]
    assert [name.partition(".")[0] for name in first] == ["step-00000003"], "step 6 was reached, and not saved"
    assert [name.partition(".")[0] for name in second] == ["step-00000003", "step-00000006"], "no stage was handed over"
    assert not found["ended"], "how the run ends is for its owner to say"
    assert losses(tmp_path) == losses(tmp_path, "whole")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ranks_of_a_superseded_run_are_not_restarted(tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "run", 12).start()
    deadline = time.monotonic() + SECONDS
    while run.step() < 6 and run.running() and time.monotonic() < deadline:
        time.sleep(0.02)
    Ownership.take(Storage(), run.url)
    assert run.process is not None
    assert run.process.wait(timeout=SECONDS) == Superseded.exit_status
    assert "owned by a later start" in run.log_text()
    assert not (tmp_path / "run" / "failure.json").exists(), "what its successor's ranks would give up for"
