"""Contract C5 when storage calls fail, once or permanently, and when two attempts interleave their calls.

After each failure committed data restores bit-equal, nothing incomplete is visible, and once the store is available
again, the same attempt or the next one succeeds. Wherever an old attempt and a new one that claims the run are killed,
everything committed is complete, and the old one has neither deleted nor overwritten data of the new one.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import StorageError, Superseded
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import COMMIT, is_committed, read_manifest, read_verified
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.checkpoint.weights import WEIGHTS, save_weights
from pipeline.training.ownership import Ownership
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds
from tests.support.interleaving import Disk, TurnStorage, explore
from tests.support.small_checkpoint import newest_weight, resume, save, store_of


@pytest.fixture(autouse=True)
def _quiet_and_fast(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.ERROR, "pipeline")
    monkeypatch.setattr("os.fsync", lambda _: None)


def claimed(storage: Storage, folder: str) -> CheckpointStore:
    return store_of(storage, folder, Ownership.take(storage, folder))


def begin(folder: str) -> Ownership:
    """Write a run with checkpoints of steps 10 and 20 and an unfinished, older save by an attempt at step 20."""
    first = claimed(Storage(), folder)
    for step in (10, 20):
        save(first, step)
    Storage().write(join(first.url, "step-00000020.0001-00000000-1", "rank-00000.safetensors"), b"half")
    return Ownership.take(Storage(), folder)


def committed_steps(folder: str) -> list[int]:
    """Return the steps of the run's committed checkpoints, after verifying each."""
    url = join(folder, "checkpoints")
    folders = [join(url, name) for name in Storage().list(url)]
    return sorted(read_committed(name)[0]["step"] for name in folders if is_committed(Storage(), name))


def read_committed(url: str, storage: Storage = Storage()) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = read_manifest(storage, url)
    records = manifest["files"].items()
    return manifest, {name: read_verified(storage, url, name, record) for name, record in records}


def assert_all_failures(scenario: Any, start: Callable[[str], Ownership], folder: Path, check: Any) -> None:
    """Let each call of `scenario(storage, owner)` fail in each way; call `check(storage, owner)` after each."""
    scenario(clean := FailingStorage(), start(str(folder / "clean")))
    for number, fault in enumerate(every_fault(clean.calls)):
        storage, owner = FailingStorage(fault), start(str(folder / str(number)))
        with suppress(StorageError):
            scenario(storage, owner)
        assert storage.num_failed, f"{fault} was not met"
        try:
            check(storage, owner)
        except BaseException as error:
            error.add_note(f"after {fault}, call {clean.calls[fault.number] if fault.kind is None else fault.kind}")
            raise


def test_failed_save_keeps_committed_checkpoints(tmp_path: Path) -> None:
    def owned(storage: Storage, owner: Ownership) -> CheckpointStore:
        return store_of(storage, owner.folder, replace(owner, storage=storage))

    def check(storage: FailingStorage, owner: Ownership) -> None:
        steps = committed_steps(owner.folder)
        assert 20 in steps, "what was committed is gone"
        assert newest_weight(owned(Storage(), owner)) == [steps[-1] + number for number in range(4)]
        storage.heal()
        save(owned(storage, owner), 40)
        assert newest_weight(claimed(Storage(), owner.folder)) == [40, 41, 42, 43]
        successor = claimed(Storage(), owner.folder)
        assert resume(successor) is not None
        for step in (50, 60, 70):
            save(successor, step)
        assert committed_steps(owner.folder) == [60, 70]
        assert len(Storage().list(successor.url)) == 2, "something was left"

    assert_all_failures(lambda storage, owner: save(owned(storage, owner), 30), begin, tmp_path, check)


def test_failed_restore_succeeds_when_repeated(tmp_path: Path) -> None:
    def restore(storage: Storage, owner: Ownership) -> None:
        store = claimed(storage, owner.folder)
        assert newest_weight(store) == [20, 21, 22, 23], "a fault of the store was taken for damage"
        resume(store)

    def check(storage: FailingStorage, owner: Ownership) -> None:
        assert committed_steps(owner.folder) == [10, 20]
        storage.heal()
        restore(storage, owner)

    assert_all_failures(restore, begin, tmp_path, check)


