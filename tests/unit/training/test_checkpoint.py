"""Contract C5: only complete checkpoints are read; a damaged one is reported, and the one before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage
from pipeline.training.checkpoint import COMMIT, MANIFEST, CheckpointStore, read_committed
from pipeline.training.collectives import Collectives
from pipeline.training.engine import Fragment


@pytest.fixture(scope="module")
def collectives() -> Iterator[Collectives]:
    alone = Collectives()
    yield alone
    alone.close()


@pytest.fixture
def store(tmp_path: Path, collectives: Collectives) -> CheckpointStore:
    return CheckpointStore(Storage(), str(tmp_path), collectives, CheckpointConfig(keep=2))


def save(store: CheckpointStore, step: int) -> Path:
    metadata = {"step": step, "stage": "s", "stage_step": step, "plan_digest": "p", "zero_stage": 2, "data_counts": {}}
    fragments = [
        Fragment("a.weight", 0, {"weight": torch.arange(4.0) + step}),
        Fragment("a.weight", 4, {"weight": torch.arange(4.0, 6.0) + step}),
    ]
    url = store.save(fragments, metadata)
    store.wait()
    return Path(url)


def test_any_range_of_a_parameter_reads_as_it_was_written(store: CheckpointStore) -> None:
    save(store, 10)
    _, saved = store.latest() or pytest.fail("nothing found")
    assert saved.read("a.weight", "weight", 0, 6).tolist() == [10, 11, 12, 13, 14, 15]
    assert saved.read("a.weight", "weight", 3, 5).tolist() == [13, 14]


def test_incomplete_parameter_is_rejected_by_name(store: CheckpointStore) -> None:
    save(store, 10)
    _, saved = store.latest() or pytest.fail("nothing found")
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        saved.read("b.weight", "weight", 0, 2)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(bytes(data))


def lose_a_file(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()


def lose_the_commit(folder: Path) -> None:
    (folder / COMMIT).unlink()


def cut_a_file(folder: Path) -> None:
    data = (folder / "rank-00000.safetensors").read_bytes()
    (folder / "rank-00000.safetensors").write_bytes(data[: len(data) // 2])


def change_the_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text.replace('"step": 20', '"step": 21'), encoding="utf-8")


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file, lose_the_commit, cut_a_file, change_the_manifest])
def test_damaged_checkpoint_is_skipped_for_the_one_before(store: CheckpointStore, damage) -> None:
    save(store, 10)
    damage(save(store, 20))
    checkpoint, _ = store.latest() or pytest.fail("nothing found")
    assert checkpoint.step == 10


def test_damage_is_reported_by_file(store: CheckpointStore) -> None:
    folder = save(store, 10)
    flip_a_byte(folder)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is damaged"):
        read_committed(Storage(), str(folder))


def test_only_the_newest_checkpoints_are_kept(store: CheckpointStore) -> None:
    for step in (10, 20, 30):
        save(store, step)
    kept = sorted(path.name.partition(".")[0] for path in Path(store.url).iterdir())
    assert kept == ["step-00000020", "step-00000030"]


def test_an_empty_run_has_no_checkpoint(store: CheckpointStore) -> None:
    assert store.latest() is None
