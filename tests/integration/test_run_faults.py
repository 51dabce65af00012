"""Faults inside a run: spikes, non-finite values, preemption, exhausted memory and disk, an outage, and alerts."""

import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.errors import Preempted, RunFailed
from pipeline.data.loading.backends import ThreadBackend
from pipeline.data.storage import Storage
from pipeline.data.storage.retry import RetryBudget
from pipeline.training.callbacks import Callback
from pipeline.training.metrics import CONSECUTIVE
from pipeline.training.step import TrainingStep
from tests.support.fault_proxy import FaultProxy
from tests.support.ranks import SECONDS, run_ranks, start_ranks
from tests.support.short_run import STEPS, BeforeStep, committed, journal, losses, train_short
from tests.support.stores import fill_disk, small_disk
from tests.support.train_process import wait_until


def _batches(folder: str, name: str, killed_at: int | None = None, planted: tuple[int, ...] = (4,)) -> list[int]:
    """Return the batches that stage 0 read, in order, until its end or `killed_at`; losses of `planted` ones spike."""
    read: list[int] = []
    original = TrainingStep.__call__

    def call(self: Any, batch: Any, **options: Any) -> Any:
        if self.stage.name != "vision":
            return original(self, batch, **options)
        if batch.step == killed_at:
            raise KeyboardInterrupt  # simulated end of the process, which the package must not catch
        read.append(batch.step)
        result = original(self, batch, **options)
        return result | {"loss": result["loss"] * 100} if batch.step in planted else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", call)
        try:
            train_short(folder, name, guards__spike={"factor": 3.0, "window": 2, "skip": 1, "max_rollbacks": 2})
        except KeyboardInterrupt:
            assert killed_at is not None
    return read


def _spiked(folder: str) -> dict[str, Any]:
    batches: dict[str, Any] = {"whole": _batches(folder, "whole")}
    # Killed before the next checkpoint (6 steps: batches 0 1 2 6 7 8) and after it.
    for name, killed_at in {"before": 8, "after": 10}.items():
        batches[name] = [_batches(folder, name, killed_at), _batches(folder, name)]
    with pytest.raises(RunFailed, match=r"after 2 rollbacks; guards\.spike\.max_rollbacks allows no more"):
        _batches(folder, "spiky", planted=tuple(range(4, 60)))
    return batches


def test_spike_skips_its_data_also_in_a_resumed_run(tmp_path: Path) -> None:
    past = [6, 7, 8, 9, 10]  # from the checkpoint of 3 steps on: without batches 3 to 5 (the spike's 4, and one more)
    assert len(past) == STEPS - 3
    before, after = [[0, 1, 2, 3, 4, 6, 7], [3, 4, *past]], [[0, 1, 2, 3, 4, 6, 7, 8, 9], [9, 10]]
    whole = [0, 1, 2, 3, 4, *past]
    assert run_ranks(_spiked, 2, str(tmp_path)) == [{"whole": whole, "before": before, "after": after}] * 2
    weights = [tmp_path / name / "stages/0-vision/weights.safetensors" for name in ("whole", "before", "after")]
    assert len({file.read_bytes() for file in weights}) == 1
    tags = {r["key"]: r["value"] for r in journal(tmp_path, "whole") if r["kind"] == "tag"}
    assert "back to step 3 without batches 3 to 5" in tags["mome.spike.1"]


