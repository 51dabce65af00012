"""Asynchronous saves: a checkpoint holds the state at the call, whatever the store and later steps do."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import StorageError
from pipeline.data.storage import PartReader, Storage
from pipeline.training.checkpoint.committed import COMMIT
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.engine import Fragment
from tests.support.small_checkpoint import metadata, store_of


class GatedStorage(Storage):
    """Storage whose writes of rank files wait for `gate`, which is open at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None

    def write_parts(self, url: str, size: int, part: PartReader, create: bool = False) -> bool:
        if url.endswith(".safetensors"):
            assert self.gate.wait(30)
            if self.fault is not None:
                raise self.fault
        return super().write_parts(url, size, part, create)


@pytest.fixture
def storage() -> GatedStorage:
    return GatedStorage()


@pytest.fixture
def store(tmp_path: Path, storage: GatedStorage) -> Iterator[CheckpointStore]:
    made = store_of(storage, str(tmp_path), keep=9)
    yield made
    storage.gate.set()
    made.close()


def state() -> list[Fragment]:
    """Build a parameter in two fragments with its moments, and a frozen one in half precision."""
    generator, kinds = torch.Generator().manual_seed(1), ("weight", "exp_avg", "exp_avg_sq")
    fragments = [
        Fragment("a", start, {kind: torch.randn(size, generator=generator) for kind in kinds})
        for start, size in ((0, 7), (7, 1000))
    ]
    return [*fragments, Fragment("b", 0, {"weight": torch.randn(5, generator=generator).bfloat16()})]


def train(fragments: list[Fragment]) -> list[Fragment]:
    """Overwrite the state in place, as the next step does."""
    for value in (value for fragment in fragments for value in fragment.values.values()):
        value.add_(1)
    return fragments


def assert_restored(store: CheckpointStore, expected: list[Fragment]) -> None:
    _, saved = store.latest() or pytest.fail("nothing found")
    for fragment in expected:
        for kind, value in fragment.values.items():
            read = saved.read(fragment.name, kind, fragment.start, fragment.start + len(value))
            assert torch.equal(read, value.float()), (fragment.name, kind)


def end_of_the_save(storage: GatedStorage) -> None:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    storage.gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_save_holds_the_state_at_the_call(store: CheckpointStore, storage: GatedStorage) -> None:
    names: list[list[str]] = []
    storage.gate.clear()
    fragments = state()
    url = store.save(fragments, metadata(1), lambda: names.append(storage.list(url)))
    assert not storage.exists(url), "the save waited for the store"
    train(fragments)
    assert store.latest() is None
    storage.gate.set()
    store.wait()
    assert names == [["rank-00000.safetensors"]], "the journal is committed between files and commit"
    assert COMMIT in storage.list(url)
    assert_restored(store, state())


def test_second_save_waits_for_the_first_and_both_are_correct(store: CheckpointStore, storage: GatedStorage) -> None:
    store.host_copy.reserve(state())
    reserved, fragments = store.host_copy._buffer.data_ptr(), state()
    storage.gate.clear()
    store.save(fragments, metadata(1))
    threading.Timer(0.3, storage.gate.set).start()
    url = store.save(train(fragments), metadata(2))
    assert store.waited > 0.2
    train(fragments)
    store.wait()
    assert [step for step, _ in store.written] == [1, 2]
    assert_restored(store, train(state()))
    storage.delete(url)
    assert_restored(store, state())
    assert store.host_copy._buffer.data_ptr() == reserved, "both saves used the reserved host memory"


def test_failed_save_raises_at_the_next_step_and_may_be_repeated(store: CheckpointStore, storage: GatedStorage) -> None:
    def fail() -> None:
        raise StorageError("the journal could not be written")

    store.save(state(), metadata(1), fail)
    with pytest.raises(StorageError, match="the journal"):
        store.wait()
    storage.fault = StorageError("no space left")
    store.save(state(), metadata(1))
    with pytest.raises(StorageError, match="no space left"):
        store.wait()
    assert store.latest() is None
    storage.gate.clear()
    store.save(state(), metadata(2))
    end_of_the_save(storage)
    with pytest.raises(StorageError, match="no space left"):
        store.check()
    storage.fault = None
    store.save(state(), metadata(3))
    store.wait()
    store.check()
    assert_restored(store, state())


def test_close_abandons_a_save_that_does_not_end(store: CheckpointStore, storage: GatedStorage, caplog) -> None:
    storage.gate.clear()
    url = store.save(state(), metadata(1))
    store.close(seconds=0.1)
    assert "abandoned" in caplog.text
    end_of_the_save(storage)
    assert storage.list(url) == []
