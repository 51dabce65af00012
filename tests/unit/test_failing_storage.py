"""The rig of tests/support/failing_storage.py: tests of saves and commits rely on its faults."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage, join
from tests.support.failing_storage import FailingStorage, Fault, every_fault


def _scenario(storage: Storage, folder: str) -> None:
    storage.write(join(folder, "a"), b"1")
    storage.write_parts(join(folder, "b"), 4, lambda start, stop: b"2222"[start:stop])
    storage.read(join(folder, "a"))
    storage.list(folder)
    storage.delete(folder)


def test_every_fault_is_met_and_raised(tmp_path: Path):
    clean = FailingStorage()
    _scenario(clean, str(tmp_path / "clean"))
    assert [call.kind for call in clean.calls] == ["write", "write", "read", "list", "delete"]
    faults = list(every_fault(clean.calls))
    assert len(faults) == len(set(faults)) == 3 * (3 + 3 + 1 + 1 + 3)
    for number, fault in enumerate(faults):
        storage = FailingStorage(fault)
        with pytest.raises(StorageError, match="injected fault"):
            _scenario(storage, str(tmp_path / str(number)))
        assert storage.num_failed == 1


@pytest.mark.parametrize(
    ("when", "remaining", "is_written"), [("before", "abcd", False), ("halfway", "cd", False), ("after", "", True)]
)
def test_effects_match_when(tmp_path: Path, when, remaining: str, is_written: bool):
    folder, requested = str(tmp_path / "run"), []

    def part(start: int, stop: int) -> bytes:
        requested.append(start)
        return b"1234"[start:stop]

    for name in "abcd":
        Storage().write(join(folder, "inner", name), b"x")
    with suppress(StorageError):
        FailingStorage(Fault(0, when=when)).delete(folder)
    assert Storage().list(join(folder, "inner")) == list(remaining)
    with suppress(StorageError):
        FailingStorage(Fault(0, "write", when)).write_parts(str(tmp_path / "x"), 4, part)
    assert (tmp_path / "x").exists() is is_written
    assert bool(requested) is (when != "before")


def test_lasting_fault_ends_when_healed_and_copies_fail_alike(tmp_path: Path):
    storage = FailingStorage(Fault(1, "write", lasting=True))
    storage.write(str(tmp_path / "a"), b"")
    for _ in range(2):
        with pytest.raises(StorageError):
            storage.write(str(tmp_path / "b"), b"")
        assert storage.list(str(tmp_path)) == ["a"]
    storage.heal()
    storage.write(str(tmp_path / "b"), b"")
    assert storage.num_failed == 2
    with pytest.raises(StorageError):
        pickle.loads(pickle.dumps(FailingStorage(Fault(0)))).list(str(tmp_path))  # noqa: S301
