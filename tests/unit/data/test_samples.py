from __future__ import annotations

import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.errors import DataError
from pipeline.data import samples as module
from pipeline.data.manifest import index_shards, load_index, load_manifest
from pipeline.data.plan import Slot
from pipeline.data.samples import SampleReader, captions_of_source, sample_uid, samples_of_source, span_of
from pipeline.data.storage import Storage


def reader(folder: str) -> SampleReader:
    return SampleReader(Storage(), {"pairs": (folder, load_manifest(Storage(), folder))})


@pytest.fixture
def folder(make_pairs) -> str:
    folder = make_pairs("pairs", [6, 4])
    index_shards(Storage(), folder)
    return folder


def test_slot_gives_the_bytes_that_were_packed(folder: str, make_pair):
    sample = reader(folder).read(Slot("pairs", 0, 1, 2))
    assert sample.members == make_pair(8)
    assert (sample.shard, sample.key) == ("00001.tar", "pairs00008")
    data = Path(folder, "00001.tar").read_bytes()
    assert data[sample.offset : sample.offset + len(sample.members["jpg"])] == sample.members["jpg"]


def test_uid_is_the_same_wherever_the_shard_is_read(folder: str, make_pairs):
    manifest = load_manifest(Storage(), folder)
    sample = reader(folder).read(Slot("pairs", 5, 1, 2))
    assert sample.uid == sample_uid(manifest.shards[1], 2)
    assert -(2**63) <= sample.uid < 2**63
    uids = {s.uid for s in samples_of_source(Storage(), folder)}
    assert len(uids) == 10
    assert sample.uid in uids


def test_captions_of_a_source_come_in_order(folder: str):
    captions = list(captions_of_source(Storage(), folder))
    assert len(captions) == 30
    assert captions[3] == "picture 1 shows a thing in way a"


def test_missing_shard_is_told_before_anything_is_read(folder: str):
    os.unlink(f"{folder}/00001.tar")
    with pytest.raises(DataError, match=r"00001\.tar: the shard is missing"):
        reader(folder)


def cut_places(folder: str) -> dict[str, int]:
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    start, stop = index.span(3)
    end = -(-index.span(5)[1] // 512) * 512
    return {
        "inside a header": start - 100,
        "inside a member's data": start + 50,
        "between two samples": -(-stop // 512) * 512,
        "before the zero blocks": end,
        "between the zero blocks": end + 512,
    }


@pytest.mark.parametrize("cut", range(5))
def test_a_shard_cut_anywhere_is_refused_by_name(folder: str, cut: int):
    os.truncate(f"{folder}/00000.tar", list(cut_places(folder).values())[cut])
    with pytest.raises(DataError, match=r"00000\.tar: the shard was truncated"):
        reader(folder)


@pytest.mark.parametrize("cut", range(3))
def test_a_shard_cut_during_the_run_is_refused_by_name(folder: str, cut: int):
    opened = reader(folder)
    os.truncate(f"{folder}/00000.tar", list(cut_places(folder).values())[cut])
    with pytest.raises(DataError, match=r"00000\.tar: the shard was truncated"):
        opened.read(Slot("pairs", 0, 0, 4))


def test_a_changed_shard_of_the_same_size_is_refused_by_name(folder: str):
    path = Path(folder, "00000.tar")
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    data, times = bytearray(path.read_bytes()), path.stat()
    data[index.span(3)[0] + 20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened = reader(folder)
    opened.read(Slot("pairs", 0, 0, 2))
    with pytest.raises(DataError, match=r"00000\.tar: the shard was changed: sample 'pairs00003'"):
        opened.read(Slot("pairs", 0, 0, 3))


def test_spans_tile_the_shard_and_are_never_small(make_pairs, monkeypatch: pytest.MonkeyPatch):
    folder = make_pairs("pairs", [40])
    index_shards(Storage(), folder)
    index = load_index(Storage(), folder, load_manifest(Storage(), folder).shards[0])
    for least in (1, 3000, 10_000, 10**9):
        monkeypatch.setattr(module, "SPAN", least)
        spans = sorted({span_of(index, sample) for sample in range(40)})
        for sample in range(40):
            start, stop = span_of(index, sample)
            assert start <= index.span(sample)[0]
            assert index.span(sample)[1] <= stop
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        assert len(spans) == 1 or all(stop - start > least - 1024 for start, stop in spans)
    assert len(spans) == 1


def memory_copy(folder: str, name: str) -> str:
    url = f"memory://{name}"
    for file in os.listdir(folder):
        Storage().write(f"{url}/{file}", Path(folder, file).read_bytes())
    return url


def test_remote_equals_local_and_each_span_is_fetched_once(folder: str, monkeypatch: pytest.MonkeyPatch):
    url = memory_copy(folder, "once")
    local, remote = reader(folder), reader(url)
    fetches = []
    fetch = module._Shards.fetch

    def slow(shards, shard, start, stop):
        fetches.append((shard, start))
        time.sleep(0.05)
        return fetch(shards, shard, start, stop)

    slots = [Slot("pairs", 0, shard, sample) for shard, size in enumerate([6, 4]) for sample in range(size)]
    expected = [local.read(slot) for slot in slots]
    monkeypatch.setattr(module._Shards, "fetch", slow)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(remote.read, slots)) == expected
    assert sorted(shard for shard, _ in fetches) == [0, 1]
    Storage().delete(url)


def test_kept_spans_stay_within_their_bound():
    cache = module._SpanCache(1000)
    for number in range(50):
        assert cache.get(("shard", number), lambda: bytes(300)) == bytes(300)
        assert cache._held <= 1000
        assert len(cache._spans) <= 3
    calls = []
    cache.get(("shard", 49), lambda: calls.append(1) or b"")
    assert not calls, "the newest is kept"
    assert len(cache.get(("big", 0), lambda: bytes(5000))) == 5000


def test_a_failed_fetch_reaches_every_waiter_and_is_tried_again():
    cache = module._SpanCache(1000)
    begun = threading.Event()

    def fail() -> bytes:
        begun.set()
        time.sleep(0.05)
        raise DataError("gone")

    def wait() -> bytes:
        begun.wait()
        return cache.get(("shard", 0), fail)

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(cache.get, ("shard", 0), fail), pool.submit(wait)]
        assert all(isinstance(result.exception(), DataError) for result in results)
    assert cache.get(("shard", 0), lambda: b"back") == b"back"


def test_damage_on_the_way_is_read_once_more(folder: str, monkeypatch: pytest.MonkeyPatch):
    url = memory_copy(folder, "damage")
    remote, fetch, times = reader(url), module._Shards.fetch, []

    def damaged(shards, shard, start, stop):
        data = bytearray(fetch(shards, shard, start, stop))
        times.append(1)
        if len(times) == 1:
            data[10] ^= 255
        return bytes(data)

    monkeypatch.setattr(module._Shards, "fetch", damaged)
    assert remote.read(Slot("pairs", 0, 0, 0)) == reader(folder).read(Slot("pairs", 0, 0, 0))
    assert np.sum(times) >= 2
    Storage().delete(url)
