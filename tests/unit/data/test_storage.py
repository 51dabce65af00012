"""Storage operations are atomic and retried within their timeout, errors name the URL, and faults of tests are met."""

import errno
import itertools
import logging
import os
import pickle
import signal
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from unittest import mock

import pytest

from pipeline.config.errors import StorageError
from pipeline.config.schema import StorageConfig
from pipeline.config.urls import is_local
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join, retry, split
from pipeline.data.storage.retry import RetryPolicy, RetryTimeout, TransientError, explain
from pipeline.data.storage.s3 import S3Backend, _seconds_until
from tests.support.failing_storage import FailingStorage, Fault, every_fault

storage = Storage()
READS = [storage.read, storage.open, lambda url: storage.read(url, 0, 3)]


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path: Path) -> Iterator[str]:
    urls = {"local": str(tmp_path / "a b"), "file": f"file://{tmp_path}/x", "memory": f"memory://{tmp_path.name}"}
    yield urls[request.param]
    storage.delete(urls[request.param])


def test_objects_are_written_read_listed_and_deleted(folder: str, tmp_path: Path):
    url, data = join(folder, "deep", "file.bin"), os.urandom(100_000)
    storage.write(url, b"0123456789")
    assert storage.read(url) == b"0123456789"
    assert [storage.read(url, start, stop) for start, stop in ((3, 7), (4, 4))] == [b"3456", b""]
    assert storage.info(url).size == 10
    with storage.open(url) as stream:
        assert (stream.read(4), stream.read(), stream.read()) == (b"0123", b"456789", b"")
    storage.write(url, b"new")
    assert storage.read(url) == b"new"
    (tmp_path / "source").write_bytes(data)
    storage.upload(tmp_path / "source", url)
    assert storage.read(url) == data
    claim = join(folder, "deep", "claim")
    assert [storage.write(claim, data, create=True) for data in (b"first", b"second")] == [True, False]
    assert storage.read(claim) == b"first"
    assert storage.list(join(folder, "deep")) == ["claim", "file.bin"]
    storage.delete(join(folder, "deep"))
    for name in ("b.tar", "a.tar", "inner/c.tar", "inner2/d.tar"):
        storage.write(join(folder, name), b"x")
    assert storage.list(folder) == ["a.tar", "b.tar", "inner", "inner2"]
    assert {name: info.size for name, info in storage.list_info(folder).items()} == {"a.tar": 1, "b.tar": 1}
    assert storage.list(join(folder, "absent")) == []
    present = ["", "a.tar", "inner", "absent", "a.tar/below"]
    assert [storage.exists(join(folder, name)) for name in present] == [True, True, True, False, False]
    for _ in range(2):
        storage.delete(join(folder, "inner"))
        assert storage.list(folder) == ["a.tar", "b.tar", "inner2"]


def test_missing_and_short_objects_are_named_and_a_failed_read_skips_no_bytes(folder: str):
    url = join(folder, "short")
    storage.write(url, b"12345")
    for call in (*READS, storage.info):
        with pytest.raises(NotFound, match=r"none: .*does not exist.*Check the URL"):
            call(join(folder, "none"))
    for start in (2, 7):
        with pytest.raises(StorageError, match=rf"short: .*too short: it holds 5 bytes, and bytes {start} to 9 "):
            storage.read(url, start, 9)
    if not is_local(url):
        raw = storage.open(url).raw  # unbuffered
        for read, expected in ((lambda: raw.read(2), b"12"), (lambda: raw.read(1), b"3"), (raw.read, b"45")):
            with mock.patch.object(storage, "read", side_effect=StorageError("away")), pytest.raises(StorageError):
                read()
            assert read() == expected


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_concurrent_creates_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool):
    if not has_links:
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EPERM, "no hard links here")))
    url = str(tmp_path / "claim")
    with ThreadPoolExecutor(8 if has_links else 1) as pool:
        created = list(pool.map(lambda number: storage.write(url, b"%d" % number, create=True), range(32)))
    assert storage.read(url) == b"%d" % created.index(True)
    assert created.count(True) == 1
    assert storage.list(str(tmp_path)) == ["claim"]


