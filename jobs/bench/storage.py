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
from statistics import median
from typing import Any
from unittest.mock import patch

import fsspec

from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.load import resolve_secret
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join

MIB = 2**20
READ_BYTES = MIB  # per read of a stream
SERVER_START_SECONDS = 30.0
KEY_VARIABLE = "MOME_BENCH_KEY"  # holds the key for moto, which accepts any

Progress = Callable[[str], None]
Figures = dict[str, float]
Reader = Callable[[], Iterator[bytes]]
Lister = Callable[[], list[str]]


@dataclass(frozen=True)
class ReadTarget:
    """One object of `size` bytes, read in ranges of `range_bytes` with `in_flight` requests at a time."""

    storage: Storage
    url: str
    size: int
    range_bytes: int
    in_flight: int


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
    and `list` hold, by client, MB (10^6 bytes) per second, CPU seconds per GiB, seconds until the first byte is in
    the caller's hands, and HTTP requests (0 where the store is not reached by S3).
    """
    counts = {"object_bytes": object_bytes, "range_bytes": range_bytes, "in_flight": in_flight}
    for name, value in (counts | {"objects": objects, "rounds": rounds}).items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
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
        read = _rounds(lambda reader: _measure_read(reader, target), readers(target), rounds, progress)
        progress(f"writing {objects} objects")
        many = join(folder, "many")
        with ThreadPoolExecutor(in_flight) as threads:
            list(threads.map(lambda number: storage.write(join(many, f"{number:06d}"), b"x"), range(objects)))
        listing = _rounds(lambda lister: _measure_list(lister, objects), listers(storage, many), rounds, progress)
    return {
        "url": url,
        "store": kind,
        **counts,
        "rounds": rounds,
        "read": read,
        "list": {"objects": objects, **listing},
    }


# ---- clients: the object's bytes in any order, and the names in a folder


def readers(target: ReadTarget) -> dict[str, Reader]:
    """Return ways to read the whole object, by name; each call reads it once."""
    storage, url = target.storage, target.url
    starts = list(range(0, target.size, target.range_bytes))
    stops = [*starts[1:], target.size]
    file_system, path = _fsspec(storage.config, url)

    def concurrently(read: Callable[[tuple[int, int]], bytes]) -> Iterator[bytes]:
        with ThreadPoolExecutor(target.in_flight) as threads:
            yield from threads.map(read, zip(starts, stops, strict=True))

    def streamed(stream: Any) -> Iterator[bytes]:
        try:
            while data := stream.read(READ_BYTES):
                yield data
        finally:
            stream.close()

    def own_ranges() -> Iterator[bytes]:
        tag = storage.info(url).etag
        return concurrently(lambda span: storage.read_range(url, *span, etag=tag))

    def fsspec_ranges() -> Iterator[bytes]:
        options = {"batch_size": target.in_flight} if file_system.async_impl else {}
        yield from file_system.cat_ranges([path] * len(starts), starts, stops, on_error="raise", **options)

    clients: dict[str, Reader] = {
        "mome": own_ranges,
        "mome.open": lambda: streamed(storage.open(url)),
        "fsspec.cat_ranges": fsspec_ranges,
        "fsspec.open": lambda: streamed(file_system.open(path, "rb")),
    }
    if bucket_and_key := _bucket_and_key(url):
        client, (bucket, key) = _botocore_client(storage.config), bucket_and_key

        def botocore_range(span: tuple[int, int]) -> bytes:
            header = f"bytes={span[0]}-{span[1] - 1}"
            data: bytes = client.get_object(Bucket=bucket, Key=key, Range=header)["Body"].read()
            return data

        clients["botocore.ranges"] = lambda: concurrently(botocore_range)
        clients["botocore.open"] = lambda: streamed(client.get_object(Bucket=bucket, Key=key)["Body"])
    return clients


def listers(storage: Storage, url: str) -> dict[str, Lister]:
    """Return ways to list the folder, with sizes, by name."""
    file_system, path = _fsspec(storage.config, url)

    def fsspec_ls() -> list[str]:
        file_system.invalidate_cache()
        return [entry["name"].rpartition("/")[2] for entry in file_system.ls(path, detail=True)]

    clients: dict[str, Lister] = {"mome": lambda: list(storage.list_info(url)), "fsspec.ls": fsspec_ls}
    if bucket_and_key := _bucket_and_key(url):
        pages, (bucket, prefix) = _botocore_client(storage.config).get_paginator("list_objects_v2"), bucket_and_key
        clients["botocore.list_objects_v2"] = lambda: [
            item["Key"].rpartition("/")[2]
            for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
            for item in page.get("Contents", [])
        ]
    return clients


def _bucket_and_key(url: str) -> tuple[str, str] | None:
    """Return the bucket and key of an S3 URL; None for another URL."""
    protocol, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return (bucket, key) if protocol in ("s3", "s3a") else None


def _fsspec(config: StorageConfig, url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if _bucket_and_key(url):
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


# ---- measuring


def _rounds(measure: Callable[[Any], Figures], clients: dict[str, Any], rounds: int, progress: Progress) -> Any:
    """Return the medians of each client's figures; the order rotates, so that no client is always first."""
    names = list(clients)
    measured: dict[str, list[Figures]] = {name: [] for name in names}
    for name in names:
        measure(clients[name])  # connections and imports
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            progress(f"round {number + 1} of {rounds}: {name}")
            measured[name].append(measure(clients[name]))
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
    """Yield the methods of the HTTP requests that this process sends through botocore or aiobotocore."""
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.httpsession import URLLib3Session

    sent: list[str] = []
    with ExitStack() as stack:
        for session in (AIOHTTPSession, URLLib3Session):

            def counted(self: Any, request: Any, send: Callable[..., Any] = session.send) -> Any:
                sent.append(request.method)
                return send(self, request)

            stack.enter_context(patch.object(session, "send", counted))
        yield sent


@contextmanager
def _own_store() -> Iterator[tuple[str, str, StorageConfig]]:
    """Yield a store for the benchmark: moto's server in a process of its own, else a local folder."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        with tempfile.TemporaryDirectory(prefix="mome-bench-") as folder:
            yield "local", folder, StorageConfig()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = StorageConfig(
        endpoint_url=f"http://127.0.0.1:{port}", key=f"env:{KEY_VARIABLE}", secret=f"env:{KEY_VARIABLE}"
    )
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        patch.dict(os.environ, {KEY_VARIABLE: "bench"}),
    ):
        try:
            deadline = time.monotonic() + SERVER_START_SECONDS
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError as error:
                    if time.monotonic() > deadline or server.poll() is not None:
                        message = "moto's server did not start; name a store to measure: mome bench storage URL"
                        raise StorageError(message) from error
                    time.sleep(0.05)
            _botocore_client(config).create_bucket(Bucket="bench")
            yield "moto", "s3://bench", config
        finally:
            server.terminate()
