"""Samples are read exactly as packed, from folders, stores and caches, and changed shards are rejected."""

import io
import itertools
import json
import os
import random
import re
import resource
import tarfile
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.config.errors import DataError
from pipeline.config.schema import LoaderConfig, SourceConfig
from pipeline.data.order import DataOrder, OrderSource, SampleRef
from pipeline.data.randomness import hash64
from pipeline.data.reading import cache as cache_module
from pipeline.data.reading import samples as module
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.samples import SampleReader, iter_captions, iter_samples, make_shard_view
from pipeline.data.shards.manifest import index_shards, load_index, load_manifest
from pipeline.data.shards.source import Source, open_source
from pipeline.data.storage import Storage
from tests.support.cache_reader import held_bytes
from tests.support.pairs import Watched, tar_of


def reader(folder: str, storage: Storage | None = None) -> SampleReader:
    storage = storage or Storage()
    return SampleReader(storage, {"pairs": Source(folder, load_manifest(storage, folder))})


def ref(shard: int, sample: int) -> SampleRef:
    return SampleRef("pairs", 0, shard, sample)


def view_of(folder: str, number: int = 0, selected: np.ndarray | None = None, storage: Storage = Storage()):
    return make_shard_view(load_index(storage, folder, load_manifest(storage, folder).shards[number]), selected)


@pytest.fixture
def folder(indexed_pairs) -> str:
    return indexed_pairs("pairs", [6, 4])


@pytest.fixture
def remote() -> Iterator[Watched]:
    yield (storage := Watched())
    storage.delete("memory://samples")


def copy_to_memory(folder: str) -> str:
    for file in Path(folder).iterdir():
        Storage().write(f"memory://samples/{file.name}", file.read_bytes())
    return "memory://samples"


def test_selected_samples_have_the_packed_bytes_and_identities_of_their_own(folder: str, make_pair):
    keys = view_of(folder).index.keys
    (opt_out := Path(folder, "opt_out.txt")).write_text(f"{keys[0]}\n{keys[3]}\n")
    chosen = {"pairs": open_source(Storage(), SourceConfig(shards=folder, opt_out=str(opt_out)))}
    for sample, number in enumerate([1, 2, 4, 5]):
        assert SampleReader(Storage(), chosen).read(ref(0, sample)) == reader(folder).read(ref(0, number))
    sample, later = (reader(folder).read(SampleRef("pairs", epoch, 1, 2)) for epoch in (0, 5))
    assert sample.members == make_pair(8)
    assert (sample.shard, sample.key) == ("00001.tar", "pairs00008")
    data = Path(folder, "00001.tar").read_bytes()
    assert data[sample.offset : sample.offset + len(sample.members["jpg"])] == sample.members["jpg"]
    assert later.uid == sample.uid == hash64(load_manifest(Storage(), folder).shards[1].digest, 2, signed=True)
    uids = {sample.uid for sample in iter_samples(Storage(), folder)}
    assert (len(uids), sample.uid in uids) == (10, True)
    assert [sample.key for sample in iter_samples(Storage(), folder, 4, 7)] == [f"pairs0000{n}" for n in (4, 5, 6)]
    captions = list(iter_captions(Storage(), folder))
    assert (len(captions), captions[3]) == (30, "picture 1 shows a thing in way a")


def test_equal_images_and_duplicate_keys_are_identified(tmp_path: Path, make_pair):
    pairs = [(key, make_pair(number)) for key, number in (("a", 0), ("b", 1), ("a", 2), ("c", 1))]
    files = ((f"{key}.{name}", data) for key, pair in pairs for name, data in pair.items())
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    index_shards(Storage(), str(tmp_path))
    samples = list(iter_samples(Storage(), str(tmp_path)))
    assert [sample.is_duplicate for sample in samples] == [False, False, True, False]
    assert len({sample.image_id for sample in samples}) == 3
    assert samples[1].image_id == samples[3].image_id != 0


