"""`mome bench storage`: read and list speed of a store with our client, fsspec and botocore.

All clients read the same object, in turn, over several rounds; figures are medians. CPU seconds are those of this
process: a store on the same machine is not counted, although it shares the cores. With moto's server only CPU seconds
are meaningful, because it slices every range out of a copy of the whole object.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.load import resolve_secret
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join

MIB = 2**20
READ_BYTES = MIB  # per read of a stream
SERVER_START_SECONDS = 30.0

Progress = Callable[[str], None]
Figures = dict[str, float]


@dataclass(frozen=True)
class ReadTarget:
    """One object of `size` bytes, read in ranges of `range_bytes` with `in_flight` requests at a time."""

    storage: Storage
    url: str
    size: int
    range_bytes: int
    in_flight: int

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(at, min(at + self.range_bytes, self.size)) for at in range(0, self.size, self.range_bytes)]


def bench_storage(
    url: str | None = None,
    config: StorageConfig = StorageConfig(),
    *,
    object_bytes: int = 128 * MIB,
    range_bytes: int = 8 * MIB,
    in_flight: int = 4,
    objects: int = 500,
    rounds: int = 3,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """Measure the store behind the folder `url`; without one, moto's server, or a local folder where moto is absent.

    Writes one object of `object_bytes` and `objects` small ones into a new folder under `url`, and deletes it. `read`
    and `list` hold, by contender, MB (10^6 bytes) per second, CPU seconds per GiB, seconds until the first byte is in
    the caller's hands, and HTTP requests (0 where the store is not reached by S3).
    """
    for name, value in (("object_bytes", object_bytes), ("range_bytes", range_bytes), ("in_flight", in_flight)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if objects < 1 or rounds < 1:
        raise ConfigError(f"objects is {objects} and rounds is {rounds}; both must be at least 1")
    with ExitStack() as stack:
        kind = "given"
        if url is None:
            kind, url, config = stack.enter_context(_own_store())
        storage = Storage(config)
        folder = join(url, f"mome-bench-{secrets.token_hex(6)}")
        stack.callback(storage.delete, folder)
        progress(f"writing {object_bytes / MIB:.0f} MiB")
        target = ReadTarget(storage, join(folder, "object"), object_bytes, range_bytes, in_flight)
        with tempfile.NamedTemporaryFile(prefix="mome-bench-") as file:
            for offset in range(0, object_bytes, MIB):
                file.write(os.urandom(min(MIB, object_bytes - offset)))  # no store can compress it
            file.flush()
            storage.upload(file.name, target.url)
        read = _rounds(partial(_measure_read, target=target), readers(target), rounds, progress)
        progress(f"writing {objects} objects")
        many = join(folder, "many")
        with ThreadPoolExecutor(in_flight) as threads:
            list(threads.map(lambda number: storage.write(join(many, f"{number:06d}"), b"x"), range(objects)))
        listing = _rounds(partial(_measure_list, objects=objects), listers(storage, many), rounds, progress)
    return {
        "url": url,
        "store": kind,
        "object_bytes": object_bytes,
        "range_bytes": range_bytes,
        "in_flight": in_flight,
        "rounds": rounds,
        "read": read,
        "list": {"objects": objects, **listing},
    }


# ---- contenders: the object's bytes in any order, and the names in a folder

Reader = Callable[[], Iterator[bytes]]
Lister = Callable[[], list[str]]


def readers(target: ReadTarget) -> dict[str, Reader]:
    """Ways to read the object whole, by name; each call reads it once."""
    clients: dict[str, Reader] = {
        "mome": partial(_read_ranges, target),
        "mome.open": partial(_read_stream, partial(target.storage.open, target.url)),
    }
    file_system, path = _fsspec(target.storage.config, target.url)
    clients["fsspec.cat_ranges"] = partial(_cat_ranges, file_system, path, target)
    clients["fsspec.open"] = partial(_read_stream, partial(file_system.open, path, "rb"))
    if _is_s3(target.url):
        client = _botocore_client(target.storage.config)
        bucket, key = _bucket_and_key(target.url)
        get = partial(client.get_object, Bucket=bucket, Key=key)
        clients["botocore.ranges"] = partial(_in_flight, target, lambda span: get(Range=_header(*span))["Body"].read())
        clients["botocore.open"] = partial(_read_stream, lambda: get()["Body"])
    return clients


def listers(storage: Storage, url: str) -> dict[str, Lister]:
    """Ways to list the folder, with sizes, by name."""
    file_system, path = _fsspec(storage.config, url)

    def fsspec_ls() -> list[str]:
        file_system.invalidate_cache()
        return [entry["name"].rpartition("/")[2] for entry in file_system.ls(path, detail=True)]

    clients: dict[str, Lister] = {"mome": lambda: list(storage.list_info(url)), "fsspec.ls": fsspec_ls}
    if _is_s3(url):
        pages = _botocore_client(storage.config).get_paginator("list_objects_v2")
        bucket, prefix = _bucket_and_key(url)
        clients["botocore.list_objects_v2"] = lambda: [
            item["Key"].rpartition("/")[2]
            for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
            for item in page.get("Contents", [])
        ]
    return clients


def _read_ranges(target: ReadTarget) -> Iterator[bytes]:
    tag = target.storage.info(target.url).etag
    return _in_flight(target, lambda span: target.storage.read_range(target.url, *span, etag=tag))


def _in_flight(target: ReadTarget, read: Callable[[tuple[int, int]], bytes]) -> Iterator[bytes]:
    with ThreadPoolExecutor(target.in_flight) as threads:
        yield from threads.map(read, target.ranges)


def _header(start: int, stop: int) -> str:
    return f"bytes={start}-{stop - 1}"


def _cat_ranges(file_system: Any, path: str, target: ReadTarget) -> Iterator[bytes]:
    starts, stops = zip(*target.ranges, strict=True)
    options = {"batch_size": target.in_flight} if file_system.async_impl else {}
    yield from file_system.cat_ranges([path] * len(starts), list(starts), list(stops), on_error="raise", **options)


def _read_stream(opened: Callable[[], Any]) -> Iterator[bytes]:
    stream = opened()
    try:
        while data := stream.read(READ_BYTES):
            yield data
    finally:
        stream.close()


def _fsspec(config: StorageConfig, url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if _is_s3(url):
        options = {"key": resolve_secret(config.key), "secret": resolve_secret(config.secret)}
        options |= {"endpoint_url": config.endpoint_url, "skip_instance_cache": True}
    return fsspec.core.url_to_fs(url, **options)


def _botocore_client(config: StorageConfig) -> Any:
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        aws_access_key_id=resolve_secret(config.key),
        aws_secret_access_key=resolve_secret(config.secret),
        config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
    )


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    return bucket, key


# ---- measuring


def _rounds(measure: Callable[[Any], Figures], contenders: dict[str, Any], rounds: int, progress: Progress) -> Any:
    """Return the medians of each client's figures; the order rotates, so that no client is always first."""
    names = list(contenders)
    measured: dict[str, list[Figures]] = {name: [] for name in names}
    for name in names:
        measure(contenders[name])  # connections and imports
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            progress(f"round {number + 1} of {rounds}: {name}")
            measured[name].append(measure(contenders[name]))
    return {
        name: {key: median(figures[key] for figures in samples) for key in samples[0]}
        for name, samples in measured.items()
    }


