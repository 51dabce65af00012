"""Callbacks are forwarded; alerts, profiles and node statistics; no step waits for the store."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from jobs.distributed import PROGRESS_FILE, ProgressFile
from pipeline.config.errors import ConfigError, Preempted
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.models.heads import MAX_SCALE
from pipeline.training.alerts import CONSECUTIVE, JUMP, LOSSES, Alerts
from pipeline.training.callbacks import Callback, Callbacks, StepEvent
from pipeline.training.collectives import Collectives
from pipeline.training.health import StepHealth
from pipeline.training.loop import train
from pipeline.training.metrics import EvaluationCallback, MetricsSnapshot, diagnostic_metrics
from pipeline.training.profile import Profiler, profile_override
from pipeline.training.stages import Stage
from pipeline.training.supervisor import NodeMonitor, metrics_by_node
from tests.support.ranks import run_ranks
from tests.support.short_run import STEPS, BeforeStep, NoUploader, losses, short_config
from tests.support.tiny_model import tiny_config

LEARNT = {"itm_matched": 10, "itm_matched_correct": 8, "itm_mismatched": 20, "itm_mismatched_correct": 15}
HEALTHY = {"is_warm": True, "diagnostics": LEARNT, "data_wait": [0.0, 0.01], "forward_seconds": [1.0, 1.1]}
CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "itm_collapse": ({"diagnostics": LEARNT | {"itm_mismatched_correct": 0}}, "image-text matching is right for 80%"),
    "itc_clamp": ({"diagnostics": {"itc_scale": MAX_SCALE}}, "the contrastive temperature"),
    "data_starvation": ({"data_wait": [0.0, 0.4, 0.1]}, "rank 1 waits for data 40%"),
    "straggler": ({"forward_seconds": [1.0, 1.1, 3.3]}, "rank 2 needs 3.0 times"),
}


def test_every_hook_is_forwarded_in_order_and_closed_in_reverse() -> None:
    members = Mock(first=Mock(spec=Callback), second=Mock(spec=Callback))
    callbacks = Callbacks([members.first, members.second])
    for hook in [name for name in vars(Callback) if not name.startswith("_")]:
        members.reset_mock()
        arguments = range(getattr(Callback, hook).__code__.co_argcount - 1)
        getattr(callbacks, hook)(*arguments)
        order = [getattr(call.first, hook)(*arguments), getattr(call.second, hook)(*arguments)]
        assert members.mock_calls == (order[::-1] if hook == "close" else order), hook


def evaluate(alerts: Alerts, start: int, count: int, **changed: Any) -> None:
    """Give the alerts the metrics of some steps, healthy but for the changes."""
    case = HEALTHY | changed
    values = diagnostic_metrics(case.pop("diagnostics"), case["data_wait"], case["forward_seconds"])
    for step in range(start, start + count):
        alerts.on_metrics(step - 1, MetricsSnapshot(step, {}, values, 1.0, **case))


@pytest.mark.parametrize("name", CAUSES)
def test_alert_is_raised_once_and_cleared(name: str) -> None:
    tracker, (cause, message) = Mock(), CAUSES[name]
    alerts = Alerts(SimpleNamespace(name="pairs", global_step=lambda step: step), tracker)  # type: ignore[arg-type]
    evaluate(alerts, 0, CONSECUTIVE - 1, **cause)
    evaluate(alerts, CONSECUTIVE, 1)
    assert not tracker.tag.called, "one healthy step in between"
    evaluate(alerts, 10, 3 + CONSECUTIVE, **cause)
    ((key, text),) = [tag.args for tag in tracker.tag.mock_calls]
    assert key == f"mome.alert.{name}"
    assert text.startswith(f"since step {9 + CONSECUTIVE}: {message}")
    evaluate(alerts, 30, CONSECUTIVE)
    assert [tag.args for tag in tracker.tag.mock_calls[1:]] == [(key, f"over at step {29 + CONSECUTIVE}; {text}")]


def test_warmup_raises_no_collapse_and_a_loss_jump_one_alert() -> None:
    tracker = Mock()
    alerts = Alerts(SimpleNamespace(name="pairs", global_step=lambda step: step), tracker)  # type: ignore[arg-type]
    evaluate(alerts, 0, 3 * CONSECUTIVE, is_warm=False, **CAUSES["itm_collapse"][0])
    for step in range(2 * LOSSES):
        alerts.on_health(step, StepHealth({"loss": 10.0 - step / LOSSES}, is_finite=True, preempted=False))
    assert not tracker.tag.called
    for step in range(3):
        alerts.on_health(200 + step, StepHealth({"loss": 10 * JUMP}, is_finite=True, preempted=False))
    ((key, text),) = [tag.args for tag in tracker.tag.mock_calls]
    assert key == "mome.alert.loss_spike"
    assert text.startswith("since step 200: the loss jumped to 30")


@pytest.mark.parametrize(
    ("window", "num_steps", "traced"),
    [("6:8", 6, (6, 8)), ("6:50", 3, (6, 7))],
    ids=["inside the stage", "cut by its end"],
)
def test_steps_in_the_profile_window_are_traced_and_logged(
    tmp_path: Path, window: str, num_steps: int, traced: tuple[int, int]
) -> None:
    context, stage = Mock(storage=Storage()), Stage(tiny_config().model_copy(update={"output": str(tmp_path)}), 1)
    assert stage.first_step == 4
    profiler = Profiler(stage, context, window)
    for step in range(num_steps):
        profiler.before_batch(step)
        torch.ones(8) * step
    profiler.close()
    (name,) = [artifact.args[0] for artifact in context.tracker.artifact.mock_calls]
    assert name == f"profile/steps-{traced[0]:08d}-{traced[1]:08d}.json.gz"
    trace = json.loads(gzip.decompress((tmp_path / "tiny" / name).read_bytes()))
    assert len([event for event in trace["traceEvents"] if event.get("name") == "aten::mul"]) == traced[1] - traced[0]


def test_malformed_profile_window_is_rejected() -> None:
    for window in ("5", "5:5", "7:5", "a:b"):
        with pytest.raises(ConfigError, match="expected A:B"):
            profile_override(window)


class StepGuard(Callback):
    """Callback that makes storage calls of this thread raise between the first and the last step of a stage.

    Evaluation is exempt: it reads its input, as a step does, and `guards.evaluate_seconds` allows for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0  # calls by other threads between steps
        self.saves: list[tuple[int, bool]] = []  # steps done, and whether the URL is in the run's checkpoints
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

    def on_checkpoint(self, num_steps: int, url: str) -> None:
        self.saves.append((num_steps, "/checkpoints/step-" in url))

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
        progress.writer.close(5.0)
        Collectives.close()
    assert guard.saves == [(3, True), (6, True), (7, True), (3, True), (6, True)], "7: preempted in the first stage"
    assert guard.calls > 0, "no other thread wrote checkpoints or progress between steps"
    assert len(losses(tmp_path)) == config.total_steps
    folder = Path(config.folder)
    assert (folder / PROGRESS_FILE).exists()
    assert list((folder / "profile").iterdir())
    assert len(list((folder / "checkpoints").glob("*/COMMIT.json"))) == config.checkpoint.keep


