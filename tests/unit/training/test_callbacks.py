"""Callbacks are forwarded; health of a step, alerts and profiles; no step waits for the store."""

import errno
import gzip
import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch

from jobs.distributed import PROGRESS_FILE, ProgressFile
from pipeline.config.errors import ConfigError, Preempted, RunFailed
from pipeline.config.load import profile_override
from pipeline.config.schema import SpikeConfig
from pipeline.data.storage import Storage
from pipeline.models.model import MAX_SCALE
from pipeline.training import metrics
from pipeline.training.callbacks import Callback, Callbacks, StepEvent
from pipeline.training.collectives import Collectives
from pipeline.training.health import Spike, SpikeGuard, StepHealth, is_out_of_memory, permanent_failures_explained
from pipeline.training.loop import train
from pipeline.training.metrics import CONSECUTIVE, JUMP, LOSSES, Alerts
from pipeline.training.profile import Profiler
from pipeline.training.stages import Stage
from tests.support.short_run import STEPS, BeforeStep, NoUploader, journal, losses, short_config
from tests.support.tiny_model import tiny_config

LEARNT = {"itm_matched": 10, "itm_matched_correct": 8, "itm_mismatched": 20, "itm_mismatched_correct": 15}
HEALTHY = {"is_warm": True, "diagnostics": LEARNT, "data_wait": [0.0, 0.01], "forward_seconds": [1.0, 1.1]}
CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "itm_collapse": ({"diagnostics": LEARNT | {"itm_mismatched_correct": 0}}, "image-text matching is right for 80%"),
    "itc_collapse": (
        {"diagnostics": {"itc_spread": 0.001}, "values": {"train/itc_loss_to_chance": 1.001}},
        "the contrastive loss stays at chance",
    ),
    "itc_clamp": ({"diagnostics": {"itc_scale": MAX_SCALE}}, "the contrastive temperature"),
    "data_starvation": ({"data_wait": [0.0, 0.4, 0.1]}, "rank 1 waits for data 40%"),
    "straggler": ({"forward_seconds": [1.0, 1.1, 3.3]}, "rank 2 needs 3.0 times"),
}


def test_every_hook_is_forwarded_in_order() -> None:
    members = Mock(first=Mock(spec=Callback), second=Mock(spec=Callback))
    callbacks = Callbacks([members.first, members.second])
    for hook in [name for name in vars(Callback) if not name.startswith("_") and name != "close"]:
        members.reset_mock()
        arguments = range(getattr(Callback, hook).__code__.co_argcount - 1)
        getattr(callbacks, hook)(*arguments)
        assert members.mock_calls == [getattr(call.first, hook)(*arguments), getattr(call.second, hook)(*arguments)]


@pytest.fixture
def alerts() -> Alerts:
    alerts, stage = Alerts(), SimpleNamespace(name="pairs", first_step=0)
    alerts.state = Mock(stage=stage, **{"context.coverage": {"folder": 0.01}})
    alerts.on_stage_start(0)
    return alerts


def evaluate(alerts: Alerts, start: int, count: int, **changed: Any) -> list[tuple[str, str]]:
    """Give the alerts the metrics of some steps, healthy but for the changes; return the tags set until then."""
    case = HEALTHY | changed
    values = metrics.diagnostic_metrics(case.pop("diagnostics"), case["data_wait"], case["forward_seconds"])
    values |= case.pop("values", {})
    for step in range(start, start + count):
        alerts.on_metrics(step - 1, metrics.MetricsSnapshot(step, values, **case))
    return [tag.args for tag in alerts.state.context.tracker.tag.mock_calls]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CAUSES)
def test_alert_is_raised_once_and_cleared(alerts: Alerts, name: str) -> None:
    cause, message = CAUSES[name]
    evaluate(alerts, 0, CONSECUTIVE - 1, **cause)
    assert evaluate(alerts, CONSECUTIVE, 1) == [], "one healthy step in between"
    ((key, text),) = evaluate(alerts, 10, 3 + CONSECUTIVE, **cause)
    assert key == f"mome.alert.{name}"
    assert text.startswith(f"since step {9 + CONSECUTIVE}: {message}")
    assert evaluate(alerts, 30, CONSECUTIVE)[1:] == [(key, f"resolved at step {29 + CONSECUTIVE}; {text}")]


