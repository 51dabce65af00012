"""Checkpoints of several ranks, committed once every rank's file exists, and those that a finished run has kept."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import CheckpointConfig, StorageConfig
from pipeline.data.storage import PartReader, Storage, join
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, read_manifest
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.checkpoint.weights import load_weights
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment
from tests.support.ranks import exit_codes, run_ranks
from tests.support.short_run import journal, train_short
from tests.support.small_checkpoint import metadata


class FaultyStorage(Storage):
    """A store that calls `trouble` before a rank's file is written, and counts the bytes read of each file."""

    trouble: Callable[[], None] = staticmethod(lambda: None)

    def write_parts(self, url: str, size: int, part: PartReader, create: bool = False) -> bool:
        if url.endswith(".safetensors"):
            self.trouble()
        return super().write_parts(url, size, part, create)

    def read(self, url: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        if stop is not None:
            self.__dict__.setdefault("counts", Counter())[url.rpartition("/")[2]] += stop - start
        return super().read(url, start, stop, etag)


def _store(folder: str, **storage: Any) -> CheckpointStore:
    return CheckpointStore(FaultyStorage(StorageConfig(**storage)), folder, Collectives(), CheckpointConfig())


def _save(store, step: int) -> str:
    """Save one parameter of 3000 elements, sharded over the ranks; element i of step s is i + s."""
    share = 3000 // store.collectives.world_size
    start = share * store.collectives.rank
    weight = torch.arange(start, start + share) + float(step)
    return store.save([Fragment("a", start, {"weight": weight})], metadata(step))


def _latest(folder: str) -> tuple[int, dict[str, int]]:
    """Return the step of the newest checkpoint, whose state must be exact, and the bytes read to verify it."""
    checkpoint, saved = (store := _store(folder)).latest()
    counts = dict(store.storage.counts)
    assert torch.equal(saved.read("a", "weight", 0, 3000), torch.arange(3000.0) + checkpoint.step)
    return checkpoint.step, counts


def _a_slow_rank(folder: str) -> tuple[float, str]:
    store = _store(folder)
    if store.collectives.rank == 1:
        store.storage.trouble = lambda: time.sleep(0.5)
    url = _save(store, 1)
    store.collectives.barrier()  # the trainer's own collectives continue during the write
    store.wait()
    return store.written[0][1], url


def test_rank_0_commits_once_the_slowest_rank_has_written_and_ranks_share_the_verification(tmp_path: Path) -> None:
    """Each rank verifies half of four files and reads only the first block of the others (here the whole file)."""
    (seconds, url), *others = run_ranks(_a_slow_rank, 4, str(tmp_path))
    assert min(seconds, others[0][0]) > 0.45
    manifest = json.loads((Path(url) / MANIFEST).read_text(encoding="utf-8"))
    assert sorted(manifest["files"]) == [f"rank-{rank:05d}.safetensors" for rank in range(4)]
    latest = {world_size: run_ranks(_latest, world_size, str(tmp_path)) for world_size in (1, 2, 3)}
    assert [step for results in latest.values() for step, _ in results] == [1] * 6
    sizes = {path.name: path.stat().st_size for path in Path(url).glob("*.safetensors")}
    for rank, (_, counts) in enumerate(latest[2]):
        for number, (name, size) in enumerate(sorted(sizes.items())):
            assert counts[name] == size * (2 if number % 2 == rank else 1)


def _a_rank_that_writes_nothing(folder: str) -> bool:
    store = _store(folder, retry_timeout_seconds=0.5)
    if store.collectives.rank == 1:
        store.storage.trouble = lambda: time.sleep(8)
        _save(store, 1)
        store.close(0.0)
        return False
    url = _save(store, 1)
    with pytest.raises(TimeoutError, match="not committed: rank 1 wrote nothing"):
        store.wait()
    return store.storage.exists(join(url, COMMIT))


def test_rank_that_writes_nothing_prevents_the_commit(tmp_path: Path) -> None:
    assert run_ranks(_a_rank_that_writes_nothing, 2, str(tmp_path)) == [False, False]


def _save_and_die(folder: str) -> None:
    store = _store(folder)
    _save(store, 1)
    store.wait()
    if store.collectives.rank == 1:
        store.storage.trouble = lambda: os.kill(os.getpid(), signal.SIGKILL)
    _save(store, 2)
    store.close(2.0)


def _resume_and_save(folder: str) -> None:
    """Resume from the newest checkpoint and save the step at which the attempt before died."""
    store = _store(folder)
    checkpoint, _ = store.latest()
    if store.collectives.rank == 0:
        store.clean(checkpoint)
    _save(store, checkpoint.step + 1)
    store.wait()


def test_rank_killed_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    assert exit_codes(_save_and_die, 2, str(tmp_path)) == [0, -signal.SIGKILL]
    (unfinished,) = (tmp_path / "checkpoints").glob("step-00000002.*")
    assert not (unfinished / COMMIT).exists()
    assert [step for step, _ in run_ranks(_latest, 2, str(tmp_path))] == [1, 1]
    run_ranks(_resume_and_save, 2, str(tmp_path))
    assert not unfinished.exists()
    assert run_ranks(_latest, 1, str(tmp_path))[0][0] == 2


def _train(folder: str) -> None:
    stage = {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}, "steps": 12}
    kept = {"every": 2, "keep": 1, "keep_every": 4, "keep_best": {"metric": "train/loss", "mode": "max"}}
    train_short(folder, stages=[stage | {"global_batch_size": 4}], checkpoint=kept, cluster__workers=1)


def test_checkpoints_of_a_run_are_kept_recorded_and_loadable(tmp_path: Path) -> None:
    run_ranks(_train, 1, str(tmp_path))
    values: dict[str, dict[int, float]] = {}  # metric -> step -> value
    for record in journal(tmp_path):
        for name, value in record.get("values", {}).items():
            values.setdefault(name, {})[record["step"]] = value
    losses = values["train/loss"]
    best = max(range(2, 12, 2), key=lambda step: losses[step])
    manifests = [read_manifest(Storage(), str(folder)) for folder in (tmp_path / "run/checkpoints").iterdir()]
    assert {manifest["step"] for manifest in manifests} == {4, 8, 10, best}
    for manifest in manifests:
        assert manifest["metrics"]["train/loss"] == losses[manifest["step"]]
    for name in ("ckpt/stall_s", "ckpt/wait_s", "ckpt/write_s"):
        assert sorted(values[name]) == [2, 4, 6, 8, 10], name
    assert all(waited <= values["ckpt/stall_s"][step] for step, waited in values["ckpt/wait_s"].items())

    # A checkpoint loads like the weights of a stage, so a stage may start from it.
    (folder,) = (tmp_path / "run/checkpoints").glob("step-00000010.*")
    weights, handed_over = (load_weights(Storage(), str(url)) for url in (folder, tmp_path / "run"))
    assert {n: t.shape for n, t in weights.tensors.items()} == {n: t.shape for n, t in handed_over.tensors.items()}
    assert (weights.step, weights.stage, weights.vocabulary) == (10, "vision", handed_over.vocabulary)
    assert weights.config == handed_over.config
    far = [n for n, t in weights.tensors.items() if (t - handed_over.tensors[n]).abs().max() > 0.01]
    assert not far, "two steps from the end, weights are near those of the end"