EVERYWHERE = {
    "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
    "disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes",
}  # fmt: skip
ALONE = """
from types import SimpleNamespace
import psutil
from pipeline.training.collectives import Collectives
from pipeline.training.metrics import total_data_counts

collectives = Collectives()
assert collectives.gather_json((1, "a", None)) == [[1, "a", None]]
assert collectives.broadcast_json({"claim": None}) == {"claim": None}
store = collectives.key_value_store()
store.write("heartbeats", "alive")
assert store.read("heartbeats") == {0: "alive"}
announced = [store.announcement("hung", text) for text in ("", "first", "second", "")]
assert announced == ["", "first", "first", "first"], announced
for large in (2**24 + 1, 4 * 10**10 + 1):
    loader = SimpleNamespace(counts=lambda: {"samples/pairs": large})
    assert total_data_counts(loader, {}, collectives) == {"data/samples/pairs": float(large)}
open_to = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
assert open_to <= {"127.0.0.1", "::1"}, open_to
collectives.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface has another name elsewhere")
def test_single_rank_opens_no_port_and_counts_every_sample() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def watch(names: list[str]) -> dict[str, float]:
    """Run each rank as a node of its own; return the metrics rank 0 takes once all nodes have reported."""
    collectives = Collectives()
    monitor = NodeMonitor(collectives, seconds=0.1, name=names[collectives.rank])
    monitor.start()
    taken: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while collectives.rank == 0 and time.monotonic() < deadline:
        taken |= monitor.take()
        if len({key.split("/")[1] for key in taken}) == len(names):
            break
        time.sleep(0.05)
    collectives.barrier()
    monitor.stop()
    collectives.close()
    return taken


def test_rank_0_collects_statistics_of_every_node() -> None:
    taken, nothing = run_ranks(watch, 2, ["first", "second"])
    for node in ("first", "second"):
        assert {key.split("/")[2] for key in taken if key.startswith(f"system/{node}/")} >= EVERYWHERE
        assert 0 < taken[f"system/{node}/system_memory_usage_percentage"] < 100
    assert nothing == {}
    reports = {rank: {"node": "host", "metrics": {"cpu": float(rank)}} for rank in (0, 8)}
    by_node = metrics_by_node(reports)
    assert by_node == {"system/host/cpu": 0.0, "system/host-8/cpu": 8.0}, "the same name is distinguished by rank"
