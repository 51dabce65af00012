"""Between two steps the training thread makes no storage call: a store that is away for minutes stops no step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.rank import PROGRESS_FILE, ProgressFile
from pipeline.config.errors import Preempted
from pipeline.data.storage import Storage
from pipeline.training.collectives import close_group
from pipeline.training.evaluation import StageEvaluation
from pipeline.training.loop import train
from pipeline.training.stage_run import StageRun
from tests.support.short_run import BeforeStep, NoUploader, losses, short_config


class StepGuard:
    """While in `with`: every storage call of this thread between the first and the last step of a stage raises.

    What an evaluation reads is its input, as batches are a step's: `guards.evaluate_seconds` allows for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0  # of other threads, between steps
        self._is_stepping = False
        self._thread = threading.get_ident()
        do, steps, evaluate = Storage._do, StageRun._steps, StageEvaluation.__call__

        def guarded_do(storage: Storage, url: str, action: str, call: Any) -> Any:
            if self._is_stepping and threading.get_ident() == self._thread:
                raise AssertionError(f"a storage call between two steps: {action} {url}")
            self.calls += self._is_stepping
            return do(storage, url, action, call)

        def guarded_steps(run: StageRun, start: int) -> Iterator[Any]:
            try:
                for item in steps(run, start):
                    self._is_stepping = True
                    yield item
            finally:
                self._is_stepping = False

        def unguarded_evaluation(evaluation: StageEvaluation, model: Any) -> Any:
            self._is_stepping = False
            try:
                return evaluate(evaluation, model)
            finally:
                self._is_stepping = True

        monkeypatch.setattr(Storage, "_do", guarded_do)
        monkeypatch.setattr(StageRun, "_steps", guarded_steps)
        monkeypatch.setattr(StageEvaluation, "__call__", unguarded_evaluation)


def test_no_step_makes_a_storage_call_in_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither checkpoints, metrics, progress, a trace, an evaluation nor a notice of preemption waits for the store."""
    guard = StepGuard(monkeypatch)
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)
    config = short_config(
        str(tmp_path),
        cluster__workers=1,
        engine__zero_stage=0,
        tracking__profile="4:6",
        evaluation__source="scenes",
        evaluation__every=4,
        evaluation__limit_during=8,
        guards__spike={"window": 4, "factor": 100.0},
    )
    progress, noticed = ProgressFile(config, Storage(config.storage)), threading.Event()
    try:
        with BeforeStep(6, lambda _: noticed.set()), pytest.raises(Preempted):
            train(config, progress, preempted=noticed.is_set)
        train(config, progress)
    finally:
        progress.close()
        close_group()
    assert guard.calls > 0, "checkpoints and progress were written beside the steps"
    assert len(losses(tmp_path)) == config.total_steps
    folder = Path(config.folder)
    assert (folder / PROGRESS_FILE).exists()
    assert list((folder / "profile").iterdir())
    assert len(list((folder / "checkpoints").glob("*/COMMIT.json"))) == config.checkpoint.keep
