"""Storage operations are atomic and retried within their timeout, and errors name the URL."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.schema import StorageConfig
from pipeline.config.urls import is_local
from pipeline.data.storage import NotFound, ObjectChanged, Storage, join, retry, split
from pipeline.data.storage.errors import RetryTimeout, TransientError, explain
from pipeline.data.storage.retry import RangeResponse, RetryPolicy, ranged_get
from pipeline.data.storage.s3 import _seconds_until


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path: Path):
    urls = {"local": str(tmp_path / "a b"), "file": f"file://{tmp_path}/x", "memory": f"memory://{tmp_path.name}"}
    yield urls[request.param]
    Storage().delete(urls[request.param])


def test_written_bytes_are_read_back(folder: str):
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


def test_create_succeeds_once(folder: str):
    storage, url = Storage(), join(folder, "deep", "claim")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"
    assert storage.list(join(folder, "deep")) == ["claim"]


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_concurrent_creates_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no hard links here")))
    storage, url = Storage(), str(tmp_path / "claim")
    with ThreadPoolExecutor(8 if has_links else 1) as pool:
        created = list(pool.map(lambda number: storage.create(url, b"%d" % number), range(32)))
    assert storage.read(url) == b"%d" % created.index(True)
    assert created.count(True) == 1
    assert storage.list(str(tmp_path)) == ["claim"]


def test_list_returns_direct_entries_only(folder: str):
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


def test_list_skips_broken_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to(tmp_path / "absent")
    (tmp_path / "c").mkdir()
    assert Storage().list(str(tmp_path)) == ["a", "c"]


def test_named_pipe_is_an_error_without_blocking(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.tar")
    url = str(tmp_path / "pipe.tar")
    for source_type in (Storage().read, Storage().open, lambda url: Storage().read_range(url, 0, 3)):
        with pytest.raises(StorageError, match=f"{url}: .* it is a pipe"):
            source_type(url)


def test_shell_pipe_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"answers")
    os.close(writer)
    assert Storage().read(f"/dev/fd/{reader}") == b"answers"
    os.close(reader)


def test_reading_a_folder_as_a_file_is_an_error(tmp_path: Path):
    for call in (Storage().read, lambda url: Storage().write(url, b""), lambda url: Storage().read_range(url, 0, 1)):
        with pytest.raises(StorageError, match=r"it is a folder, not a file"):
            call(str(tmp_path))


def test_writing_below_a_file_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotFound):
        Storage().create(str(tmp_path / "file" / "inner"), b"y")
    with pytest.raises(NotFound):
        Storage().write(str(tmp_path / "file" / "deep" / "inner"), b"y")


def test_delete_removes_one_folder_with_its_contents(folder: str):
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


def test_missing_object_error_names_the_url(folder: str):
    url = join(folder, "none")
    for call in (Storage().read, Storage().info, lambda u: Storage().read_range(u, 0, 1), lambda u: Storage().open(u)):
        with pytest.raises(NotFound, match=r"none: .*does not exist.*Check the URL"):
            call(url)


def test_range_past_the_end_is_an_error_without_retry(folder: str):
    storage, url = Storage(), join(folder, "short")
    storage.write(url, b"12345")
    for start in (2, 7):
        with pytest.raises(StorageError, match=rf"short: .*too short: it holds 5 bytes, and bytes {start} to 9 "):
            storage.read_range(url, start, 9)


def test_changed_file_is_detected_by_its_tag(tmp_path: Path):
    storage, url = Storage(), str(tmp_path / "file")
    storage.write(url, b"12345")
    tag = storage.info(url).etag
    assert storage.read_range(url, 0, 2, etag=tag) == b"12"
    storage.write(url, b"123456")
    with pytest.raises(ObjectChanged, match=r"file: .*replaced"):
        storage.read_range(url, 0, 2, etag=tag)


def test_failed_write_keeps_the_old_file(tmp_path: Path):
    storage, url = Storage(), str(tmp_path / "file")
    storage.write(url, b"old")
    with pytest.raises(StorageError, match=r"uploading to"):
        storage.upload(tmp_path / "absent", url)
    with pytest.raises(TypeError):
        storage.write(url, "text, not bytes")  # type: ignore[arg-type]
    assert storage.read(url) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_new_files_have_default_permissions(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    Storage().write(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_concurrent_writes_are_atomic(tmp_path: Path):
    storage, url = Storage(), str(tmp_path / "file")
    texts = [bytes([65 + n]) * 10_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: storage.write(url, text), texts * 4))
    assert storage.read(url) in texts
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "url", ["pipe:cat x.tar", "pipe:cat /data/{000..002}.tar", "pipe://cat x", "/data/pipe:cat x", "reference://x"]
)
def test_urls_that_run_a_program_are_rejected(url: str):
    for call in (Storage().read, Storage().list, Storage().open, lambda u: Storage().read_range(u, 0, 1)):
        with pytest.raises(
            ConfigError, match=r"this URL runs a program when it is read.*give the location of the files"
        ):
            call(url)


def test_file_names_with_colons_are_read(tmp_path: Path):
    for name in ("bagpipe:1.tar", "pipe.tar", "a:b"):
        Storage().write(str(tmp_path / name), b"x")
        assert Storage().read(str(tmp_path / name)) == b"x"


def test_unknown_protocol_is_rejected():
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


def test_storage_survives_pickling_and_forking(tmp_path: Path):
    storage = Storage(StorageConfig(retry_timeout_seconds=7.0))
    storage.write(str(tmp_path / "file"), b"x")
    with storage._lock:  # as another thread may hold it at the moment of a fork
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that is blocked by the lock
            os._exit(0 if storage.read(str(tmp_path / "file")) == b"x" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert copy.config.retry_timeout_seconds == 7.0
    assert copy.read(str(tmp_path / "file")) == b"x"


class Failing:
    """Request that fails with the given errors, then succeeds."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"answer"


