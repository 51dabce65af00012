"""Samples are read exactly as packed, from folders, stores and caches, and changed shards are rejected."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import random
import resource
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.errors import DataError
from pipeline.config.schema import LoaderConfig, SourceConfig, StorageConfig
from pipeline.data.order import DataOrder, OrderSource, SampleRef
from pipeline.data.reading import cache as cache_module
from pipeline.data.reading import shard_reader as module
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.samples import SampleReader, iter_captions, iter_samples, sample_uid
from pipeline.data.reading.shard_reader import make_shard_view
from pipeline.data.shards.manifest import index_shards, load_index, load_manifest
from pipeline.data.shards.source import Source, open_source
from pipeline.data.storage import Storage, join

ON_MOTO = pytest.mark.parametrize("s3", ["moto"], indirect=True)
SIZES = [40, 25, 33, 8, 40, 36, 21, 37]  # 240 samples


class CountingStorage(Storage):
    """Storage that records the requested ranges of tars."""

    def __init__(self, config: StorageConfig = StorageConfig()):
        super().__init__(config)
        self.ranges: list[tuple[str, int, int]] = []

    def read_range(self, url: str, start: int, stop: int, etag: str | None = None) -> bytes:
        self.ranges.append((url.rpartition("/")[2], start, stop))
        return super().read_range(url, start, stop, etag)


def source_of(folder: str) -> Source:
    return Source(folder, load_manifest(Storage(), folder))


def reader(folder: str, storage: Storage | None = None) -> SampleReader:
    return SampleReader(storage or Storage(), {"pairs": source_of(folder)})


@pytest.fixture
def folder(make_pairs) -> str:
    folder = make_pairs("pairs", [6, 4])
    index_shards(Storage(), folder)
    return folder


def test_sample_has_the_packed_bytes(folder: str, make_pair):
    sample = reader(folder).read(SampleRef("pairs", 0, 1, 2))
    assert sample.members == make_pair(8)
    assert (sample.shard, sample.key) == ("00001.tar", "pairs00008")
    data = Path(folder, "00001.tar").read_bytes()
    assert data[sample.offset : sample.offset + len(sample.members["jpg"])] == sample.members["jpg"]


def test_uid_does_not_depend_on_the_reader(folder: str, make_pairs):
    manifest = load_manifest(Storage(), folder)
    sample = reader(folder).read(SampleRef("pairs", 5, 1, 2))
    assert sample.uid == sample_uid(manifest.shards[1], 2)
    assert -(2**63) <= sample.uid < 2**63
    uids = {s.uid for s in iter_samples(Storage(), folder)}
    assert len(uids) == 10
    assert sample.uid in uids


def test_captions_are_in_order(folder: str):
    captions = list(iter_captions(Storage(), folder))
    assert len(captions) == 30
    assert captions[3] == "picture 1 shows a thing in way a"


def test_equal_images_and_duplicate_keys_are_identified(tmp_path: Path, make_tar, make_pair):
    parts = [make_tar({key: make_pair(number)}) for key, number in [("a", 0), ("b", 1), ("a", 2), ("c", 1)]]
    data = b"".join(part.rstrip(b"\0") + bytes(-len(part.rstrip(b"\0")) % 512) for part in parts) + bytes(1024)
    (tmp_path / "0.tar").write_bytes(data)
    index_shards(Storage(), str(tmp_path))
    samples = list(iter_samples(Storage(), str(tmp_path)))
    assert [sample.is_duplicate for sample in samples] == [False, False, True, False]
    assert len({sample.image_id for sample in samples}) == 3
    assert samples[1].image_id == samples[3].image_id != 0


def test_sample_refs_count_selected_samples(folder: str):
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    listed = Path(folder, "opt_out.txt")
    listed.write_text("\n".join([index.keys[0], index.keys[3]]))
    source = open_source(Storage(), SourceConfig(shards=folder, opt_out=str(listed)))
    chosen = SampleReader(Storage(), {"pairs": source})
    assert source.counts.tolist() == [4, 4]
    assert [chosen.read(SampleRef("pairs", 0, 0, at)).key for at in range(4)] == [index.keys[n] for n in (1, 2, 4, 5)]
    assert [chosen.index(SampleRef("pairs", 0, 0, at))[1] for at in range(4)] == [1, 2, 4, 5]
    everything = reader(folder)
    assert chosen.read(SampleRef("pairs", 0, 0, 2)) == everything.read(SampleRef("pairs", 0, 0, 4))


def test_missing_shard_raises_before_reading(folder: str):
    os.unlink(f"{folder}/00001.tar")
    with pytest.raises(DataError, match=r"00001\.tar: the shard is missing"):
        reader(folder)


def cut_places(folder: str) -> dict[str, int]:
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    start, stop = index.byte_range(3)
    end = -(-index.byte_range(5)[1] // 512) * 512
    return {
        "inside a header": start - 100,
        "inside a member's data": start + 50,
        "between two samples": -(-stop // 512) * 512,
        "before the zero blocks": end,
        "between the zero blocks": end + 512,
    }


@pytest.mark.parametrize("cut", range(5))
def test_truncated_shard_is_rejected_by_name(folder: str, cut: int):
    os.truncate(f"{folder}/00000.tar", list(cut_places(folder).values())[cut])
    with pytest.raises(DataError, match=r"00000\.tar: the shard was truncated"):
        reader(folder)


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("cut", range(3))
def test_shard_truncated_during_the_run_is_rejected_by_name(folder: str, cut: int, is_open: bool):
    opened = reader(folder)
    if is_open:
        opened.read(SampleRef("pairs", 0, 0, 0))
    os.truncate(f"{folder}/00000.tar", list(cut_places(folder).values())[cut])
    with pytest.raises(DataError, match=r"00000\.tar: the shard was truncated"):
        opened.read(SampleRef("pairs", 0, 0, 4))


def test_shard_deleted_during_the_run_is_rejected_by_name(folder: str):
    opened = reader(folder)
    os.unlink(f"{folder}/00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar: the shard is missing, and was there at first"):
        opened.read(SampleRef("pairs", 0, 0, 4))


def test_changed_shard_of_equal_size_is_rejected_by_name(folder: str):
    path = Path(folder, "00000.tar")
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    data, times = bytearray(path.read_bytes()), path.stat()
    data[index.byte_range(3)[0] + 20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened = reader(folder)
    opened.read(SampleRef("pairs", 0, 0, 2))
    with pytest.raises(DataError, match=r"00000\.tar: the shard was changed: sample 'pairs00003'"):
        opened.read(SampleRef("pairs", 0, 0, 3))


def test_number_of_open_files_is_bounded(make_pairs, monkeypatch: pytest.MonkeyPatch):
    folder = make_pairs("many", [1] * 40)
    index_shards(Storage(), folder)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    opened, most = reader(folder), 0
    for shard in range(40):
        opened.read(SampleRef("pairs", 0, shard, 0))
        most = max(most, open_tars(folder))
    assert most == 16
    opened.close()
    assert open_tars(folder) == 0


def open_tars(folder: str) -> int:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(str(os.path.realpath(link)).startswith(folder + "/") for link in links)


def test_chunks_cover_the_shard_and_are_never_small(make_pairs, monkeypatch: pytest.MonkeyPatch):
    folder = make_pairs("pairs", [40])
    index_shards(Storage(), folder)
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    for least in (1, 3000, 10_000, 10**9):
        monkeypatch.setattr(module, "CHUNK_BYTES", least)
        opened = make_shard_view(index)
        chunks = sorted({opened.chunk(sample) for sample in range(40)})
        for sample in range(40):
            start, stop = opened.chunk(sample)
            assert start <= index.byte_range(sample)[0]
            assert index.byte_range(sample)[1] <= stop
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(chunks))
        assert len(chunks) == 1 or all(stop - start > least - 1024 for start, stop in chunks)
        assert sum(opened.num_selected(which) for which in range(len(chunks))) == 40
        some = make_shard_view(index, np.array([0, 7, 39]))
        assert sum(some.num_selected(which) for which in range(len(chunks))) == 3
    assert len(chunks) == 1


def memory_copy(folder: str, name: str) -> str:
    url = f"memory://{name}"
    for file in os.listdir(folder):
        Storage().write(f"{url}/{file}", Path(folder, file).read_bytes())
    return url


def test_remote_equals_local_and_each_chunk_is_fetched_once(folder: str, monkeypatch: pytest.MonkeyPatch):
    url = memory_copy(folder, "once")
    local, remote = reader(folder), reader(url)
    fetches = []
    fetch = module.ShardReader.fetch

    def slow(shards, shard, start, stop):
        fetches.append((shard, start))
        time.sleep(0.05)
        return fetch(shards, shard, start, stop)

    slots = [SampleRef("pairs", 0, shard, sample) for shard, size in enumerate([6, 4]) for sample in range(size)]
    expected = [local.read(slot) for slot in slots]
    monkeypatch.setattr(module.ShardReader, "fetch", slow)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(remote.read, slots)) == expected
    assert sorted(shard for shard, _ in fetches) == [0, 1]
    Storage().delete(url)


def test_bytes_damaged_in_transit_are_read_again(folder: str, monkeypatch: pytest.MonkeyPatch):
    url = memory_copy(folder, "damage")
    remote, fetch, times = reader(url), module.ShardReader.fetch, []

    def damaged(shards, shard, start, stop):
        data = bytearray(fetch(shards, shard, start, stop))
        times.append(1)
        if len(times) == 1:
            data[10] ^= 255
        return bytes(data)

    monkeypatch.setattr(module.ShardReader, "fetch", damaged)
    assert remote.read(SampleRef("pairs", 0, 0, 0)) == reader(folder).read(SampleRef("pairs", 0, 0, 0))
    assert np.sum(times) >= 2
    Storage().delete(url)


# ---- prefetching from a store


class Epoch:
    """One epoch of 240 samples in batches of 8, over 2 streams with windows of 1 shard; shards have several chunks."""

    def __init__(self, folder: str, url: str):
        self.url, self.source = url, source_of(folder)
        self.order = DataOrder(
            {"pairs": OrderSource(self.source.counts, 1.0, self.source.digest)},
            num_streams=2,
            shuffle_window=1,
            seed=3,
            batch_size=8,
        )
        self.steps = range(30)
        local = reader(folder)
        self.expected = [[local.read(slot) for slot in self.order.batch(step)] for step in self.steps]
        indexes = [load_index(Storage(), folder, record) for record in self.source.manifest.shards]
        self.chunks = {
            (record.name, *make_shard_view(index).chunk(number))
            for record, index in zip(self.source.manifest.shards, indexes, strict=True)
            for number in range(len(index))
        }

    def read(self, storage: Storage, loader: LoaderConfig, cache: NodeCache | None = None, places: range = range(8)):
        """Return the samples of each step, read by four threads two batches ahead."""
        source = Source(self.url, self.source.manifest)
        with SampleReader(storage, {"pairs": source}, loader, cache) as remote, ThreadPoolExecutor(4) as pool:
            remote.start_prefetch(lambda step: self.order.samples(step, places) if step in self.steps else [], 0)
            read = {}
            begun: dict[int, list] = {}
            for step in self.steps:
                for ahead in range(step, min(step + 3, self.steps.stop)):
                    if ahead not in begun:
                        begun[ahead] = [pool.submit(remote.read, slot) for slot in self.order.samples(ahead, places)]
                read[step] = [run.result(60) for run in begun[step]]
                remote.finish_step(step)
        return [read[step] for step in self.steps]


@pytest.fixture
def epoch(s3, make_pairs, monkeypatch: pytest.MonkeyPatch) -> Epoch:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16_000)
    monkeypatch.setattr(cache_module, "PIECE", 16_000)
    folder, storage = make_pairs("pairs", SIZES), Storage(s3.config)
    index_shards(Storage(), folder)
    for name in sorted(os.listdir(folder)):
        storage.upload(Path(folder, name), join(s3.url("pairs"), name))
    return Epoch(folder, s3.url("pairs"))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


ROOM = LoaderConfig(memory_bytes=2**20, read_ahead_bytes=30_000, max_concurrent_requests=4)


@ON_MOTO
def test_epoch_from_a_store_fetches_each_chunk_once(s3, epoch: Epoch, caplog: pytest.LogCaptureFixture):
    storage = CountingStorage(s3.config)
    assert epoch.read(storage, ROOM) == epoch.expected
    assert len(epoch.chunks) > 30
    assert Counter(storage.ranges) == Counter(epoch.chunks)
    assert warnings_in(caplog) == []


@ON_MOTO
def test_memory_of_open_windows_and_prefetch_suffices(s3, epoch: Epoch, caplog: pytest.LogCaptureFixture):
    storage, total = CountingStorage(s3.config), sum(stop - start for _, start, stop in epoch.chunks)
    loader = ROOM.model_copy(update={"memory_bytes": total * 6 // 10})
    assert epoch.read(storage, loader) == epoch.expected
    assert Counter(storage.ranges) == Counter(epoch.chunks)
    assert warnings_in(caplog) == []


@ON_MOTO
def test_too_little_memory_warns_once_and_changes_no_sample(s3, epoch: Epoch, caplog: pytest.LogCaptureFixture):
    storage = CountingStorage(s3.config)
    assert epoch.read(storage, ROOM.model_copy(update={"memory_bytes": 60_000})) == epoch.expected
    assert len(storage.ranges) > len(epoch.chunks) == len(set(storage.ranges))
    assert warnings_in(caplog) == [
        "data.loader.memory_bytes 60000 is below what the open windows of this process need: chunks of shards are "
        "fetched more than once. Raise it, lower data.shuffle_window, or set data.cache.folder"
    ]


@ON_MOTO
def test_readers_of_one_node_share_the_cache(s3, epoch: Epoch, tmp_path: Path):
    cache = NodeCache(tmp_path / "cache", 2**30)
    first, second, warm = (CountingStorage(s3.config) for _ in range(3))
    with ThreadPoolExecutor(2) as pool:
        halves = [
            pool.submit(epoch.read, storage, ROOM, cache, places)
            for storage, places in ((first, range(4)), (second, range(4, 8)))
        ]
        batches = [a + b for a, b in zip(*(half.result() for half in halves), strict=True)]
    assert batches == epoch.expected
    pieces = Counter(first.ranges) + Counter(second.ranges)
    assert set(pieces.values()) == {1}
    covered = sum(stop - start for _, start, stop in pieces)
    assert covered == sum(shard.bytes for shard in epoch.source.manifest.shards) == cache.held_bytes()
    assert epoch.read(warm, ROOM, cache) == epoch.expected
    assert warm.ranges == []


@ON_MOTO
def test_full_cache_warns_once_and_changes_no_sample(
    s3, epoch: Epoch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    largest = max(shard.bytes for shard in epoch.source.manifest.shards)
    cache = NodeCache(tmp_path, largest * 3 // 2)
    assert epoch.read(Storage(s3.config), ROOM, cache) == epoch.expected
    (message,) = warnings_in(caplog)
    assert "no room for its" in message
    assert f"data.cache.max_bytes is {cache.max_bytes}. Raise it; such shards are read over the network" in message
    assert cache.held_bytes() <= cache.max_bytes


@ON_MOTO
def test_damaged_cached_shard_is_downloaded_again(s3, epoch: Epoch, tmp_path: Path):
    cache = NodeCache(tmp_path, 2**30)
    epoch.read(Storage(s3.config), ROOM, cache)
    for path in cache.folder.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    storage = CountingStorage(s3.config)
    assert epoch.read(storage, ROOM, cache) == epoch.expected
    assert set(Counter(storage.ranges).values()) == {1}
    storage.ranges.clear()
    assert epoch.read(storage, ROOM, cache) == epoch.expected
    assert storage.ranges == []


@ON_MOTO
def test_cached_shard_truncated_during_reads_loses_no_sample(s3, epoch: Epoch, tmp_path: Path):
    cache = NodeCache(tmp_path, 2**30)
    with SampleReader(Storage(s3.config), {"pairs": Source(epoch.url, epoch.source.manifest)}, ROOM, cache) as remote:
        remote.read(SampleRef("pairs", 0, 0, 0))
        (cached,) = cache.folder.glob("*.tar")
        os.truncate(cached, 1000)
        assert remote.read(SampleRef("pairs", 0, 0, 39)).key == "pairs00039"
        assert remote.read(SampleRef("pairs", 0, 0, 38)).key == "pairs00038"
    assert cached.stat().st_size == epoch.source.manifest.shards[0].bytes


@ON_MOTO
@pytest.mark.parametrize("is_cached", [False, True])
def test_shard_replaced_in_the_store_is_rejected_by_name(s3, epoch: Epoch, tmp_path: Path, is_cached: bool):
    storage = Storage(s3.config)
    cache = NodeCache(tmp_path, 2**30) if is_cached else None
    source = Source(epoch.url, epoch.source.manifest)
    with SampleReader(storage, {"pairs": source}, ROOM, cache) as remote:
        data = bytearray(storage.read(join(epoch.url, "00002.tar")))
        data[600] ^= 1
        storage.write(join(epoch.url, "00002.tar"), bytes(data))
        remote.start_prefetch(lambda step: epoch.order.batch(step) if step in epoch.steps else [], 0)
        remote.read(SampleRef("pairs", 0, 1, 0))
        with pytest.raises(
            DataError, match=r"00002\.tar: the shard was changed: it was replaced while the run read it"
        ):
            remote.read(SampleRef("pairs", 0, 2, 0))


@ON_MOTO
def test_prefetch_can_restart_at_another_step(s3, epoch: Epoch):
    storage = CountingStorage(s3.config)
    source = Source(epoch.url, epoch.source.manifest)
    with SampleReader(storage, {"pairs": source}, ROOM) as remote:
        for start in (15, 3):
            remote.start_prefetch(lambda step: epoch.order.batch(step) if step in epoch.steps else [], start)
            for step in range(start, start + 10):
                assert [remote.read(slot) for slot in epoch.order.batch(step)] == epoch.expected[step]
                remote.finish_step(step)
    assert set(Counter(storage.ranges).values()) == {1}


def threads_of_readers() -> list[str]:
    names = ("requests", "downloads", "read-ahead")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@ON_MOTO
def test_reader_owns_its_threads(s3, epoch: Epoch, tmp_path: Path):
    source = Source(epoch.url, epoch.source.manifest)
    remote = SampleReader(Storage(s3.config), {"pairs": source}, ROOM, NodeCache(tmp_path, 2**30))
    assert threads_of_readers() == []
    remote.start_prefetch(lambda step: epoch.order.batch(step) if step in epoch.steps else [], 0)
    remote.read(epoch.order.sample(0, 0))
    assert "read-ahead" in threads_of_readers()
    remote.close()
    assert threads_of_readers() == []
    assert NodeCache(tmp_path, 1).held_bytes() % 512 == 0
    assert not list(tmp_path.rglob("*.part"))


def test_local_sources_start_no_thread(folder: str):
    local = reader(folder)
    local.start_prefetch(lambda step: [SampleRef("pairs", 0, 0, 0)], 0)
    local.read(SampleRef("pairs", 0, 0, 0))
    local.finish_step(0)
    assert threads_of_readers() == []


@pytest.mark.parametrize("where", ["local", "memory"])
def test_hard_links_are_read_from_their_target(where: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.data.reading.shard_reader.CHUNK_BYTES", 4096)
    rng = random.Random(5)
    buffer, files, expected = io.BytesIO(), [], []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(60):
            members = {}
            for extension in ("txt", "json"):
                info = tarfile.TarInfo(f"{number:02d}.{extension}")
                if files and rng.random() < 0.4:
                    info.linkname, content = rng.choice(files)
                    info.type = tarfile.LNKTYPE
                    tar.addfile(info)
                else:
                    content = json.dumps({"caption": f"{extension} {number}" * rng.randint(1, 90)}).encode()
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                files.append((info.name, content))
                members[extension] = content
            expected.append((f"{number:02d}", members))
    folder = str(tmp_path) if where == "local" else "memory://links"
    storage = Storage()
    storage.write(f"{folder}/0.tar", buffer.getvalue())
    manifest = index_shards(storage, folder)
    opened = make_shard_view(load_index(storage, folder, manifest.shards[0]))
    assert len(opened.chunks) > 3
    for number in range(60):
        start, stop = opened.chunk(number)
        assert all(start <= at and at + size <= stop for _, at, size in opened.index.members(number))
    assert [(sample.key, sample.members) for sample in iter_samples(storage, folder)] == expected