def test_pipes_folders_and_broken_links_are_told_from_files(tmp_path: Path):
    path, reads = str(tmp_path), (storage.read, lambda url: storage.read(url, 0, 1))
    os.mkfifo(f"{path}/pipe.tar")
    for call in READS:  # without blocking
        with pytest.raises(StorageError, match=f"{path}/pipe.tar: .* it is a pipe"):
            call(f"{path}/pipe.tar")
    os.unlink(f"{path}/pipe.tar")
    reader, writer = os.pipe()
    os.write(writer, b"answers")
    os.close(writer)
    with pytest.raises(StorageError, match="it is a pipe, which has no ranges"):
        storage.read(f"/dev/fd/{reader}", 0, 3)
    assert storage.read(f"/dev/fd/{reader}") == b"answers"  # a pipe of the shell
    os.close(reader)
    for call in (*reads, lambda url: storage.write(url, b"")):
        with pytest.raises(StorageError, match=r"it is a folder, not a file"):
            call(path)
    storage.write(f"{path}/file", b"x")
    for name, create in (("inner", True), ("deep/inner", False)):
        with pytest.raises(NotFound):
            storage.write(f"{path}/file/{name}", b"y", create)
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    (tmp_path / "inner").mkdir()
    assert (storage.list(path), storage.exists(f"{path}/broken")) == (["file", "inner"], False)
    for name in ("bagpipe:1.tar", "pipe.tar", "a:b"):
        storage.write(f"{path}/{name}", b"x")
        assert storage.read(f"{path}/{name}") == b"x"


def test_writes_are_atomic_complete_and_change_the_tag(tmp_path: Path):
    url, texts = str(tmp_path / "file"), [bytes([65 + n]) * 10_000 for n in range(8)]
    storage.write(url, b"12345")
    tag = storage.info(url).etag
    assert storage.read(url, 0, 2, etag=tag) == b"12"
    storage.write(url, b"123456")
    with pytest.raises(ObjectChanged, match=r"file: .*replaced"):
        storage.read(url, 0, 2, etag=tag)
    with pytest.raises(StorageError, match=r"uploading to"):
        storage.upload(tmp_path / "absent", url)
    with pytest.raises(TypeError):
        storage.write(url, "text, not bytes")  # type: ignore[arg-type]
    assert storage.read(url) == b"123456"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: storage.write(url, text), texts * 4))
    assert storage.read(url) in texts
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "plain").write_bytes(bytes(range(100)))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    read = os.pread  # returns at most 2 GiB a call
    with mock.patch("os.pread", lambda number, count, start: read(number, min(count, 7), start)):
        for url in (str(tmp_path / "copy"), "memory://copies/of-short-reads"):
            storage.upload(tmp_path / "plain", url)
            assert storage.read(url) == bytes(range(100))


