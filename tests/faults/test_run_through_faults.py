"""Killed workers, an outage at a checkpoint and a faulty network change neither losses (C4) nor batches (C1, C7)."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import validate
from pipeline.config.schema import StorageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import fingerprint
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join
from pipeline.data.storage.retry import RetryBudget
from pipeline.objectives import batch_groups
from tests.support import short_run
from tests.support.fault_proxy import FaultProxy
from tests.support.journals import assert_tracked_once
from tests.support.ranks import SECONDS, start_ranks
from tests.support.ray_nodes import wait_until
from tests.support.short_run import BeforeStep, train_short
from tests.support.train_process import STAGES, TrainProcess

STEPS = 12
OUTAGE = float(os.environ.get("MOME_OUTAGE_SECONDS", "5"))  # minutes in the long version; less in integration
HANG = max(20.0, OUTAGE / 3)  # limit of a step; the long version needs more


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rank_killed_in_every_stage_changes_no_loss(tmp_path: Path) -> None:
    """MLflow has one run with one child per stage and each step once."""
    whole = TrainProcess(tmp_path, "whole", STEPS).start().finish()
    killed, kills = TrainProcess(tmp_path, "killed", STEPS).start(), 0
    while kills < len(STAGES) and killed.running():
        if kills * STEPS + 6 <= killed.step() < (kills + 1) * STEPS and (ranks := killed.ranks()):
            ranks[kills % len(ranks)].send_signal(signal.SIGKILL)
            kills += 1
        time.sleep(0.02)
    killed.finish()
    assert kills == len(STAGES)
    assert len(whole.losses()) == len(STAGES) * STEPS
    assert killed.losses() == whole.losses()
    assert killed.restart_causes() == ["failed"] * kills
    assert_tracked_once(killed, tmp_path, attempts=kills + 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_process_killed_twice_is_one_mlflow_run(tmp_path: Path) -> None:
    """Without Ray, a user restarts the same command."""
    run = TrainProcess(tmp_path, "killed", 8)
    for step in (5, 12):
        run.start_alone()
        wait_until(lambda: run.step() >= step or not run.running(), f"step {step}")  # noqa: B023
        run.kill()
    run.start_alone().finish()
    assert_tracked_once(run, tmp_path, attempts=3)


def _train(folder: str, output: str, storage: dict[str, Any]) -> None:
    """Train on this rank; request the outage before the step after which the first checkpoint is written."""
    wait = RetryBudget.wait

    def note(self: RetryBudget, error: Exception) -> None:
        with Path(folder, "tried-again").open("a", encoding="utf-8") as file:
            file.write(f"{self.url}\n")
        wait(self, error)

    def ask(_: object) -> None:
        Path(folder, "asked").touch()
        while not Path(folder, "away").exists():
            time.sleep(0.02)

    RetryBudget.wait = note  # type: ignore[method-assign]
    limits = {"guards__hang_seconds": HANG, "guards__save_seconds": 900, "cluster__workers": 1}
    train_short(folder, callbacks=[BeforeStep(2, ask)], output=output, storage=storage, **limits)


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_run_survives_an_outage_at_a_checkpoint(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "cache"))
    with FaultProxy(s3.endpoint, seed=1) as proxy:
        settings = {"endpoint_url": proxy.endpoint, "retry_timeout_seconds": max(30.0, 3 * OUTAGE)}
        storage = s3.config.model_copy(update=settings).model_dump()
        (rank,) = start_ranks(_train, 1, str(tmp_path), s3.url("runs"), storage)
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
    assert any(name.startswith(f"step-{2 * short_run.STEPS - 2:08d}.") for name in saved)


def digest(shards: str, storage: StorageConfig, tokenizer: Tokenizer, steps: range) -> str:
    """Return the fingerprint of the batches that a run reads from the shards."""
    stage = {"name": "pairs", "sources": {"pairs": 1.0}, "steps": 50, "global_batch_size": 20, "max_text_length": 12}
    values = {
        "name": "test",
        "storage": storage.model_dump(),
        "model": {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4},
        "sources": {"pairs": {"shards": shards}},
        "data": {"streams": 4, "shuffle_window": 2},
        "stages": [stage | {"objectives": {"itc": {}, "mlm": {}}}],
    }
    config = validate(values, "test")
    groups = batch_groups(config, config.stages[0])
    return fingerprint(config, config.stages[0], groups, Storage(config.storage), tokenizer, steps)


@pytest.mark.parametrize(
    ("shards", "faults", "outage"),
    [
        (80, {"unavailable": 0.02, "cut": 0.01, "latency": 0.02}, 0.0),
        (40, {"unavailable": 0.2, "cut": 0.1, "short": 0.1, "lost": 0.05}, 0.0),
        (40, {"latency": 0.02}, OUTAGE),
    ],
    ids=["bar", "heavy", "outage"],
)
def test_stream_over_a_faulty_network_equals_undisturbed(
    s3, make_pairs, shards: int, faults: dict[str, float], outage: float
):
    folder, url = make_pairs("pairs", [2] * shards), s3.url("pairs")
    index_shards(Storage(), folder)
    with ThreadPoolExecutor(8) as pool:
        names, plain = sorted(os.listdir(folder)), Storage(s3.config)
        list(pool.map(lambda name: plain.upload(Path(folder, name), join(url, name)), names))
    captions = [f"picture {n} shows a thing in way {way}" for n in range(2 * shards) for way in "abc"]
    tokenizer, steps = Tokenizer.train(captions, 200), range(shards // 10)
    with FaultProxy(s3.endpoint, seed=1, **faults) as proxy:
        settings = {"endpoint_url": proxy.endpoint, "retry_timeout_seconds": max(20.0, 2 * outage)}
        if outage:
            proxy.away(outage, after=30)
        remote = digest(url, s3.config.model_copy(update=settings), tokenizer, steps)
    assert remote == digest(folder, StorageConfig(), tokenizer, steps)
    assert bool(outage) == bool(proxy.injected["away"])
    assert outage or sum(proxy.injected.values()) > 0, "choose another seed: nothing went wrong"
