"""Transient faults: reads, writes and streams through a faulty network are byte-equal or raise (C1, C7)."""

import itertools
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import ObjectChanged, Storage
from pipeline.data.storage import s3 as module
from tests.support.data_stream import copy_shards, hash_of, stream_config
from tests.support.fault_proxy import FaultProxy

OUTAGE = float(os.environ.get("MOME_OUTAGE_SECONDS", "5"))  # the bar is 60; continuous integration waits less
DATA = random.Random(0).randbytes(3_000_000)
Through = Callable[..., tuple[FaultProxy, Storage]]


@pytest.fixture
def through(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Through]:
    """Return through(deadline=seconds, **faults): a proxy in front of the store, and a Storage that uses it."""
    monkeypatch.setattr(module, "PART_BYTES", 5 * 2**20)
    with ExitStack() as open_proxies:

        def make(deadline: float = 20.0, **faults) -> tuple[FaultProxy, Storage]:
            proxy = open_proxies.enter_context(FaultProxy(s3.endpoint, **faults))
            settings = {"endpoint_url": proxy.endpoint, "retry_timeout_seconds": deadline}
            return proxy, Storage(s3.config.model_copy(update=settings))

        yield make


@pytest.fixture
def url(s3) -> str:
    Storage(s3.config).write(s3.url("object"), DATA)
    return s3.url("object")


def test_random_ranges_are_exact_under_heavy_faults(through: Through, url: str):
    rates = {"unavailable": 0.1, "lost": 0.05, "cut": 0.1, "short": 0.1, "longer": 0.05, "misplaced": 0.05}
    proxy, storage = through(seed=2, retry_after=0, **rates)
    chance = random.Random(1)
    ranges = [sorted(chance.sample(range(len(DATA) + 1), 2)) for _ in range(100)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda place: storage.read(url, *place), ranges))
    assert all(data == DATA[start:stop] for data, (start, stop) in zip(read, ranges, strict=True))
    assert set(proxy.injected) == set(rates)


STREAMS = {  # number of shards, faults, seconds of an outage
    "bar": (80, {"unavailable": 0.02, "cut": 0.01, "latency": 0.02}, 0.0),
    "heavy": (40, {"unavailable": 0.2, "cut": 0.1, "short": 0.1, "lost": 0.05}, 0.0),
    "outage": (40, {"latency": 0.02}, OUTAGE),
}