def test_truncated_missing_or_changed_shard_is_rejected_by_name(folder: str):
    opened, others, path = reader(folder), [reader(folder) for _ in range(3)], Path(folder, "00000.tar")
    index, data, times = view_of(folder).index, path.read_bytes(), path.stat()
    start, stop = index.byte_range(3)
    end = -(-index.byte_range(5)[1] // 512) * 512
    opened.read(ref(0, 0))
    # Between the zero blocks, before them, between two samples, inside a header, inside a member's data.
    for size in (end + 512, end, -(-stop // 512) * 512, start - 100, start + 50):
        os.truncate(path, size)
        with pytest.raises(DataError, match=r"00000\.tar: the shard was truncated"):
            reader(folder)
    for truncated in (opened, others[0]):
        with pytest.raises(DataError, match=r"00000\.tar: the shard was truncated"):
            truncated.read(ref(0, 4))
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.tar: the shard is missing, and was there at first"):
        others[1].read(ref(0, 4))
    with pytest.raises(DataError, match=r"00000\.tar: the shard is missing"):
        reader(folder)
    path.write_bytes(data[: start + 20] + bytes([data[start + 20] ^ 1]) + data[start + 21 :])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    others[2].read(ref(0, 2))
    with pytest.raises(DataError, match=r"00000\.tar: the shard was changed: sample 'pairs00003'"):
        others[2].read(ref(0, 3))


def test_number_of_open_files_is_bounded(indexed_pairs, monkeypatch: pytest.MonkeyPatch):
    folder = indexed_pairs("many", [1] * 40)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))

    def open_tars() -> int:
        return sum(file.path.startswith(folder + "/") for file in psutil.Process().open_files())

    opened = reader(folder)
    counts = [open_tars() for shard in range(40) if opened.read(ref(shard, 0))]
    opened.close()
    assert (max(counts), open_tars()) == (16, 0)


@pytest.mark.parametrize("least", [1, 3000, 10_000, 10**9])
def test_chunks_cover_the_shard_and_are_never_small(indexed_pairs, monkeypatch: pytest.MonkeyPatch, least: int):
    folder = indexed_pairs("pairs", [40])
    monkeypatch.setattr(module, "CHUNK_BYTES", least)
    view, selection = view_of(folder), view_of(folder, selected=np.array([0, 7, 39]))
    for sample in range(40):
        start, stop = view.index.byte_range(sample)
        chunk = view.chunks[bisect_right(view.bounds, sample) - 1]
        assert chunk.start <= start < stop <= chunk.stop
    assert all(chunk.stop <= following.start for chunk, following in itertools.pairwise(view.chunks))
    assert len(view.chunks) == 1 or all(chunk.stop - chunk.start > least - 1024 for chunk in view.chunks)
    assert (len(view.chunks) == 1) == (least == 10**9)
    assert [sum(chunk.num_selected for chunk in shard.chunks) for shard in (view, selection)] == [40, 3]


def test_remote_chunk_is_fetched_once_and_again_if_damaged(folder: str, remote: Watched, monkeypatch):
    url, damaged, fetch = copy_to_memory(folder), [], module.SampleReader._fetch

    def slow(*arguments) -> bytes:
        time.sleep(0.05)
        data = bytearray(fetch(*arguments))
        data[10] ^= 255 if damaged else 0
        damaged.clear()
        return bytes(data)

    refs = [ref(shard, sample) for shard, size in enumerate([6, 4]) for sample in range(size)]
    expected = [reader(folder).read(slot) for slot in refs]
    monkeypatch.setattr(module.SampleReader, "_fetch", slow)
    first, second = reader(url, remote), reader(url, remote)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first.read, refs)) == expected
    assert sorted(name for name, _, _ in remote.ranges) == ["00000.tar", "00001.tar"]
    damaged.append(True)
    assert (second.read(ref(0, 0)), len(remote.ranges)) == (expected[0], 4)


class Epoch:
    """One epoch of 240 samples in batches of 8, over 2 streams with windows of 1 shard; shards have several chunks."""

    def __init__(self, folder: str, url: str):
        self.local, self.source = reader(folder), Source(url, load_manifest(Storage(), folder))
        sources = {"pairs": OrderSource(self.source.counts, 1.0, self.source.digest)}
        order = DataOrder(sources, num_streams=2, shuffle_window=1, seed=3, batch_size=8)
        self.refs = {step: order.samples(step) for step in range(30)}
        self.expected = [[*map(self.local.read, refs)] for refs in self.refs.values()]
        views = [(record.name, view_of(folder, n)) for n, record in enumerate(self.source.manifest.shards)]
        self.chunks = [(name, chunk.start, chunk.stop) for name, view in views for chunk in view.chunks]

    def reader(self, storage: Storage, loader: LoaderConfig, cache: NodeCache | None = None) -> closing[SampleReader]:
        return closing(SampleReader(storage, {"pairs": self.source}, loader, cache))

    def read(self, storage: Storage, loader: LoaderConfig, places: range = range(8), cache: NodeCache | None = None):
        """Return the samples of each step, read by four threads two batches ahead."""
        samples, reads = [], {}
        with self.reader(storage, loader, cache) as opened, ThreadPoolExecutor(4) as pool:
            opened.start_prefetch(lambda step: self.refs.get(step, [])[places.start : places.stop], 0)
            for step in self.refs:
                for ahead in {*range(step, step + 3)} & self.refs.keys() - reads.keys():
                    reads[ahead] = [pool.submit(opened.read, self.refs[ahead][place]) for place in places]
                samples.append([read.result(60) for read in reads[step]])
                opened.finish_step(step)
        return samples


@pytest.fixture
def epoch(indexed_pairs, monkeypatch: pytest.MonkeyPatch) -> Epoch:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16_000)
    monkeypatch.setattr(cache_module, "PIECE", 16_000)
    folder = indexed_pairs("pairs", [40, 25, 33, 8, 40, 36, 21, 37])
    return Epoch(folder, copy_to_memory(folder))


ROOM = LoaderConfig(memory_bytes=2**20, read_ahead_bytes=30_000, max_concurrent_requests=4)