def test_warmup_raises_no_collapse_and_a_loss_jump_one_alert(alerts: Alerts) -> None:
    for name in ("itm_collapse", "itc_collapse"):
        assert evaluate(alerts, 0, 3 * CONSECUTIVE, is_warm=False, **CAUSES[name][0]) == []
    for values in ({"train/itc_loss_to_chance": 0.97}, {"train/itc_loss_to_chance": 1.2}):  # learning, or not equal
        assert evaluate(alerts, 0, 3 * CONSECUTIVE, diagnostics={"itc_spread": 0.001}, values=values) == []
    falling = {step: 10.0 - step / LOSSES for step in range(2 * LOSSES)}
    for step, loss in (falling | dict.fromkeys((200, 201, 202), 10 * JUMP)).items():
        alerts.on_health(step, StepHealth({"loss": loss}, is_finite=True, preempted=False))
    ((key, text),) = evaluate(alerts, 0, 1)
    assert key == "mome.alert.loss_spike"
    assert text.startswith("since step 200: the loss jumped to 30")


SPIKES = SpikeConfig(factor=2.0, window=3, skip=2, max_rollbacks=2)


def test_only_a_loss_above_factor_times_median_is_a_spike() -> None:
    for config, history, spike in (
        (SPIKES, [9.0, 1.0, 1.0, 1.2, 2.01], Spike(number=1, step=4, batch=4, loss=2.01, median=1.0)),
        (SPIKES, [1.0, 1.0, 9.0], None),  # the window is not full
        (SPIKES, [1.0, 1.0, 1.0, 2.0], None),  # at the factor
        (SPIKES, [8.0, 4.0, 2.0, 1.0, 0.5], None),  # falling
        (None, [1.0, 1.0, 1.0, 1e9], None),
    ):
        guard = SpikeGuard(config)
        assert [guard.observe(step, loss) for step, loss in enumerate(history)] == [None] * (len(history) - 1) + [spike]