def test_urls_join_and_split_and_storage_survives_pickling_and_forking(tmp_path: Path):
    assert [join("s3://b/x/", "y", "z.tar"), join("/", "x")] == ["s3://b/x/y/z.tar", "/x"]
    assert [split("s3://b/x/y.tar"), split("y.tar")] == [("s3://b/x", "y.tar"), (".", "y.tar")]
    assert [is_local(url) for url in ("/x", "x", "file:///x", "s3://b")] == [True, True, True, False]
    storage, url = Storage(StorageConfig(retry_timeout_seconds=9.0)).within(7.0), str(tmp_path / "file")
    storage.write(url, b"x")
    with storage._lock:  # as another thread may hold it at the moment of a fork
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that is blocked by the lock
            os._exit(0 if storage.read(url) == b"x" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert (copy.config.retry_timeout_seconds, copy.read(url)) == (7.0, b"x")


def retried(*errors: Exception, timeout: float = StorageConfig().retry_timeout_seconds) -> None:
    """Make a request that fails with the errors, then succeeds."""
    RetryPolicy(timeout)("s3://bucket/key", mock.Mock(side_effect=[*errors, None]))


def test_only_transient_errors_are_retried_with_jittered_backoff(clock):
    eio = OSError(errno.EIO, "x")
    retried(*[TransientError("slow down"), TimeoutError("late"), ConnectionResetError("reset"), eio] * 3)
    assert len(clock.slept) == len(set(clock.slept)) == 12
    assert all(0 <= wait <= min(10.0, 0.1 * 2**n) for n, wait in enumerate(clock.slept))
    permanent = [FileNotFoundError("gone"), PermissionError("no"), TypeError("a bug")]
    permanent += [OSError(errno.ENOSPC, "full"), OSError(errno.ELOOP, "x"), ssl.SSLError("WRONG_VERSION_NUMBER")]
    for error in permanent:
        with pytest.raises(type(error)) as raised:
            retried(error)
        assert raised.value is error
    assert len(clock.slept) == 12


def test_last_attempt_is_made_at_the_timeout_and_the_outage_is_logged(clock, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), pytest.raises(RetryTimeout) as raised:
        retried(*[TransientError("slow down")] * 1000, timeout=300.0)
    assert (clock.now, len(clock.slept) > 29) == (pytest.approx(300.0), True)
    assert str(explain("s3://bucket/key", "reading", raised.value, "http://store")) == (
        "s3://bucket/key: reading failed: slow down at http://store. Check the URL, and that the store is healthy. "
        f"Gave up after {len(clock.slept) + 1} attempts in 300 s."
    )
    assert 15 < len(caplog.messages) <= 60
    assert all(m.startswith("s3://bucket/key: TransientError: slow down; retrying for ") for m in caplog.messages)
    caplog.clear()
    retried(TransientError("brief"))
    assert caplog.records == []


def test_default_timeout_outlasts_an_outage_of_a_minute_and_respects_retry_after(clock):
    answers = mock.Mock(side_effect=(TransientError("away") if clock.now < 60.0 else "back" for _ in itertools.count()))
    assert RetryPolicy(StorageConfig().retry_timeout_seconds)("s3://bucket/key", answers) == "back"
    assert 60.0 <= clock.now <= 70.0
    clock.now = 0.0
    clock.slept.clear()
    errors = [TransientError("slow down"), TransientError("slow down")]
    errors[0].retry_after, errors[1].retry_after = 7.0, 3600.0
    retried(*errors, timeout=300.0)
    assert (7.0 <= clock.slept[0] <= 7.1, clock.now) == (True, 300.0)
    soon = _seconds_until(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert 90 < soon <= 100
    assert [_seconds_until(text) for text in (" 7 ", "soon", "")] == [7.0, None, None]


def test_slow_body_fails_at_the_timeout_which_restarts_every_16_mib(clock):
    def read(piece: bytes, size: int) -> bytes:
        """Read an object of `size` bytes of which a piece arrives each second."""

        def read1(_: int) -> bytes:
            clock.now += 1.0
            return piece

        body, backend = mock.MagicMock(), S3Backend(None, RetryPolicy(300.0))
        body.__enter__.return_value.read1 = read1
        backend._get = lambda *_: (body, 0, size, None)
        return backend.read("b/k", 0, size, None)

    with pytest.raises(RetryTimeout, match="1 attempts in 300 s") as raised:
        read(b"x", 2**40)
    assert "too slowly" in str(raised.value.__cause__)
    clock.now, size = 0.0, 4 * retry.PROGRESS_BYTES
    assert len(read(bytes(retry.PROGRESS_BYTES // 256), size)) == size
    assert clock.now == 4 * 256


def test_every_planned_fault_is_met_with_the_effect_of_its_moment_and_lasts_until_healed(tmp_path: Path):
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
        with pytest.raises(StorageError):
            FailingStorage(Fault(0, when=when)).delete(folder)
        with pytest.raises(StorageError):
            FailingStorage(Fault(0, "write", when)).write_parts(f"{folder}.x", 4, part)
        assert Storage().list(join(folder, "inner")) == list(remaining)
        assert ((tmp_path / f"{when}.x").exists(), part.called) == (is_written, when != "before")
    storage, url = FailingStorage(Fault(1, "write", lasting=True)), str(tmp_path / "lasting")
    storage.write(join(url, "a"), b"")
    for _ in range(2):
        with pytest.raises(StorageError):
            storage.write(join(url, "b"), b"")
        assert storage.list(url) == ["a"]
    storage.heal()
    storage.write(join(url, "b"), b"")
    assert storage.num_failed == 2
    with pytest.raises(StorageError):
        pickle.loads(pickle.dumps(FailingStorage(Fault(0)))).list(url)  # noqa: S301