@pytest.mark.parametrize(("shards", "faults", "outage"), STREAMS.values(), ids=STREAMS)
def test_stream_over_a_faulty_network_equals_undisturbed(through: Through, s3, make_pairs, shards, faults, outage):
    folder, steps = make_pairs("pairs", [2] * shards), range(shards // 10)
    url = copy_shards(folder, s3)
    proxy, storage = through(max(20.0, 2 * outage), seed=1, **faults)
    if outage:
        proxy.away(outage, after=30)
    assert hash_of(stream_config(url, storage.config), steps) == hash_of(stream_config(folder), steps)
    assert bool(outage) == bool(proxy.injected["away"])
    assert outage or sum(proxy.injected.values()) > 0, "choose another seed: nothing went wrong"


def test_broken_body_is_resumed_at_the_failed_byte(through: Through, url: str):
    for fault in ("cut", "short"):
        proxy, storage = through()
        proxy.inject(fault, fault, fault)
        assert storage.read(url, 100_000, 2_900_000) == DATA[100_000:2_900_000]
        starts = [100_000, *(100_000 + sent for sent in itertools.accumulate(served.sent for served in proxy.served))]
        assert [served.range for served in proxy.served] == [(start, 2_900_000) for start in starts[:-1]]
        assert (len(proxy.served), proxy.bytes_sent) == (4, 2_800_000)  # no byte was requested twice
    proxy, storage = through()
    proxy.inject("short", "cut")
    assert storage.read(url) == DATA
    assert proxy.bytes_sent == len(DATA)
    with storage.open(url) as stream:
        proxy.inject("cut")
        assert stream.read() == DATA
    assert proxy.injected == {"short": 1, "cut": 2}
    assert [served.method for served in proxy.served] == ["GET"] * 3 + ["HEAD", "GET", "GET"]
    proxy, storage = through(deadline=4.0)
    proxy.inject("stall", "stall")
    assert storage.read(url) == DATA
    assert (proxy.injected, proxy.bytes_sent) == ({"stall": 2}, len(DATA))


def test_read_accepts_no_other_range_and_never_mixes_two_versions(through: Through, s3, url: str):
    for fault in ("longer", "misplaced"):
        proxy, storage = through()
        proxy.inject(fault)
        assert storage.read(url, 5, 1_000_000) == DATA[5:1_000_000]
        assert (proxy.injected, len(proxy.served)) == ({fault: 1}, 2)
    proxy, storage = through()
    proxy.inject("short")
    proxy.rates["unavailable"] = 1.0  # from the second request on
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(storage.read, url, 0, len(DATA))
        while not proxy.injected["unavailable"]:
            pass
        assert 0 < proxy.bytes_sent < len(DATA)
        Storage(s3.config).write(url, bytes(reversed(DATA)))
        proxy.rates["unavailable"] = 0.0
        with pytest.raises(ObjectChanged, match=r"object: reading failed: the object was replaced while it was in use"):
            reading.result()
    _, storage = through(unavailable=0.3, seed=1)
    etag = storage.info(url).etag
    Storage(s3.config).write(url, DATA[:1000])
    for start in (0, 5000):
        with pytest.raises(StorageError, match=r"object: .*too short: it holds 1000 bytes, and bytes \d+ to 9000"):
            storage.read(url, start, 9000)
        with pytest.raises(ObjectChanged, match=r"object: .*replaced"):
            storage.read(url, start, 9000, etag)


def test_retries_respect_retry_after_and_end_at_the_deadline(through: Through, url: str):
    proxy, storage = through(retry_after=1)
    proxy.inject("unavailable", "unavailable")
    assert storage.read(url) == DATA
    assert (len(proxy.served), proxy.impatient) == (3, 0)
    _, refusing = through(deadline=1.0, unavailable=1.0, retry_after=3600)
    (gone, absent), (slow, stalling) = through(deadline=1.0), through(deadline=2.0, stall=1.0)
    gone.away(3600)
    for storage, message in (
        (refusing, r"^s3://.*/object: reading failed: .*SlowDown.*2 attempts in \d+ s\.$"),
        (absent, rf"did not answer .* at {gone.endpoint}\. .*endpoint_url.*Gave up after \d+ attempts in \d+ s"),
        (stalling, r"object: reading failed: .*Read timed out.*\d+ attempts in \d s"),
    ):
        with pytest.raises(StorageError, match=message):
            storage.read(url)
    assert slow.injected["stall"] > 1


def test_retried_writes_and_deletes_take_effect_once(through: Through, s3, tmp_path: Path):
    proxy, storage = through(lost=0.2, unavailable=0.2, seed=3)
    (tmp_path / "large").write_bytes(DATA * 4)
    storage.upload(tmp_path / "large", s3.url("run", "large"))
    for number in range(20):
        storage.write(s3.url("run", f"{number}.tar"), DATA[number : 2 * number])
    plain, url, edge = Storage(s3.config), s3.url("run", "large"), module.PART_BYTES  # of the first part
    assert plain.open(url).read() == DATA * 4
    infos = storage.list_info(s3.url("run"))
    assert infos["large"] == plain.info(url)
    assert plain.read(url, edge - 9, edge + 9, etag=infos["large"].etag) == (DATA * 2)[edge - 9 : edge + 9]
    sizes = {"large": 4 * len(DATA)} | {f"{number}.tar": number for number in range(20)}
    assert {name: info.size for name, info in infos.items()} == sizes
    storage.delete(s3.url("run"))
    assert plain.list(s3.url()) == []
    assert min(proxy.injected[kind] for kind in ("lost", "unavailable")) > 3


def test_parts_are_sent_concurrently_and_retried(through: Through, s3):
    """The source returns no part until four were requested; then the responses to two parts and to the end are lost."""
    proxy, storage = through()
    proxy.inject("lost", "unavailable", of="PUT .*partNumber=")
    proxy.inject("lost", of="POST .*uploadId=")
    data, together = DATA * 7, threading.Barrier(4)

    def part(start: int, stop: int) -> bytes:
        if start < 4 * module.PART_BYTES and not together.broken and proxy.injected.total() == 0:
            together.wait(20)
        return data[start:stop]

    storage.write_parts(s3.url("large"), len(data), part)
    assert sum(proxy.injected.values()) == 3
    assert Storage(s3.config).read(s3.url("large")) == data
    assert storage.abort_uploads(s3.url()) == 0


def test_parts_of_unfinished_uploads_are_removed(through: Through, s3):
    proxy, storage = through()
    part = mock.Mock(side_effect=lambda start, stop: bytes(stop - start) if start == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.write_parts(s3.url("large"), 4 * module.PART_BYTES, part)
    assert not storage.exists(s3.url("large"))
    assert storage.abort_uploads(s3.url()) == 0
    client = module.make_client(s3.config)
    for key in ("run/a", "run/b/c", "other"):
        upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")
    proxy.inject("lost", of="DELETE .*uploadId=")
    assert storage.abort_uploads(s3.url("run")) >= 1  # a lost response is not counted
    assert storage.abort_uploads(s3.url("run")) == 0
    assert storage.abort_uploads(s3.url()) == 1


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_object_is_created_once_whole_or_in_parts(through: Through, s3):
    _, storage = through()
    for size in (10, 11 * 2**20):
        created = [storage.write(s3.url(f"{size}"), data * size, create=True) for data in (b"a", b"b")]
        assert (created, storage.read(s3.url(f"{size}"))) == ([True, False], b"a" * size)
    assert storage.abort_uploads(s3.url()) == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_started_during_reads_open_new_connections(through: Through, url: str, method: str):
    (_, storage), done = through(latency=0.001, cut=0.2), threading.Event()

    def keep_reading() -> None:
        while not done.is_set():
            assert storage.read(url, 1000, 200_000) == DATA[1000:200_000]

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(keep_reading) for _ in range(3)]
        try:
            for _ in range(3):
                with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as child:
                    assert child.submit(storage.read, url).result(60) == DATA
        finally:
            done.set()
        for reader in readers:
            reader.result()
