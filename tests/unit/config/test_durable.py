"""Durable writes: data, file names and new folders are synced in an order that survives a power loss."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.config.durable import atomic_write, is_temporary, sync_folder, write_durably
from pipeline.data.storage import Storage


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record ("sync", path) and ("rename", path) events in order."""
    events: list[tuple[str, str]] = []
    fsync = os.fsync

    def recorded_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded(rename: Callable[[str, str], None]) -> Callable[[str, str], None]:
        def record_and_rename(source: str, target: str) -> None:
            events.append(("rename", os.fspath(target)))
            rename(source, target)

        return record_and_rename

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    return events


WRITES = {
    "write_durably": lambda path: write_durably(path, b"x"),
    "write": lambda path: Storage().write(path, b"x"),
    "write_parts": lambda path: Storage().write_parts(path, 1, lambda start, stop: b"x"),
    "create": lambda path: Storage().create(path, b"x"),
    "upload": lambda path: Storage().upload("/proc/self/cmdline", path),
}


@pytest.mark.parametrize("name", WRITES)
def test_data_name_and_new_folders_are_synced_in_order(tmp_path: Path, log: list[tuple[str, str]], name: str):
    path = str(tmp_path / "new" / "deep" / "file")
    WRITES[name](path)
    folders = [str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "deep")]
    assert log[:2] == [("sync", folders[0]), ("sync", folders[1])]  # they contain the names of the new folders
    assert log[2][0] == "sync"
    assert is_temporary(Path(log[2][1]).name)
    assert log[3:] == [("rename", path), ("sync", folders[2])]
    log.clear()
    if name != "create":
        WRITES[name](path)
        assert [kind for kind, _ in log] == ["sync", "rename", "sync"]


def test_failed_write_keeps_the_old_content(tmp_path: Path):
    write_durably(tmp_path / "file", b"old")
    with pytest.raises(TypeError), atomic_write(tmp_path / "file") as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_folder_sync_fails_on_disk_errors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Some file systems do not support syncing a folder."""

    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output") if code == errno.EIO else nullcontext():
        sync_folder(tmp_path)


def test_folder_may_be_created_by_another_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks write into one new checkpoint folder at the same time."""
    isdir = os.path.isdir

    def made_behind_the_look(path: str) -> bool:
        found = isdir(path)
        Path(tmp_path / "new" / "step").mkdir(parents=True, exist_ok=True)
        return found

    monkeypatch.setattr(os.path, "isdir", made_behind_the_look)
    write_durably(tmp_path / "new" / "step" / "rank-00000", b"x")
    assert (tmp_path / "new" / "step" / "rank-00000").read_bytes() == b"x"


def test_concurrent_writers_may_create_the_same_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            paths = [tmp_path / f"{number}" / "a" / "b" / str(writer) for writer in range(8)]
            list(pool.map(lambda path: write_durably(path, b"x"), paths))
            assert all(path.read_bytes() == b"x" for path in paths)
