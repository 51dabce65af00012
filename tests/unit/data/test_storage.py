from __future__ import annotations

import errno
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config.errors import StorageError
from pipeline.config.paths import is_local
from pipeline.config.schema import StorageConfig
from pipeline.data import storage as module
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join, split


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path: Path):
    urls = {"local": str(tmp_path / "a b"), "file": f"file://{tmp_path}/x", "memory": f"memory://{tmp_path.name}"}
    yield urls[request.param]
    Storage().delete(urls[request.param])


def test_what_was_written_is_read(folder: str):
    storage, url = Storage(), join(folder, "deep", "file.bin")
    storage.write(url, b"0123456789")
    assert storage.read(url) == b"0123456789"
    assert storage.read_range(url, 3, 7) == b"3456"
    assert storage.read_range(url, 4, 4) == b""
    assert storage.info(url).size == 10
    with storage.open(url) as stream:
        assert (stream.read(4), stream.read(), stream.read()) == (b"0123", b"456789", b"")
    storage.write(url, b"new")
    assert storage.read(url) == b"new"


def test_folders_list_what_lies_directly_in_them(folder: str):
    storage = Storage()
    for name in ("b.tar", "a.tar", "inner/c.tar"):
        storage.write(join(folder, name), b"x")
    assert storage.list(folder) == ["a.tar", "b.tar", "inner"]
    assert {name: info.size for name, info in storage.list_info(folder).items()} == {"a.tar": 1, "b.tar": 1}
    assert storage.list(join(folder, "absent")) == []
    assert storage.exists(folder)
    assert storage.exists(join(folder, "a.tar"))
    assert not storage.exists(join(folder, "absent"))
    assert not storage.exists(join(folder, "a.tar", "below"))


def test_delete_takes_a_whole_folder_and_spares_its_namesakes(folder: str):
    storage = Storage()
    for name in ("run/a", "run/b/c", "run2/a"):
        storage.write(join(folder, name), b"x")
    storage.delete(join(folder, "run"))
    storage.delete(join(folder, "run"))
    assert storage.list(folder) == ["run2"]


def test_upload_and_download_copy_files(folder: str, tmp_path: Path):
    storage, data = Storage(), os.urandom(100_000)
    (tmp_path / "source").write_bytes(data)
    storage.upload(tmp_path / "source", join(folder, "copy"))
    storage.download(join(folder, "copy"), tmp_path / "down" / "copy")
    assert (tmp_path / "down" / "copy").read_bytes() == data


def test_missing_object_is_named(folder: str):
    url = join(folder, "none")
    for call in (Storage().read, Storage().info, lambda u: Storage().read_range(u, 0, 1), lambda u: Storage().open(u)):
        with pytest.raises(NotFound, match=r"none: .*does not exist.*Check the URL"):
            call(url)


def test_range_past_the_end_is_refused_at_once(folder: str):
    storage, url = Storage(), join(folder, "short")
    storage.write(url, b"12345")
    with pytest.raises(StorageError, match=r"short: .*too short: it holds 5 bytes"):
        storage.read_range(url, 2, 9)


def test_changed_file_is_noticed_by_its_tag(tmp_path: Path):
    storage, url = Storage(), str(tmp_path / "file")
    storage.write(url, b"12345")
    tag = storage.info(url).etag
    assert storage.read_range(url, 0, 2, etag=tag) == b"12"
    storage.write(url, b"123456")
    with pytest.raises(ObjectChanged, match=r"file: .*replaced"):
        storage.read_range(url, 0, 2, etag=tag)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    storage, url = Storage(), str(tmp_path / "file")
    storage.write(url, b"old")
    with pytest.raises(StorageError, match=r"uploading to"):
        storage.upload(tmp_path / "absent", url)
    assert storage.read(url) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_new_files_have_the_users_usual_permissions(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    Storage().write(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writers_at_once_never_mix_their_bytes(tmp_path: Path):
    storage, url = Storage(), str(tmp_path / "file")
    texts = [bytes([65 + n]) * 10_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: storage.write(url, text), texts * 4))
    assert storage.read(url) in texts
    assert os.listdir(tmp_path) == ["file"]


class Flaky:
    """A store that fails some times, then answers."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def read(self, path: str) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"answer"


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.001)

    def make(*errors: Exception) -> Flaky:
        store = Flaky(*errors)
        monkeypatch.setattr(module, "_make_backend", lambda protocol, config: store)
        return store

    return make


def test_transient_faults_are_tried_again(flaky):
    store = flaky(OSError(errno.EIO, "slow down"), TimeoutError("late"), ConnectionResetError("reset"))
    assert Storage().read("s3://bucket/key") == b"answer"
    assert store.calls == 4


def test_lasting_faults_are_not_tried_again(flaky):
    for error in (FileNotFoundError("gone"), PermissionError("no"), OSError(errno.ENOSPC, "full")):
        store = flaky(error)
        with pytest.raises(StorageError, match=r"s3://bucket/key: "):
            Storage().read("s3://bucket/key")
        assert store.calls == 1


def test_attempts_and_deadline_bound_the_retries(flaky):
    store = flaky(*[OSError(errno.EIO, "slow down")] * 100)
    with pytest.raises(StorageError, match=r"s3://bucket/key: reading failed.*Tried 3 times"):
        Storage(StorageConfig(attempts=3)).read("s3://bucket/key")
    assert store.calls == 3
    module._FIRST_WAIT = 0.05
    with pytest.raises(StorageError, match=r"slow down"):
        Storage(StorageConfig(attempts=90, deadline_seconds=0.1)).read("s3://bucket/key")
    assert store.calls < 30


def test_programmers_errors_are_not_disguised(flaky):
    flaky(TypeError("a bug"))
    with pytest.raises(TypeError, match=r"a bug"):
        Storage().read("s3://bucket/key")


def test_storage_survives_pickling_and_forking(tmp_path: Path):
    storage = pickle.loads(pickle.dumps(Storage(StorageConfig(attempts=2))))  # noqa: S301
    storage.write(str(tmp_path / "file"), b"x")
    assert storage.config.attempts == 2
    assert storage.read(str(tmp_path / "file")) == b"x"


def test_unknown_protocol_is_refused():
    with pytest.raises(StorageError, match=r"qq:// cannot be reached"):
        Storage().read("qq://bucket/key")


def test_urls_join_and_split():
    assert join("s3://b/x/", "y", "z.tar") == "s3://b/x/y/z.tar"
    assert join("/", "x") == "/x"
    assert split("s3://b/x/y.tar") == ("s3://b/x", "y.tar")
    assert split("y.tar") == (".", "y.tar")
    assert is_local("/x")
    assert is_local("x")
    assert is_local("file:///x")
    assert not is_local("s3://b")


def test_retry_waits_hold_no_lock(flaky):
    store = flaky(*[OSError(errno.EIO, "slow down")] * 3)
    storage, answers = Storage(), []
    threads = [threading.Thread(target=lambda: answers.append(storage.read("s3://b/k"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"answer"] * 4
    assert store.calls == 7
