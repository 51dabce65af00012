"""Contract C5 when a storage call fails: each call of a save, restore or hand-over, once or permanently.

In all cases committed data restores bit-equal, nothing incomplete is visible, and once the store is available again,
the same attempt or the next one succeeds.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import is_committed, read_committed
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.checkpoint.weights import WEIGHTS, save_weights
from pipeline.training.ownership import Ownership
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.small_checkpoint import newest_weight, resume, save, store_of

Scenario = Callable[[Storage, str], object]


@pytest.fixture(autouse=True)
def _quiet_and_fast(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.ERROR, "pipeline")
    monkeypatch.setattr("os.fsync", lambda _: None)


def claimed(storage: Storage, folder: str) -> CheckpointStore:
    return store_of(storage, folder, Ownership.take(storage, folder))


def begin(_: Storage, folder: str) -> Ownership:
    """Write a run with checkpoints of steps 10 and 20 and an unfinished save by an attempt at step 20."""
    first = claimed(Storage(), folder)
    for step in (10, 20):
        save(first, step)
    Storage().write(join(first.url, "step-00000020.0001-0badcafe-1", "rank-00000.safetensors"), b"half")
    return Ownership.take(Storage(), folder)


def committed_steps(folder: str) -> list[int]:
    """Return the steps of the run's committed checkpoints, after verifying each."""
    url = join(folder, "checkpoints")
    folders = [join(url, name) for name in Storage().list(url)]
    return sorted(read_committed(Storage(), name)[0]["step"] for name in folders if is_committed(Storage(), name))


def assert_all_failures(
    scenario: Scenario, start: Scenario, folder: Path, check: Callable[[FailingStorage, str], None]
) -> None:
    """Let each storage call of the scenario fail in each way, and check the store after each."""
    clean = FailingStorage()
    start(Storage(), str(folder / "clean"))
    scenario(clean, str(folder / "clean"))
    for number, fault in enumerate(every_fault(clean.calls)):
        storage, run = FailingStorage(fault), str(folder / str(number))
        start(Storage(), run)
        with suppress(StorageError):
            scenario(storage, run)
        assert storage.num_failed, f"{fault} was not met"
        try:
            check(storage, run)
        except BaseException as error:
            error.add_note(f"after {fault}, call {clean.calls[fault.number] if fault.kind is None else fault.kind}")
            raise


def test_failed_save_keeps_committed_checkpoints(tmp_path: Path) -> None:
    owners: dict[str, Ownership] = {}

    def owned(storage: Storage, folder: str) -> CheckpointStore:
        return store_of(storage, folder, Ownership(storage, folder, owners[folder].claim, owners[folder].start))

    def check(storage: FailingStorage, folder: str) -> None:
        steps = committed_steps(folder)
        assert 20 in steps, "what was committed is gone"
        assert newest_weight(owned(Storage(), folder)) == [steps[-1] + number for number in range(4)]
        storage.heal()
        save(owned(storage, folder), 40)
        assert newest_weight(claimed(Storage(), folder)) == [40, 41, 42, 43]
        successor = claimed(Storage(), folder)
        assert resume(successor) is not None
        for step in (50, 60, 70):
            save(successor, step)
        assert committed_steps(folder) == [60, 70]
        assert len(Storage().list(successor.url)) == 2, "something was left"

    def start(storage: Storage, folder: str) -> None:
        owners[folder] = begin(storage, folder)

    assert_all_failures(lambda storage, folder: save(owned(storage, folder), 30), start, tmp_path, check)


def test_failed_restore_succeeds_when_repeated(tmp_path: Path) -> None:
    def restore(storage: Storage, folder: str) -> None:
        store = claimed(storage, folder)
        assert newest_weight(store) == [20, 21, 22, 23], "a fault of the store was taken for damage"
        resume(store)

    def check(storage: FailingStorage, folder: str) -> None:
        assert committed_steps(folder) == [10, 20]
        storage.heal()
        restore(storage, folder)

    assert_all_failures(restore, begin, tmp_path, check)


def test_failed_hand_over_is_atomic_and_can_be_repeated(tmp_path: Path) -> None:
    def hand_over(storage: Storage, folder: str, value: float = 1.0) -> None:
        owner, url = Ownership.take(storage, folder), join(folder, "stages", "0-s")
        if not is_committed(storage, url):
            save_weights(storage, url, {"a": torch.full((9,), value)}, ["a"], {}, ownership=owner)

    def check(storage: FailingStorage, folder: str) -> None:
        url = join(folder, "stages", "0-s")
        if was_committed := is_committed(Storage(), url):
            read_committed(Storage(), url)
        storage.heal()
        hand_over(storage, folder, 2.0)
        weights = safetensors.torch.load(read_committed(Storage(), url)[1][WEIGHTS])
        assert weights["a"].tolist() == [1.0 if was_committed else 2.0] * 9
        assert was_committed or len(Storage().list(url)) == 4, "something was left"

    assert_all_failures(hand_over, lambda storage, folder: None, tmp_path, check)
