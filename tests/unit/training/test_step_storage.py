"""The training thread makes no storage call between steps, so an unavailable store delays no step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.distributed import PROGRESS_FILE, ProgressFile
from pipeline.config.errors import Preempted
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.training.callbacks import Callback, StepEvent
from pipeline.training.collectives import Collectives
from pipeline.training.evaluation import EvaluationCallback
from pipeline.training.loop import train
from tests.support.short_run import STEPS, BeforeStep, NoUploader, losses, short_config


class StepGuard(Callback):
    """Callback that makes storage calls of this thread raise between the first and the last step of a stage.

    Evaluation is exempt: it reads its input, as a step does, and `guards.evaluate_seconds` allows for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0  # calls by other threads between steps
        self._is_stepping = False
        self._thread = threading.get_ident()
        do, evaluate = Storage._do, EvaluationCallback.evaluate

        def guarded_do(storage: Storage, url: str, action: str, call: Any) -> Any:
            if self._is_stepping and threading.get_ident() == self._thread:
                raise AssertionError(f"a storage call between two steps: {action} {url}")
            self.calls += self._is_stepping
            return do(storage, url, action, call)

        def unguarded_evaluate(evaluation: EvaluationCallback) -> Any:
            self._is_stepping = False
            try:
                return evaluate(evaluation)
            finally:
                self._is_stepping = True

        monkeypatch.setattr(Storage, "_do", guarded_do)
        monkeypatch.setattr(EvaluationCallback, "evaluate", unguarded_evaluate)

    def before_step(self, step: int, batch: Batch) -> None:
        self._is_stepping = True

    def after_step(self, event: StepEvent) -> None:
        if event.preempted or event.step + 1 == STEPS:
            self._is_stepping = False


def test_no_step_makes_a_storage_call_in_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, metrics, progress, the profiler and preemption do not wait for the store."""
    guard = StepGuard(monkeypatch)
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)
    config = short_config(
        str(tmp_path),
        cluster__workers=1,
        engine__zero_stage=0,
        tracking__profile="4:6",
        evaluation__source="scenes",
        evaluation__every=4,
        evaluation__max_images_during_training=8,
        guards__spike={"window": 4, "factor": 100.0},
    )
    progress, noticed = ProgressFile(config, Storage(config.storage)), threading.Event()
    try:
        preempt = BeforeStep(6, lambda _: noticed.set())
        with pytest.raises(Preempted):
            train(config, progress, preempted=noticed.is_set, callbacks=[preempt, guard])
        train(config, progress, callbacks=[guard])
    finally:
        progress.close()
        Collectives.close()
    assert guard.calls > 0, "no other thread wrote checkpoints or progress between steps"
    assert len(losses(tmp_path)) == config.total_steps
    folder = Path(config.folder)
    assert (folder / PROGRESS_FILE).exists()
    assert list((folder / "profile").iterdir())
    assert len(list((folder / "checkpoints").glob("*/COMMIT.json"))) == config.checkpoint.keep