def test_batches_since_the_checkpoint_and_some_more_are_skipped_also_after_a_restart() -> None:
    guard = SpikeGuard(SPIKES)
    for step, loss in enumerate((1.0, 1.1, 0.3, 1.7 / 3)):
        guard.observe(step, loss)
    assert guard.skip_range(Spike(1, 7, 7, 9.0, 1.0), resumed_at=5, stage="pairs") == (5, 10)
    restored = SpikeGuard(SPIKES, json.loads(json.dumps(guard.state())))
    assert restored.state() == guard.state()
    for either in (guard, restored):
        assert either.batch_of(5) == 10
        # A second spike after a checkpoint at step 8, which read batch 13 next.
        assert either.skip_range(Spike(2, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs") == (13, 17)
        assert either.batch_of(8) == 17
        with pytest.raises(RunFailed, match=r"stage pairs, step 9: .* guards\.spike\.max_rollbacks"):
            either.skip_range(Spike(3, 9, 14, 9.0, 1.0), resumed_at=8, stage="pairs")


def test_errors_of_allocators_devices_and_the_system_are_classified() -> None:
    for allocate in (torch.empty, np.empty):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate(10**15)
        assert is_out_of_memory(caught.value)
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        cublas,
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        assert is_out_of_memory(error), error
    for error in (RuntimeError("shapes do not match"), OSError(errno.ENOSPC, "No space"), ValueError("out of memory")):
        assert not is_out_of_memory(error), error
    for zero_stage, can_offload in ((0, False), (2, True)):  # the config rejects offloading without ZeRO
        stage = Stage(tiny_config(zero_stage=zero_stage), 0)
        with pytest.raises(RunFailed) as failed, permanent_failures_explained(stage, Collectives()):
            raise MemoryError("no room")
        assert ("engine.offload_optimizer=true" in str(failed.value)) == can_offload
        assert f"engine.zero_stage={zero_stage + 1}" in str(failed.value)


@pytest.mark.parametrize(("window", "num_steps", "last"), [("6:8", 6, 8), ("6:50", 3, 7)], ids=["inside", "cut"])
def test_steps_in_the_window_are_traced_and_logged(tmp_path: Path, window: str, num_steps: int, last: int) -> None:
    config = tiny_config()
    tracking = config.tracking.model_copy(update={"profile": window})
    stage = Stage(config.model_copy(update={"output": str(tmp_path), "tracking": tracking}), 1)
    profiler = Profiler()
    profiler.state = Mock(stage=stage, **{"context.storage": Storage()})
    assert stage.first_step == 4
    for step in range(num_steps):
        profiler.before_batch(step)
        torch.ones(8) * step
    profiler.close()
    (name,) = [artifact.args[0] for artifact in profiler.state.context.tracker.artifact.mock_calls]  # type: ignore[attr-defined]
    assert name == f"profile/steps-00000006-{last:08d}.json.gz"
    trace = json.loads(gzip.decompress((tmp_path / "tiny" / name).read_bytes()))
    assert len([event for event in trace["traceEvents"] if event.get("name") == "aten::mul"]) == last - 6
    for malformed in ("5", "5:5", "7:5", "a:b"):
        with pytest.raises(ConfigError, match="expected A:B"):
            profile_override(malformed)


class StepGuard(Callback):
    """Makes storage calls of this thread raise between the first and the last step of a stage, but in evaluation."""

    is_stepping, calls = False, 0  # `calls`: by other threads between steps

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        do, thread = Storage._do, threading.get_ident()

        def guarded_do(storage: Storage, url: str, action: str, call: Any) -> Any:
            if self.is_stepping and threading.get_ident() == thread:
                phase, *_ = self.state.context.supervisor._watchdog._entered
                assert phase == "evaluation", f"a storage call between two steps: {action} {url}"
            else:
                self.calls += self.is_stepping
            return do(storage, url, action, call)

        monkeypatch.setattr(Storage, "_do", guarded_do)

    def before_step(self, step: int, batch: Any) -> None:
        self.is_stepping = True

    def after_step(self, event: StepEvent) -> None:
        self.is_stepping = not event.preempted and event.step + 1 < STEPS


def test_no_step_makes_a_storage_call_in_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, preempt, closed = StepGuard(monkeypatch), BeforeStep(6, lambda _: noticed.set()), list[str]()
    guard.close, preempt.close = partial(closed.append, "guard"), partial(closed.append, "preempt")
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)
    evaluation = {"source": "scenes", "every": 4, "max_images_during_training": 8}
    keys = {"engine__zero_stage": 0, "tracking__profile": "4:6", "guards__spike": {"window": 4, "factor": 100.0}}
    config = short_config(str(tmp_path), cluster__workers=1, evaluation=evaluation, **keys)
    progress, noticed = ProgressFile(config, Storage(config.storage)), threading.Event()
    progress.start()
    try:
        with pytest.raises(Preempted):
            train(config, progress, preempted=noticed.is_set, callbacks=[preempt, guard])
        train(config, progress, callbacks=[guard])
    finally:
        progress.stop()
        Collectives.close()
    saves = [record["step"] for record in journal(tmp_path) if "ckpt/stall_s" in record.get("values", {})]
    assert saves == [3, 6, 7, STEPS + 3, STEPS + 6], "7: preempted in the first stage"
    assert closed == ["guard", "preempt", "guard", "guard"], "in reverse, in each of three starts of a stage"
    assert guard.calls > 0, "no other thread wrote checkpoints or progress between steps"
    assert len(losses(tmp_path)) == config.total_steps
    folder = Path(config.folder)
    assert (folder / PROGRESS_FILE).exists()
    assert list((folder / "profile").iterdir())
    assert len(list((folder / "checkpoints").glob("*/COMMIT.json"))) == config.checkpoint.keep


ALONE = """
from types import SimpleNamespace
import psutil
from pipeline.training.collectives import Collectives, KeyValueStore
from pipeline.training.metrics import total_data_counts

collectives = Collectives()
assert collectives.gather_objects((1, "a", None)) == [(1, "a", None)]
assert collectives.broadcast({"claim": None}) == {"claim": None}
store = KeyValueStore(collectives)
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