def test_failed_hand_over_is_atomic_and_can_be_repeated(tmp_path: Path) -> None:
    def hand_over(storage: Storage, run: Ownership, value: float = 1.0) -> None:
        owner, url = Ownership.take(storage, run.folder), join(run.folder, "stages", "0-s")
        if not is_committed(storage, url):
            save_weights(storage, url, {"a": torch.full((9,), value)}, ["a"], {}, ownership=owner)

    def check(storage: FailingStorage, run: Ownership) -> None:
        url = join(run.folder, "stages", "0-s")
        if was_committed := is_committed(Storage(), url):
            read_committed(url)
        storage.heal()
        hand_over(storage, run, 2.0)
        weights = safetensors.torch.load(read_committed(url)[1][WEIGHTS])
        assert weights["a"].tolist() == [1.0 if was_committed else 2.0] * 9
        assert was_committed or len(Storage().list(url)) == 4, "something was left"

    assert_all_failures(hand_over, lambda folder: Ownership(Storage(), folder, "not begun"), tmp_path, check)


# ---- two attempts
RUN, STAGE = "memory://run", "memory://run/stages/0-s"
OLD, NEW = 0.25, 0.5  # added to the step in the weights of each attempt


def write(store: CheckpointStore, owner: Ownership, mark: float, hands_over: bool) -> None:
    """Save a checkpoint, or hand over the stage's weights."""
    if not hands_over:
        save(store, 110, mark)
        return
    owner.check()
    if not save_weights(store.storage, STAGE, {"a": torch.tensor([mark])}, ["a"], {"stage": "s"}, ownership=owner):
        owner.check()


def committed(disk: Disk) -> list[str]:
    """Return the committed folders, after verifying each."""
    folders = [name.removesuffix(f"/{COMMIT}") for name in disk.objects if name.endswith(f"/{COMMIT}")]
    for folder in folders:
        read_committed(folder, TurnStorage(disk))
    return folders


@pytest.mark.parametrize(
    ("keep", "old_hands_over", "new_hands_over", "max_switches"),
    [(1, False, False, 2), (2, False, False, 2), (1, True, True, None), (1, False, True, None)],
)
def test_no_interleaving_of_two_attempts_loses_data(keep, old_hands_over, new_hands_over, max_switches) -> None:
    """Limit the longest scenarios to a few switches between the attempts by default (see MOME_FUZZ)."""
    first: list[Ownership] = []

    def begin(storage: Storage) -> None:
        first[:] = [Ownership.take(storage, RUN)]
        save(store_of(storage, RUN, first[0], keep), 100, OLD)

    def old(storage: Storage) -> None:
        owner = replace(first[0], storage=storage)
        with suppress(Superseded, StorageError):  # both end the old attempt
            write(store_of(storage, RUN, owner, keep), owner, OLD, old_hands_over)

    def start_anew(storage: Storage) -> None:
        owner = Ownership.take(storage, RUN, claim="of the new launcher")
        if is_committed(storage, STAGE):
            return
        store = store_of(storage, RUN, owner, keep)
        checkpoint, saved = resume(store) or pytest.fail("the new attempt found no checkpoint")
        assert saved.read("a.weight", "weight", 0, 1).tolist() in ([checkpoint.step + OLD], [checkpoint.step + NEW])
        write(store, owner, NEW, new_hands_over)

    def new(storage: Storage) -> None:
        for _ in range(3):  # a launcher restarts failed ranks
            with suppress(StorageError):
                return start_anew(storage)
        raise AssertionError("the new attempt failed three times")

    def check(disk: Disk) -> None:
        assert any("/checkpoints/" in folder for folder in committed(disk)), "no checkpoint is left"

    def check_end(disk: Disk) -> None:
        assert STAGE in committed(disk) or not (old_hands_over or new_hands_over)

    max_switches = None if fuzz_rounds(1) > 1 else max_switches
    interleavings, states, runs = explore({"old": old, "new": new}, begin, check, check_end, max_switches)
    print(f"keep {keep}: {interleavings:.3g} interleavings, {states} states, {runs} runs")
    assert interleavings > 500