class Clock:
    """Simulated time that advances only in `sleep`."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def test_transient_errors_are_retried_with_jittered_backoff(clock: Clock):
    eio = OSError(errno.EIO, "x")
    errors = [TransientError("slow down"), TimeoutError("late"), ConnectionResetError("reset"), eio] * 3
    request = Failing(*errors)
    assert RetryPolicy(300.0)("s3://bucket/key", request) == b"answer"
    assert request.calls == len(clock.slept) + 1 == 13
    assert all(0 <= wait <= min(10.0, 0.1 * 2**n) for n, wait in enumerate(clock.slept))
    assert len(set(clock.slept)) == 12


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("no"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.ELOOP, "x"),
        TypeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_permanent_errors_are_not_retried(clock: Clock, error: Exception):
    request = Failing(error)
    with pytest.raises(type(error)) as raised:
        RetryPolicy(300.0)("s3://bucket/key", request)
    assert raised.value is error
    assert (request.calls, clock.slept) == (1, [])


def test_last_attempt_is_made_at_the_timeout(clock: Clock):
    request = Failing(*[TransientError("slow down")] * 1000)
    with pytest.raises(RetryTimeout) as raised:
        RetryPolicy(300.0)("s3://bucket/key", request)
    assert clock.now == pytest.approx(300.0)
    assert request.calls == len(clock.slept) + 1 > 30
    message = explain("s3://bucket/key", "reading", raised.value, "http://store")
    assert str(message) == (
        "s3://bucket/key: reading failed: slow down at http://store. Check the URL, and that the store is healthy. "
        f"Gave up after {request.calls} attempts in 300 s."
    )


def test_default_timeout_outlasts_an_outage_of_a_minute(clock: Clock):
    def request() -> str:
        if clock.now < 60.0:
            raise TransientError("away")
        return "back"

    assert RetryPolicy(StorageConfig().retry_timeout_seconds)("s3://bucket/key", request) == "back"
    assert 60.0 <= clock.now <= 70.0


def test_seconds_until_is_respected_within_the_timeout(clock: Clock):
    request = Failing(TransientError("slow down", retry_after=7.0), TransientError("slow down", retry_after=3600.0))
    assert RetryPolicy(300.0)("s3://bucket/key", request) == b"answer"
    assert 7.0 <= clock.slept[0] <= 7.1
    assert clock.now == 300.0


def test_seconds_until_is_parsed_as_seconds_and_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert _seconds_until(" 7 ") == 7.0
    assert 90 < (_seconds_until(soon) or 0) <= 100
    assert _seconds_until("soon") is _seconds_until("") is None


def test_outage_is_logged_periodically(clock: Clock, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), pytest.raises(RetryTimeout):
        RetryPolicy(300.0)("s3://bucket/key", Failing(*[TransientError("the store is away")] * 1000))
    lines = [record.getMessage() for record in caplog.records]
    assert 15 < len(lines) <= 60
    assert all(line.startswith("s3://bucket/key: TransientError: the store is away; retrying for ") for line in lines)
    caplog.clear()
    RetryPolicy(300.0)("s3://bucket/key", Failing(TransientError("brief")))
    assert caplog.records == []


def _pieces(*pieces: bytes | Exception):
    for piece in pieces:
        if isinstance(piece, Exception):
            raise piece
        yield piece


def test_interrupted_body_resumes_at_the_next_byte(clock: Clock):
    requests, bodies = [], [[b"ab", TransientError("cut")], [TransientError("cut")], [b"c"], [b"defg"], [b"de", b"f"]]

    def ask(start: int, stop: int | None, etag: str | None) -> RangeResponse:
        requests.append((start, stop, etag))
        return RangeResponse(6, "tag", _pieces(*bodies.pop(0)))

    assert ranged_get(ask, "s3://b/k", 0, None, None, RetryPolicy(300.0)) == b"abcdef"
    assert requests == [(0, None, None), (2, 6, "tag"), (2, 6, "tag"), (3, 6, "tag"), (3, 6, "tag")]


def _trickle(clock: Clock, piece: bytes, times: int):
    for _ in range(times):
        clock.now += 1.0
        yield piece


def test_slow_body_fails_at_the_timeout(clock: Clock):
    with pytest.raises(RetryTimeout, match="1 attempts in 300 s") as raised:
        ranged_get(
            lambda *_: RangeResponse(2**40, None, _trickle(clock, b"x", 1000)),
            "s3://b/k",
            0,
            2**40,
            None,
            RetryPolicy(300.0),
        )
    assert "too slowly" in str(raised.value.__cause__)


def test_timeout_restarts_every_16_mib(clock: Clock):
    size, piece = 4 * retry.PROGRESS_BYTES, bytes(retry.PROGRESS_BYTES // 256)
    data = ranged_get(
        lambda *_: RangeResponse(size, None, _trickle(clock, piece, 4 * 256)),
        "s3://b/k",
        0,
        size,
        None,
        RetryPolicy(300.0),
    )
    assert len(data) == size
    assert clock.now == 4 * 256