def _measure_read(reader: Reader, target: ReadTarget) -> Figures:
    size, first = 0, None
    with _counting_requests() as requests:
        cpu, started = time.process_time(), time.perf_counter()
        for data in reader():
            first = first or time.perf_counter()
            size += len(data)
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
    if first is None or size != target.size:
        raise StorageError(f"{target.url}: {size} of {target.size} bytes were read")
    return {
        "mb_per_second": size / 1e6 / seconds,
        "cpu_seconds_per_gib": spent / size * 2**30,
        "first_byte_seconds": first - started,
        "requests": len(requests),
    }


def _measure_list(lister: Lister, objects: int) -> Figures:
    with _counting_requests() as requests:
        cpu, started = time.process_time(), time.perf_counter()
        names = lister()
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
    if len(names) != objects:
        raise StorageError(f"the listing has {len(names)} of {objects} objects")
    return {
        "seconds": seconds,
        "cpu_seconds": spent,
        "objects_per_second": objects / seconds,
        "requests": len(requests),
    }


@contextmanager
def _counting_requests() -> Iterator[list[str]]:
    """The methods of the HTTP requests that go out of this process through botocore or aiobotocore."""
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.httpsession import URLLib3Session

    sent: list[str] = []
    with ExitStack() as stack:
        for session in (AIOHTTPSession, URLLib3Session):
            send = session.send

            def counted(self: Any, request: Any, send: Callable[..., Any] = send) -> Any:
                sent.append(request.method)
                return send(self, request)

            stack.enter_context(patch.object(session, "send", counted))
        yield sent


# ---- what is measured


@contextmanager
def _own_store() -> Iterator[tuple[str, str, StorageConfig]]:
    """A store for the purpose, gone afterwards: moto's server in a process of its own, else a local folder."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        with tempfile.TemporaryDirectory(prefix="mome-bench-") as folder:
            yield "local", folder, StorageConfig()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await(server, port)
            with _credentials():
                config = StorageConfig(endpoint_url=f"http://127.0.0.1:{port}", key=f"env:{_KEY}", secret=f"env:{_KEY}")
                _botocore_client(config).create_bucket(Bucket="bench")
                yield "moto", "s3://bench", config
        finally:
            server.terminate()


_KEY = "MOME_BENCH_KEY"  # moto accepts any


@contextmanager
def _credentials() -> Iterator[None]:
    os.environ[_KEY] = "bench"
    try:
        yield
    finally:
        del os.environ[_KEY]


def _await(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + SERVER_START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise StorageError("moto's server did not start; name a store to measure: mome bench storage URL")