class Spoiler(Callback):
    """Callback that makes rank 1 produce non-finite values in step 2 and compares the weights before and after."""

    def __init__(self, kind: str):
        self._kind, self.is_unchanged = kind, False

    def before_step(self, step: int, batch: Any) -> None:
        if step == 2 and os.environ["RANK"] == "1":
            self.state.engine.module.get_submodule("blocks.1.attention").register_forward_hook(self._spoil)
        self._before = [fragment.values["weight"].clone() for fragment in self.state.engine.fragments()]

    def _spoil(self, module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self._kind == "output":
            return output * float("inf")
        output.register_hook(lambda gradient: gradient * float("nan"))  # the forward stays finite
        return None

    def on_fault(self, step: int, name: str, message: str) -> None:
        after = [fragment.values["weight"] for fragment in self.state.engine.fragments()]
        self.is_unchanged = all(torch.equal(a, b) for a, b in zip(self._before, after, strict=True))


SPOILT = [("output", 2, "float32"), ("gradient", 2, "float32"), ("output", 3, "bfloat16"), ("gradient", 3, "bfloat16"),
          ("gradient", 0, "float32"), ("gradient", 1, "bfloat16")]  # fmt: skip


def _spoil(folder: str) -> None:
    for kind, zero_stage, precision in SPOILT:
        spoiler, case = Spoiler(kind), f"{kind}-{zero_stage}-{precision}"
        with pytest.raises(RunFailed) as caught:
            train_short(folder, case, [spoiler], engine__zero_stage=zero_stage, engine__precision=precision)
        message, direction = str(caught.value), "forward" if kind == "output" else "backward"
        for part in ("step 2: ", f"on rank 1, in the {direction}", "module 'blocks.1.attention", "were not updated"):
            assert part in message, (case, message)
        assert ("is nan on rank 1" in message) == (kind == "output"), case
        assert spoiler.is_unchanged, case


def test_non_finite_value_stops_the_run_before_the_update(tmp_path: Path) -> None:
    run_ranks(_spoil, 2, str(tmp_path))


PREEMPTED = {  # name -> signal (None: the platform's own), receiving rank, and step in which it arrives
    "in-the-middle": (signal.SIGTERM, "1", 4),
    "in-the-first-step": (signal.SIGUSR1, "0", 0),
    "in-the-last-step-of-a-stage": (None, "1", STEPS - 1),
}


def _preempt(folder: str) -> None:
    """Train until one rank receives a preemption signal in the middle of a step, then resume, for every case."""
    train_short(folder, "whole")
    for name, (number, rank, step) in PREEMPTED.items():
        announced: list[bool] = []
        act = partial(os.kill, os.getpid(), number) if number else partial(announced.append, True)
        callback = BeforeStep(step, lambda _, act=act, rank=rank: act() if os.environ["RANK"] == rank else None)
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        with pytest.raises(Preempted, match="Re-run the same command") as caught:
            train_short(folder, name, [callback], {"preempted": partial(any, announced)})
        assert caught.value.exit_status == 75
        assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        assert max(losses(folder, name)) == step + 1, "the step was finished and no other was started"
        assert ("0-vision" if step + 1 == STEPS else f"step-{step + 1:08d}") in committed(Path(folder, name))
        train_short(folder, name)


def test_preempted_run_saves_at_once_and_loses_no_step(tmp_path: Path) -> None:
    run_ranks(_preempt, 2, str(tmp_path))
    assert len(losses(tmp_path, "whole")) == 2 * STEPS
    for name in PREEMPTED:
        assert losses(tmp_path, name) == losses(tmp_path, "whole"), name


MEMORY_REPORT = (
    "stage vision, rank 0 of 1: out of memory: ", "engine.zero_stage 2: parameters ", "gradients ", "optimizer ",
    "8 of the rank's 8 rows (engine.micro_batch_size: not set)", "engine.micro_batch_size=4", "engine.zero_stage=3",
)  # fmt: skip


def _allocate_too_much(folder: str) -> None:
    """Exceed memory in a step, and while the model is built."""
    building = Callback()
    building.on_model_built = lambda model: torch.empty(10**15)  # type: ignore[method-assign, assignment]
    step = BeforeStep(2, lambda _: torch.empty(10**15))
    for name, callback, parts in (("step", step, MEMORY_REPORT), ("build", building, ["before the first step"])):
        with pytest.raises(RunFailed) as caught:
            train_short(folder, name, [callback], engine__zero_stage=2)
        assert [part for part in parts if part not in str(caught.value)] == []


def test_out_of_memory_reports_use_and_remedies(tmp_path: Path) -> None:
    run_ranks(_allocate_too_much, 1, str(tmp_path))


def _fill_the_disk(folder: str, disk: str) -> str:
    """Train on a disk that is full from the fifth step on, then again with room; return the first run's message."""
    ballast = Path(disk, "ballast")
    train_short(folder, "whole")
    with pytest.raises(RunFailed) as caught:
        train_short(disk, callbacks=[BeforeStep(4, lambda _: fill_disk(ballast))], data=folder)
    assert committed(Path(disk, "run")) == ["step-00000003"]
    ballast.unlink()
    train_short(disk, data=folder)
    return str(caught.value)


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        (message,) = run_ranks(_fill_the_disk, 1, str(tmp_path), str(disk))
        assert len(losses(disk)) == 2 * STEPS
        assert losses(disk) == losses(tmp_path, "whole")
    parts = (f"{disk}/run/checkpoints/step-00000006", "no space left", "Committed checkpoints are kept")
    assert [part for part in parts if part not in message] == []


OUTAGE = float(os.environ.get("MOME_OUTAGE_SECONDS", "5"))  # minutes in the long version; less in integration
HANG = max(20.0, OUTAGE / 3)  # limit of a step; the long version needs more


def _meet_an_outage(folder: str, output: str, storage: dict[str, Any]) -> None:
    """Train on this rank; request the outage before the step after which the first checkpoint is written."""
    wait = RetryBudget.wait

    def note(self: RetryBudget, error: Exception) -> None:
        with Path(folder, "tried-again").open("a", encoding="utf-8") as file:
            file.write(f"{self.url}\n")
        wait(self, error)

    def ask(_: object) -> None:
        Path(folder, "asked").touch()
        wait_until(Path(folder, "away").exists, "the outage")

    RetryBudget.wait = note  # type: ignore[method-assign]
    limits = {"guards__hang_seconds": HANG, "guards__save_seconds": 900, "cluster__workers": 1}
    train_short(folder, callbacks=[BeforeStep(2, ask)], output=output, storage=storage, **limits)


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_run_survives_an_outage_at_a_checkpoint(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "cache"))
    with FaultProxy(s3.endpoint, seed=1) as proxy:
        settings = {"endpoint_url": proxy.endpoint, "retry_timeout_seconds": max(30.0, 3 * OUTAGE)}
        storage = s3.config.model_copy(update=settings).model_dump()
        (rank,) = start_ranks(_meet_an_outage, 1, str(tmp_path), s3.url("runs"), storage)
        wait_until(lambda: (tmp_path / "asked").exists() or not rank.is_alive(), "the first checkpoint")
        proxy.away(OUTAGE, after=0)
        (tmp_path / "away").touch()
        rank.join(SECONDS + 2 * OUTAGE)
        assert rank.exitcode == 0
    assert "/run/checkpoints/step-00000003." in (tmp_path / "tried-again").read_text(encoding="utf-8")
    plain = Storage(s3.config)
    for name in ("0-vision", "1-pairs"):
        assert plain.exists(s3.url("runs", "run", "stages", name, "COMMIT.json"))
    assert not plain.list(s3.url("runs", "run", "stacks"))
    saved = plain.list(s3.url("runs", "run", "checkpoints"))
    assert any(name.startswith(f"step-{2 * STEPS - 2:08d}.") for name in saved)


