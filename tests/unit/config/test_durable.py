"""Durable writes survive a power loss; background calls return their result, raise their error, or time out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.config.background import in_background, within
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
    "create": lambda path: Storage().write(path, b"x", create=True),
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


def test_folder_may_be_created_by_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            paths = [tmp_path / f"{number}" / "a" / "b" / str(writer) for writer in range(8)]
            list(pool.map(lambda path: write_durably(path, b"x"), paths))
            assert all(path.read_bytes() == b"x" for path in paths)
    isdir = os.path.isdir

    def created_after_the_check(path: str) -> bool:
        existed = isdir(path)
        (tmp_path / "new" / "step").mkdir(parents=True, exist_ok=True)
        return existed

    monkeypatch.setattr(os.path, "isdir", created_after_the_check)
    write_durably(tmp_path / "new" / "step" / "rank-00000", b"x")
    assert (tmp_path / "new" / "step" / "rank-00000").read_bytes() == b"x"


def test_background_call_returns_its_result_or_error() -> None:
    def late() -> None:
        raise TimeoutError("its own")

    assert in_background(lambda: 3, "three").result(10) == within(10, lambda: 3, "three") == 3
    assert isinstance(in_background(lambda: {}["absent"], "fails").exception(10), KeyError)
    with pytest.raises(TimeoutError, match="its own"):
        within(10, late, "late")


def test_late_call_does_not_keep_the_process_alive() -> None:
    over = threading.Event()
    with pytest.raises(TimeoutError, match="no complete response within 0 s"):
        within(0.01, over.wait, "waits")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "waits")
    over.set()