def test_epoch_from_a_store_fetches_each_chunk_once_unless_memory_is_too_small(remote, epoch: Epoch, caplog):
    total = sum(stop - start for _, start, stop in epoch.chunks)
    assert len(epoch.chunks) > 30
    remote.latency = 0.01  # as a store's: with none, readers overtake the plan that protects chunks from eviction
    for memory_bytes in (2**20, total * 6 // 10):  # the second suffices for the open windows and the prefetch only
        remote.ranges.clear()
        assert epoch.read(remote, ROOM.model_copy(update={"memory_bytes": memory_bytes})) == epoch.expected
        assert Counter(remote.ranges) == Counter(epoch.chunks)
        assert caplog.messages == []
    assert epoch.read(remote, ROOM.model_copy(update={"memory_bytes": 60_000})) == epoch.expected
    assert len(remote.ranges) > 2 * len(epoch.chunks) == 2 * len(set(remote.ranges))
    assert caplog.messages == [
        "data.loader.memory_bytes 60000 is below what the open windows of this process need: chunks of shards are "
        "fetched more than once. Raise it, lower data.shuffle_window, or set data.cache.folder"
    ]


def test_readers_of_one_node_share_the_cache_and_download_damaged_shards_again(remote, epoch: Epoch, tmp_path: Path):
    cache, shards = NodeCache(tmp_path / "cache", 2**30), epoch.source.manifest.shards
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda places: epoch.read(remote, ROOM, places, cache), (range(4), range(4, 8))))
    assert [a + b for a, b in zip(*halves, strict=True)] == epoch.expected
    assert set(Counter(remote.ranges).values()) == {1}
    covered = sum(stop - start for _, start, stop in remote.ranges)
    assert covered == sum(shard.bytes for shard in shards) == held_bytes(cache)
    for damages, downloads in ((False, set()), (True, {1}), (False, set())):
        remote.ranges.clear()
        for path in cache.folder.glob("*.tar") if damages else ():
            path.write_bytes(bytes(path.stat().st_size))
        assert epoch.read(remote, ROOM, cache=cache) == epoch.expected
        assert set(Counter(remote.ranges).values()) == downloads
    other = NodeCache(tmp_path / "other", 2**30)
    with epoch.reader(remote, ROOM, other) as opened:
        opened.read(ref(0, 0))
        (cached,) = other.folder.glob("*.tar")
        os.truncate(cached, 1000)  # while it is read
        assert [opened.read(ref(0, sample)).key for sample in (39, 38)] == ["pairs00039", "pairs00038"]
    assert cached.stat().st_size == shards[0].bytes


def test_full_cache_warns_once_and_changes_no_sample(remote, epoch: Epoch, tmp_path: Path, caplog):
    cache = NodeCache(tmp_path, max(shard.bytes for shard in epoch.source.manifest.shards) * 3 // 2)
    assert epoch.read(remote, ROOM, cache=cache) == epoch.expected
    (message,) = caplog.messages
    assert re.search(rf"no room for its .*max_bytes is {cache.max_bytes}\. Raise it; such shards are read", message)
    assert held_bytes(cache) <= cache.max_bytes


def test_reader_owns_its_threads(remote, epoch: Epoch, tmp_path: Path):
    def threads() -> list[str]:
        names = ("requests", "downloads", "read-ahead")
        return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]

    epoch.local.start_prefetch(lambda step: [ref(0, 0)], 0)
    epoch.local.read(ref(0, 0))
    epoch.local.finish_step(0)
    assert threads() == [], "local files need no thread"
    with epoch.reader(remote, ROOM, cache := NodeCache(tmp_path, 2**30)) as opened:
        assert threads() == []
        opened.start_prefetch(lambda step: epoch.refs.get(step, []), 0)
        opened.read(epoch.refs[0][0])
        assert "read-ahead" in threads()
    assert (threads(), held_bytes(cache) % 512, list(tmp_path.rglob("*.part"))) == ([], 0, [])


@pytest.mark.parametrize("where", ["local", "memory"])
def test_hard_links_are_read_from_their_target(where: str, tmp_path: Path, remote: Storage, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    rng, buffer, files, expected = random.Random(5), io.BytesIO(), [], {}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, extension in itertools.product(range(60), ("txt", "json")):
            info = tarfile.TarInfo(f"{number:02d}.{extension}")
            content = json.dumps({"caption": f"{extension} {number}" * rng.randint(1, 90)}).encode()
            if files and rng.random() < 0.4:
                info.type = tarfile.LNKTYPE
                info.linkname, content = rng.choice(files)
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            files.append((info.name, content))
            expected.setdefault(f"{number:02d}", {})[extension] = content
    folder = str(tmp_path) if where == "local" else "memory://samples"
    remote.write(f"{folder}/0.tar", buffer.getvalue())
    index_shards(remote, folder)
    view = view_of(folder, storage=remote)
    assert len(view.chunks) > 3
    for number in range(60):
        chunk = view.chunks[bisect_right(view.bounds, number) - 1]
        assert all(chunk.start <= at and at + size <= chunk.stop for _, at, size in view.index.members(number))
    assert {sample.key: sample.members for sample in iter_samples(remote, folder)} == expected
