"""Contract C5 when storage calls fail, once or permanently, and when two attempts interleave their calls.

After each failure committed data restores bit-equal, nothing incomplete is visible, and once the store is available
again, the same attempt or the next one succeeds. In every interleaving of an old attempt and a new one that claims the
run, and wherever both are killed, a complete committed checkpoint exists, everything committed is complete, and the old
attempt neither deletes nor overwrites data of the new one.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import StorageError, Superseded
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, is_committed, read_manifest, read_verified
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.checkpoint.weights import WEIGHTS, save_weights
from pipeline.training.ownership import Ownership
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds
from tests.support.interleaving import Disk, explore
from tests.support.small_checkpoint import newest_weight, resume, save, store_of

Scenario = Callable[[Storage, str], object]


@pytest.fixture(autouse=True)
def _quiet_and_fast(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.ERROR, "pipeline")
    monkeypatch.setattr("os.fsync", lambda _: None)


def claimed(storage: Storage, folder: str) -> CheckpointStore:
    return store_of(storage, folder, Ownership.take(storage, folder))


def begin(_: Storage, folder: str) -> Ownership:
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


def read_committed(url: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = read_manifest(Storage(), url)
    records = manifest["files"].items()
    return manifest, {name: read_verified(Storage(), url, name, record) for name, record in records}


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
            read_committed(url)
        storage.heal()
        hand_over(storage, folder, 2.0)
        weights = safetensors.torch.load(read_committed(url)[1][WEIGHTS])
        assert weights["a"].tolist() == [1.0 if was_committed else 2.0] * 9
        assert was_committed or len(Storage().list(url)) == 4, "something was left"

    assert_all_failures(hand_over, lambda storage, folder: None, tmp_path, check)


# ---- two attempts


RUN, STAGE = "memory://run", "memory://run/stages/0-s"
OLD, NEW = 0.25, 0.5  # added to the step in the weights of each attempt


def hand_over(storage: Storage, ownership: Ownership, mark: float) -> None:
    ownership.check()
    if not save_weights(storage, STAGE, {"a": torch.tensor([mark])}, ["a"], {"stage": "s"}, ownership=ownership):
        ownership.check()


def committed(disk: Disk) -> dict[str, bool]:
    """Return whether each committed folder is complete."""
    complete = {}
    for folder in [name.removesuffix(f"/{COMMIT}") for name in disk.objects if name.endswith(f"/{COMMIT}")]:
        files = {MANIFEST: json.loads(disk.objects[f"{folder}/{COMMIT}"])["manifest"]}
        manifest = disk.objects.get(f"{folder}/{files[MANIFEST].get('file', MANIFEST)}", b"{}")
        files |= json.loads(manifest).get("files", {})
        data = {name: disk.objects.get(f"{folder}/{record.get('file', name)}", b"") for name, record in files.items()}
        complete[folder] = all(hashlib.sha256(data[n]).hexdigest() == record["sha256"] for n, record in files.items())
    return complete


@pytest.mark.parametrize(
    ("keep", "old_hands_over", "new_hands_over", "max_switches"),
    [(1, False, False, 2), (2, False, False, 2), (1, True, True, None), (1, False, True, None)],
)
def test_no_interleaving_of_two_attempts_loses_or_damages_data(
    keep: int, old_hands_over: bool, new_hands_over: bool, max_switches: int | None
) -> None:
    """Limit the longest scenarios to a few switches between the attempts by default (see MOME_FUZZ)."""
    first: list[Ownership] = []

    def begin(storage: Storage) -> None:
        first[:] = [Ownership.take(storage, RUN)]
        save(store_of(storage, RUN, first[0], keep), 100, OLD)

    def old(storage: Storage) -> None:
        ownership = Ownership(storage, RUN, first[0].claim, first[0].start)
        with suppress(Superseded, StorageError):  # both end the old attempt
            if old_hands_over:
                hand_over(storage, ownership, OLD)
            else:
                save(store_of(storage, RUN, ownership, keep), 110, OLD)

    def start_anew(storage: Storage) -> None:
        ownership = Ownership.take(storage, RUN, claim="of the new launcher")
        if is_committed(storage, STAGE):
            return
        store = store_of(storage, RUN, ownership, keep)
        checkpoint, saved = resume(store) or pytest.fail("the new attempt found no checkpoint")
        assert saved.read("a.weight", "weight", 0, 1).tolist() in ([checkpoint.step + OLD], [checkpoint.step + NEW])
        if new_hands_over:
            hand_over(storage, ownership, NEW)
        else:
            save(store, 110, NEW)

    def new(storage: Storage) -> None:
        for _ in range(3):  # a launcher restarts failed ranks
            with suppress(StorageError):
                return start_anew(storage)
        raise AssertionError("the new attempt failed three times")

    def check(disk: Disk) -> None:
        complete = committed(disk)
        assert all(complete.values()), f"committed and not whole: {complete}"
        assert any("/checkpoints/" in folder for folder in complete), "no checkpoint is left"

    def check_end(disk: Disk) -> None:
        if old_hands_over or new_hands_over:
            assert STAGE in committed(disk)

    max_switches = None if fuzz_rounds(1) > 1 else max_switches
    interleavings, states, runs = explore({"old": old, "new": new}, begin, check, check_end, max_switches)
    print(f"keep {keep}: {interleavings:.3g} interleavings, {states} states, {runs} runs")
    assert interleavings > 500
