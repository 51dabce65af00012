"""Durable writes survive a power loss; background calls return their result, raise their error, or time out."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.config.background import in_background, within
from pipeline.config.durable import TEMPORARY, atomic_write, sync_folder, write_durably
from pipeline.data.storage import Storage

WRITES: dict[str, Callable[[str], object]] = {
    "write_durably": lambda path: write_durably(path, b"x"),
    "write": lambda path: Storage().write(path, b"x"),
    "write_parts": lambda path: Storage().write_parts(path, 1, lambda start, stop: b"x"),
    "create": lambda path: Storage().write(path, b"x", create=True),
    "upload": lambda path: Storage().upload("/proc/self/cmdline", path),
}


def test_data_name_and_new_folders_are_synced_in_order(tmp_path, monkeypatch):
    log: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "replace")}
    fsync = Mock(side_effect=lambda fd: (log.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), real["fsync"](fd)))
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("link", "replace"):
        rename = real[name]
        monkeypatch.setattr(os, name, lambda old, new, move=rename: (log.append(("rename", str(new))), move(old, new)))
    for name, write in WRITES.items():
        folders = [str(tmp_path), str(tmp_path / name), str(tmp_path / name / "deep")]
        path = f"{folders[2]}/file"
        log.clear()
        write(path)
        assert log[:2] == [("sync", folders[0]), ("sync", folders[1])]  # they contain the names of the new folders
        assert (log[2][0], bool(TEMPORARY.fullmatch(Path(log[2][1]).name))) == ("sync", True)
        assert log[3:] == [("rename", path), ("sync", folders[2])], name
        log.clear()
        if name != "create":
            write(path)
            assert [kind for kind, _ in log] == ["sync", "rename", "sync"]


def test_failures_keep_the_old_content_and_ignore_folders_without_sync(tmp_path, monkeypatch):
    write_durably(tmp_path / "file", b"old")
    with pytest.raises(TypeError), atomic_write(tmp_path / "file") as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EINVAL, "Invalid argument")))
    sync_folder(tmp_path)  # some file systems do not support it
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def test_folder_may_be_created_by_other_writers(tmp_path, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            paths = [tmp_path / f"{number}" / "a" / "b" / str(writer) for writer in range(8)]
            list(pool.map(lambda path: write_durably(path, b"x"), paths))
            assert all(path.read_bytes() == b"x" for path in paths)
    isdir, folder = os.path.isdir, tmp_path / "new" / "step"

    def created_after_the_check(path: str) -> bool:
        existed = isdir(path)
        folder.mkdir(parents=True, exist_ok=True)
        return existed

    monkeypatch.setattr(os.path, "isdir", created_after_the_check)
    write_durably(folder / "rank-00000", b"x")
    assert (folder / "rank-00000").read_bytes() == b"x"


def test_background_call_returns_its_result_or_error_and_does_not_keep_the_process_alive():
    assert in_background(lambda: 3, "three").result(10) == within(10, lambda: 3, "three") == 3
    assert isinstance(in_background(lambda: {}["absent"], "fails").exception(10), KeyError)
    with pytest.raises(TimeoutError, match="its own"):
        within(10, Mock(side_effect=TimeoutError("its own")), "late")
    over = threading.Event()
    with pytest.raises(TimeoutError, match="no complete response within 0 s"):
        within(0.01, over.wait, "waits")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "waits")
    over.set()
