"""Contract C5 in an object store: checkpoints are verified, and an older one is used if the newest is not whole."""

from __future__ import annotations

import pytest

from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint import COMMIT, CheckpointStore
from pipeline.training.collectives import Collectives
from tests.support.small_checkpoint import newest_weight, save


@pytest.fixture
def store(s3, collectives: Collectives) -> CheckpointStore:
    return CheckpointStore(Storage(s3.config), s3.url("run"), collectives, CheckpointConfig(keep=2))


def test_newest_is_read_and_all_but_two_are_removed(store: CheckpointStore) -> None:
    first, *others = [save(store, step) for step in (10, 20, 30)]
    assert newest_weight(store) == [30, 31, 32, 33]
    assert not store.storage.exists(first)
    assert all(store.storage.exists(join(url, COMMIT)) for url in others)


def test_uncommitted_and_changed_checkpoints_are_skipped(store: CheckpointStore) -> None:
    *_, last = [save(store, step) for step in (10, 20, 30)]
    store.storage.delete(join(last, COMMIT))
    assert newest_weight(store) == [20, 21, 22, 23]
    file = join(save(store, 40), "rank-00000.safetensors")
    whole = store.storage.read(file)
    store.storage.write(file, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert newest_weight(store) == [20, 21, 22, 23]