class Trouble(Callback):
    """Callback that makes ITM predict "matched" always, the temperature reach its clamp, and rank 1's forward slow."""

    def on_model_built(self, model: Any) -> None:
        with torch.no_grad():
            model.itm_head.classify.bias.copy_(torch.tensor([-50.0, 50.0]))
            for scale in [parameter for name, parameter in model.named_parameters() if "log_scale" in name]:
                scale.fill_(10.0)
        if os.environ["RANK"] == "1":
            model.register_forward_pre_hook(lambda module, arguments: time.sleep(0.2))


def _troubled(folder: str) -> list[str]:
    """Train with `Trouble` and slow data; return the logged alerts."""
    result, lines = ThreadBackend.result, list[str]()
    ThreadBackend.result = lambda self, step: time.sleep(0.1) or result(self, step)  # type: ignore
    logging.getLogger("pipeline.training.metrics").addFilter(lambda record: lines.append(record.getMessage()) or True)
    stages = {"stages.pairs.objectives": {"itc": {}, "itm": {}}, "stages.pairs.global_batch_size": 8}
    train_short(folder, callbacks=[Trouble()], data__streams=8, **stages)
    return lines


def test_alerts_are_tagged_and_logged_and_the_run_continues(tmp_path: Path) -> None:
    first, second = run_ranks(_troubled, 2, str(tmp_path))
    records = journal(tmp_path)
    tags = {r["key"]: r["value"] for r in records if r["kind"] == "tag" and r["stage"] == 1}
    names = ["itm_collapse", "itc_clamp", "data_starvation", "straggler"]
    assert [name for name in names if f"mome.alert.{name}" not in tags] == []
    assert "rank 1 needs" in tags["mome.alert.straggler"]
    since = f"since step {STEPS + 1 + CONSECUTIVE}: image-text matching is right for 100%"
    assert tags["mome.alert.itm_collapse"].startswith(since)
    assert sum("stage pairs: ALERT" in line for line in first) == len(names)
    assert second == [], "rank 0 alone raises alerts"
    assert (records[-1]["kind"], records[-1]["status"]) == ("run_end", "FINISHED")
