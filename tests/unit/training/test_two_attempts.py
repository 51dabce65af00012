"""Two attempts on one run, in every interleaving of their storage calls, never lose or corrupt a checkpoint.

The old attempt owns the run and saves or hands over. At any moment the new one claims the run, resumes, and does so.
For every order, and wherever both are killed, a complete committed checkpoint exists, everything committed is complete,
and the old attempt neither deletes nor overwrites data of the new one.
"""

import hashlib
import json
import logging
from contextlib import suppress

import pytest
import torch

from pipeline.config.errors import StorageError, Superseded
from pipeline.data.storage import Storage
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, is_committed
from pipeline.training.checkpoint.weights import save_weights
from pipeline.training.ownership import Ownership
from tests.support.fuzz import fuzz_rounds
from tests.support.interleaving import Disk, explore
from tests.support.small_checkpoint import resume, save, store_of

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
    keep: int, old_hands_over: bool, new_hands_over: bool, max_switches: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Limit the longest scenarios to a few switches between the attempts by default (see MOME_FUZZ)."""
    caplog.set_level(logging.ERROR, "pipeline")
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
    explored = explore({"old": old, "new": new}, begin, check, check_end, max_switches)
    print(f"keep {keep}: {explored.interleavings:.3g} interleavings, {explored.states} states, {explored.runs} runs")
    assert explored.interleavings > 500
