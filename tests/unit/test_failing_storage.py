"""The rig of tests/support/failing_storage.py: tests of saves and commits rely on its faults."""

import pickle
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage, join
from tests.support.failing_storage import FailingStorage, Fault, every_fault


def test_every_fault_is_met_and_raised_with_the_effect_of_its_moment(tmp_path: Path):
    def scenario(storage: Storage, folder: str) -> None:
        storage.write(join(folder, "a"), b"1")
        storage.write_parts(join(folder, "b"), 4, lambda start, stop: b"2222"[start:stop])
        storage.read(join(folder, "a"))
        storage.list(folder)
        storage.delete(folder)

    scenario(clean := FailingStorage(), str(tmp_path / "clean"))
    assert [call.kind for call in clean.calls] == ["write", "write", "read", "list", "delete"]
    faults = list(every_fault(clean.calls))
    assert len(faults) == len(set(faults)) == 3 * (3 + 3 + 1 + 1 + 3)
    for number, fault in enumerate(faults):
        storage = FailingStorage(fault)
        with pytest.raises(StorageError, match="injected fault"):
            scenario(storage, str(tmp_path / str(number)))
        assert storage.num_failed == 1
    for when, remaining, is_written in (("before", "abcd", False), ("halfway", "cd", False), ("after", "", True)):
        folder, part = str(tmp_path / when), mock.Mock(return_value=b"1234")
        for name in "abcd":
            Storage().write(join(folder, "inner", name), b"x")
        with suppress(StorageError):
            FailingStorage(Fault(0, when=when)).delete(folder)
        with suppress(StorageError):
            FailingStorage(Fault(0, "write", when)).write_parts(f"{folder}.x", 4, part)
        assert Storage().list(join(folder, "inner")) == list(remaining)
        assert ((tmp_path / f"{when}.x").exists(), part.called) == (is_written, when != "before")


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
