from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.errors import DataError
from pipeline.config.schema import FilterConfig, SourceConfig
from pipeline.data.order import SampleRef
from pipeline.data.reading.samples import SampleReader
from pipeline.data.shards.manifest import index_shards
from pipeline.data.shards.source import Source, open_source
from pipeline.data.storage import Storage


def keys_read(source: Source) -> list[list[str]]:
    """The keys of every slot of each shard, through the loader's own reader."""
    reader = SampleReader(Storage(), {"pairs": source})
    try:
        return [
            [reader.read(SampleRef("pairs", 0, shard, number)).key for number in range(count)]
            for shard, count in enumerate(source.counts.tolist())
        ]
    finally:
        reader.close()


def test_slots_count_the_chosen_samples_only(make_pairs, make_pair, tmp_path: Path):
    scored = {
        (shard, n): make_pair(n) | {"json": json.dumps({"caption": "a thing", "score": n}).encode()}
        for shard in range(2)
        for n in range(4)
    }
    folder = make_pairs("pairs", [4, 4], scored)
    index_shards(Storage(), folder)
    (tmp_path / "out.txt").write_text("pairs00003\n")
    config = SourceConfig(shards=folder, filters={"score": FilterConfig(min=2)}, opt_out=str(tmp_path / "out.txt"))
    assert keys_read(open_source(Storage(), config)) == [["pairs00002"], ["pairs00006", "pairs00007"]]


def counted(folder: str, counts: list[int]) -> Source:
    for shard, count in enumerate(counts):
        Path(folder, f"{shard:05d}_stats.json").write_text(json.dumps({"successes": count}))
    index_shards(Storage(), folder, trust_counts=True)
    return open_source(Storage(), SourceConfig(shards=folder))


def test_shards_counted_by_another_tool_are_read_like_others(make_pairs):
    source = counted(make_pairs("pairs", [3, 2]), [3, 2])
    assert all(shard.is_trusted for shard in source.manifest.shards)
    assert keys_read(source) == [["pairs00000", "pairs00001", "pairs00002"], ["pairs00003", "pairs00004"]]


def test_a_wrong_count_of_another_tool_stops_the_reader_by_name(make_pairs):
    source = counted(make_pairs("pairs", [3, 2]), [3, 1])
    with pytest.raises(DataError, match=r"00001\.tar: it has 2 samples, and the index of another tool said 1"):
        keys_read(source)
