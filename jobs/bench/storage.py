"""`mome bench storage`: read and list speed of a store with our client, fsspec and botocore.

CPU seconds are of this process alone; with moto's server, which copies the object for each range, only they count.
"""

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import fsspec

from pipeline.config.errors import StorageError
from pipeline.config.load import resolve_secret
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join

MIB = 2**20
SERVER_START_SECONDS = 30.0
KEY_VARIABLE = "MOME_BENCH_KEY"  # holds the key for moto, which accepts any

Figures = dict[str, float]
Client = Callable[[], Iterable[bytes | str]]  # reads the object, or lists the folder


def bench_storage(
    url: str | None = None,
    config: StorageConfig = StorageConfig(),
    *,
    object_bytes: int = 128 * MIB,
    range_bytes: int = 8 * MIB,
    in_flight: int = 4,
    objects: int = 500,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure the store behind the folder `url`; without one, moto's server, or a local folder where moto is absent.

    `read` and `list` hold, by client, MB (10^6 bytes) per second, CPU seconds per GiB, seconds until the caller has the
    first byte, and HTTP requests (0 where the store is not reached by S3). What is written is deleted.
    """
    with ExitStack() as stack:
        kind = "given"
        if url is None:
            kind, url, config = stack.enter_context(_own_store())
        storage = Storage(config)
        folder = join(url, f"mome-bench-{secrets.token_hex(6)}")
        stack.callback(storage.delete, folder)
        progress(f"writing {object_bytes / MIB:.0f} MiB and {objects} objects")
        with tempfile.NamedTemporaryFile(prefix="mome-bench-") as file:
            for offset in range(0, object_bytes, MIB):
                file.write(os.urandom(min(MIB, object_bytes - offset)))  # no store can compress it
            file.flush()
            storage.upload(file.name, join(folder, "object"))
        with ThreadPoolExecutor(in_flight) as threads:
            list(threads.map(lambda number: storage.write(join(folder, "many", f"{number:06d}"), b"x"), range(objects)))
        readers, listers = clients_of(storage, folder, object_bytes, range_bytes, in_flight)
        read = _medians(readers, object_bytes, f"{folder}/object: {{}} of {{}} bytes were read", rounds, progress)
        listed = _medians(listers, objects, f"{folder}/many: {{}} of {{}} objects were listed", rounds, progress)
    for figures in read.values():
        figures["mb_per_second"] = object_bytes / 1e6 / figures.pop("seconds")
        figures["cpu_seconds_per_gib"] = figures.pop("cpu_seconds") / object_bytes * 2**30
    for figures in listed.values():
        figures["objects_per_second"] = objects / figures["seconds"]
        del figures["first_byte_seconds"]
    settings = {"object_bytes": object_bytes, "range_bytes": range_bytes, "in_flight": in_flight, "rounds": rounds}
    return {"url": url, "store": kind, **settings, "read": read, "list": {"objects": objects, **listed}}


def clients_of(
    storage: Storage, folder: str, size: int, range_bytes: int, in_flight: int
) -> tuple[dict[str, Client], dict[str, Client]]:
    """Return ways to read `folder`/object, of `size` bytes in ranges, and to list `folder`/many, by client."""
    config, url, starts = storage.config, f"{folder}/object", list(range(0, size, range_bytes))
    stops = [*starts[1:], size]
    protocol, _, rest = folder.partition("://")
    keys = {"key": resolve_secret(config.key), "secret": resolve_secret(config.secret)}
    options = {**keys, "endpoint_url": config.endpoint_url, "skip_instance_cache": True}
    is_s3 = protocol in ("s3", "s3a")
    file_system, path = fsspec.core.url_to_fs(folder, **(options if is_s3 else {}))
    ranges, paths = {"batch_size": in_flight} if file_system.async_impl else {}, [f"{path}/object"] * len(starts)

    def concurrently(read: Callable[[int, int], bytes]) -> Iterator[bytes]:
        with ThreadPoolExecutor(in_flight) as threads:
            yield from threads.map(read, starts, stops)

    def streamed(stream: Any) -> Iterator[bytes]:
        with closing(stream):
            while data := stream.read(MIB):
                yield data

    readers: dict[str, Client] = {
        "mome": lambda: concurrently(partial(storage.read, url, etag=storage.info(url).etag)),
        "mome.open": lambda: streamed(storage.open(url)),
        "fsspec.cat_ranges": lambda: file_system.cat_ranges(paths, starts, stops, on_error="raise", **ranges),
        "fsspec.open": lambda: streamed(file_system.open(f"{path}/object", "rb")),
    }
    listers: dict[str, Client] = {
        "mome": lambda: list(storage.list_info(join(folder, "many"))),
        "fsspec.ls": lambda: [
            entry["name"].rpartition("/")[2] for entry in file_system.ls(f"{path}/many", detail=True, refresh=True)
        ],
    }
    if not is_s3:
        return readers, listers

    import botocore.session
    from botocore.config import Config

    client = botocore.session.get_session().create_client(
        "s3",
        os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        endpoint_url=config.endpoint_url,
        aws_access_key_id=keys["key"],
        aws_secret_access_key=keys["secret"],
        config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
    )
    bucket, _, prefix = rest.partition("/")
    place, pages = {"Bucket": bucket, "Key": f"{prefix}/object"}, client.get_paginator("list_objects_v2")
    readers["botocore.ranges"] = lambda: concurrently(
        lambda start, stop: client.get_object(**place, Range=f"bytes={start}-{stop - 1}")["Body"].read()
    )
    readers["botocore.open"] = lambda: streamed(client.get_object(**place)["Body"])
    listers["botocore.list_objects_v2"] = lambda: [
        item["Key"].rpartition("/")[2]
        for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/many/", Delimiter="/")
        for item in page.get("Contents", [])
    ]
    return readers, listers


def _medians(
    clients: dict[str, Client], expected: int, shortfall: str, rounds: int, progress: Callable[[str], None]
) -> dict[str, Figures]:
    """Return each client's median figures; raise StorageError unless `expected` bytes or names arrive."""
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.httpsession import URLLib3Session

    names, sent = list(clients), list[str]()
    measured: dict[str, list[Figures]] = {name: [] for name in names}
    orders = [names[number % len(names) :] + names[: number % len(names)] for number in range(rounds)]
    with ExitStack() as stack:
        for session in (AIOHTTPSession, URLLib3Session):

            def counted(self: Any, request: Any, send: Callable[..., Any] = session.send) -> Any:
                sent.append(request.method)
                return send(self, request)

            stack.enter_context(patch.object(session, "send", counted))
        for number, order in enumerate([names, *orders]):  # round 0 makes connections and imports, and does not count
            for name in order:
                progress(f"round {number} of {rounds}: {name}" if number else f"connecting: {name}")
                count, first = 0, None
                sent.clear()
                cpu, started = time.process_time(), time.perf_counter()
                for item in clients[name]():
                    first = first or time.perf_counter()
                    count += len(item) if isinstance(item, bytes) else 1
                seconds, spent = time.perf_counter() - started, time.process_time() - cpu
                if first is None or count != expected:
                    raise StorageError(shortfall.format(count, expected))
                figures = {"seconds": seconds, "cpu_seconds": spent, "first_byte_seconds": first - started}
                measured[name].append(figures | {"requests": len(sent)})
    return {name: {key: median(run[key] for run in runs[1:]) for key in runs[0]} for name, runs in measured.items()}


@contextmanager
def _own_store() -> Iterator[tuple[str, str, StorageConfig]]:
    """Yield a store for the benchmark: moto's server in a process of its own, else a local folder."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        with tempfile.TemporaryDirectory(prefix="mome-bench-") as folder:
            yield "local", folder, StorageConfig()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    endpoint, key = f"http://127.0.0.1:{port}", f"env:{KEY_VARIABLE}"
    create_bucket = urllib.request.Request(f"{endpoint}/bench", method="PUT")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        patch.dict(os.environ, {KEY_VARIABLE: "bench"}),
    ):
        try:
            deadline = time.monotonic() + SERVER_START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(create_bucket, timeout=SERVER_START_SECONDS).close()
                    break
                except OSError as error:
                    if time.monotonic() > deadline or server.poll() is not None:
                        remedy = "name a store to measure: mome bench storage URL"
                        raise StorageError(f"moto's server did not start; {remedy}") from error
                    time.sleep(0.05)
            yield "moto", "s3://bench", StorageConfig(endpoint_url=endpoint, key=key, secret=key)
        finally:
            server.terminate()
