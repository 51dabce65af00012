"""A source selects samples by filters and opt-out lists, and its digest depends on the selection."""

from __future__ import annotations

import json
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import FilterConfig, SourceConfig
from pipeline.data.order import SampleRef
from pipeline.data.reading.samples import SampleReader
from pipeline.data.shards.index import ShardIndex, normal_url
from pipeline.data.shards.manifest import index_shards, load_index
from pipeline.data.shards.source import Source, open_source
from pipeline.data.storage import Storage

ROWS = [  # two shards of five and four samples
    {"score": 0.1, "tongue": "en", "url": "http://x/0", "caption": "a"},
    {"score": 0.5, "tongue": "de", "url": "http://x/1", "caption": "a b c d"},
    {"score": 0.9, "tongue": "en", "url": "http://x/2", "caption": "a b"},
    {"tongue": "fr", "caption": "a b c"},
    {"score": 0.3, "caption": "a b c d e f", "image_id": 77},
    {"score": 0.7, "image_id": "seven", "caption": "x"},
    {"score": 0.2, "caption": "x"},
    {"score": 0.8, "caption": "x", "note": "a text that is too long for an index"},
    {"score": 0.6, "caption": "x", "note": 3},
]


@pytest.fixture
def folder(tmp_path: Path, make_tar: Callable, make_pair: Callable) -> str:
    """Return nine pairs with metadata and images 24 pixels wide."""
    for shard, rows in enumerate((range(5), range(5, 9))):
        samples = {f"k{n}": make_pair(n) | {"json": json.dumps(ROWS[n]).encode()} for n in rows}
        (tmp_path / f"{shard}.tar").write_bytes(make_tar(samples))
    index_shards(Storage(), str(tmp_path))
    return str(tmp_path)


def indexes(source: Source) -> list[ShardIndex]:
    return [load_index(Storage(), source.url, record) for record in source.manifest.shards]


def read(folder: str, opt_out: str | None = None, **filters: dict) -> list[int]:
    """Return the numbers in the keys of the selected samples, and verify the counts."""
    source = opened(folder, opt_out, **filters)
    found = [[int(index.keys[n][1:]) for n in source.selected(index)] for index in indexes(source)]
    assert source.counts.tolist() == [len(keys) for keys in found]
    return [key for keys in found for key in keys]


def opened(folder: str, opt_out: str | None = None, saved: str | None = None, **filters: dict) -> Source:
    conditions = {name: FilterConfig(**condition) for name, condition in filters.items()}
    return open_source(Storage(), SourceConfig(shards=folder, filters=conditions, opt_out=opt_out), saved)


def test_source_without_filters_has_every_sample(folder: str):
    source = opened(folder)
    assert source.selection is None
    assert source.selected(indexes(source)[0]) is None
    assert source.counts.tolist() == [5, 4]
    assert source.counts.dtype == np.int64
    assert source.digest == source.manifest.digest


def test_min_and_max_filter_numbers(folder: str):
    assert read(folder, score={"min": 0.5}) == [1, 2, 5, 7, 8]
    assert read(folder, score={"max": 0.3}) == [0, 4, 6]
    assert read(folder, score={"min": 0.3, "max": 0.7}) == [1, 4, 5, 8]
    assert read(folder, score={"min": 0.8, "keep_missing": True}) == [2, 3, 7]


def test_any_of_and_none_of_filter_texts(folder: str):
    assert read(folder, tongue={"any_of": ("en", "fr")}) == [0, 2, 3]
    assert read(folder, tongue={"none_of": ("en",)}) == [1, 3]
    assert read(folder, tongue={"none_of": ("en",), "keep_missing": True}) == [1, 3, 4, 5, 6, 7, 8]


def test_measured_properties_can_be_filtered(folder: str):
    assert read(folder, caption_length={"min": 4}) == [1, 3, 4]
    assert read(folder, width={"min": 24}, height={"max": 24}) == list(range(9))


def test_all_filters_must_pass(folder: str):
    assert read(folder, score={"min": 0.5}, tongue={"any_of": ("en",)}) == [2]


def test_empty_shard_is_allowed_and_empty_source_is_not(folder: str):
    source = opened(folder, tongue={"any_of": ("de",)})
    assert source.counts.tolist() == [1, 0]
    assert [source.selected(index).tolist() for index in indexes(source)] == [[1], []]
    with pytest.raises(DataError, match=r"leave none of its 9 samples"):
        opened(folder, tongue={"any_of": ("nl",)})


def test_opted_out_ids_are_not_selected(folder: str, tmp_path: Path):
    listed = tmp_path / "opt_out.txt"
    listed.write_text("\ufeffk0\n\nhttp://x/2\r\n  77 \nseven\nk00\nhttp://x\nnobody\n", encoding="utf-8")
    assert read(folder, str(listed)) == [1, 3, 6, 7, 8]
    assert read(folder, str(listed), score={"min": 0.7}) == [7]


def test_opt_out_list_is_read_from_a_store(folder: str, s3):
    storage = Storage(s3.config)
    storage.write(s3.url("out.txt"), "\n".join(f"k{n}" for n in range(1, 8)).encode())
    source = open_source(storage, SourceConfig(shards=folder, opt_out=s3.url("out.txt")))
    assert source.counts.tolist() == [1, 1]


def test_missing_and_invalid_opt_out_lists_are_named(folder: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.txt: the opt-out list is missing"):
        opened(folder, str(tmp_path / "absent.txt"))
    (tmp_path / "latin.txt").write_bytes("k0\nkäse\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: line 2 of the opt-out list is not UTF-8"):
        opened(folder, str(tmp_path / "latin.txt"))
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        (tmp_path / "windows.txt").write_bytes("k0\nk1\n".encode(encoding))
        with pytest.raises(DataError, match=r"windows\.txt: line 1 of the opt-out list is not UTF-8"):
            opened(folder, str(tmp_path / "windows.txt"))


def test_invalid_comparisons_name_the_property(folder: str):
    with pytest.raises(
        ConfigError, match=r"no sample has 'scor'; its shards have caption_length, height, score, tongue, width"
    ):
        opened(folder, scor={"min": 1})
    with pytest.raises(ConfigError, match=r"tongue: it is a text in 0\.tar"):
        opened(folder, tongue={"min": 1})
    with pytest.raises(ConfigError, match=r"score: it is a number in .\.tar"):
        opened(folder, score={"any_of": ("1",)})
    with pytest.raises(ConfigError, match=r"note: it is neither a number nor a short text in all of 1\.tar"):
        opened(folder, note={"min": 1})


def test_digest_depends_on_the_selection(folder: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("nobody\n")
    (tmp_path / "b.txt").write_text("no one\n")
    sources = [
        opened(folder),
        opened(folder, score={"min": 0.5}),
        opened(folder, score={"min": 0.51}),
        opened(folder, score={"min": 0.5, "keep_missing": True}),
        opened(folder, str(tmp_path / "a.txt")),
        opened(folder, str(tmp_path / "b.txt")),
    ]
    assert len({source.digest for source in sources}) == 6
    assert opened(folder, score={"min": 0.5}).digest == sources[1].digest


class Counting(Storage):
    """Storage that counts the index files it reads."""

    read_indexes = 0

    def read(self, url: str) -> bytes:
        self.read_indexes += url.endswith(".index.npz")
        return super().read(url)


def test_saved_counts_are_used_for_equal_filters_only(folder: str, tmp_path: Path):
    saved = str(tmp_path / "counts" / "pairs.json")
    config = SourceConfig(shards=folder, filters={"score": FilterConfig(min=0.5)})
    storage = Counting()
    first = open_source(storage, config, saved)
    assert storage.read_indexes == 2
    again = open_source(storage, config, saved)
    assert storage.read_indexes == 2
    assert (again.digest, again.counts.tolist()) == (first.digest, first.counts.tolist())
    other = open_source(storage, SourceConfig(shards=folder, filters={"score": FilterConfig(min=0.6)}), saved)
    assert storage.read_indexes == 4
    assert other.counts.tolist() == [1, 3]
    Path(saved).write_text("{")
    assert open_source(storage, config, saved).counts.tolist() == first.counts.tolist()


def test_counting_reports_progress(folder: str):
    told = []
    config = SourceConfig(shards=folder, filters={"score": FilterConfig(min=0.5)})
    open_source(Storage(), config, progress=lambda *progress: told.append(progress))
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]


def test_source_is_picklable(folder: str, tmp_path: Path):
    (tmp_path / "out.txt").write_text("k1\n")
    source = opened(folder, str(tmp_path / "out.txt"), score={"min": 0.5})
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert (again.digest, again.counts.tolist()) == (source.digest, source.counts.tolist())
    assert [again.selected(index).tolist() for index in indexes(again)] == [[2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("listed", "url"),
    [
        ("HTTP://Example.COM/a", "http://example.com/a"),
        ("http://x", "http://x:80/"),
        ("https://x:443/a#there", "https://x/a"),
        ("http://x/a%7eb%c3%a9?q=%2f", "http://x/a~b%C3%A9?q=%2F"),
        ("http://x/Tür", "http://x/T%C3%BCr"),
        ("http://bücher.de/", "http://xn--bcher-kva.de"),
        ("http://User@x/a", "http://User@X/a"),
        ("http://[::1]:8080/a", "HTTP://[::1]:8080/a"),
    ],
)
def test_equal_urls_have_one_normal_form(listed: str, url: str):
    assert normal_url(listed) == normal_url(url)
    assert normal_url(normal_url(url)) == normal_url(url)


@pytest.mark.parametrize(
    "other", ["http://x/A", "https://x/a", "http://x:81/a", "http://x/a?b", "http://x/a%2Fb", "x/a"]
)
def test_different_urls_keep_different_forms(other: str):
    assert normal_url(other) != normal_url("http://x/a")


@pytest.mark.parametrize("text", ["http://[::1", "http://x:99999999/", "://", "http://..de", "http://x:p/", "a\ud800"])
def test_normal_form_is_idempotent(text: str):
    assert normal_url(normal_url(text)) == normal_url(text)


@pytest.fixture
def decomposed(tmp_path: Path, make_tar: Callable, make_pair: Callable) -> str:
    """Return four pairs whose key, image id and URL are spelled differently from the opt-out list."""
    rows = {
        unicodedata.normalize("NFD", "clé"): {"caption": "a"},
        "b": {"caption": "b", "image_id": unicodedata.normalize("NFD", "übung")},
        "c": {"caption": "c", "url": "HTTP://Host/%c3%a9"},
        "d": {"caption": "d", "url": "http://host/d"},
    }
    samples = {key: make_pair(n) | {"json": json.dumps(row).encode()} for n, (key, row) in enumerate(rows.items())}
    (tmp_path / "0.tar").write_bytes(make_tar(samples))
    index_shards(Storage(), str(tmp_path))
    return str(tmp_path)


def test_opt_out_entries_match_in_every_normal_form(decomposed: str, tmp_path: Path, caplog: Any):
    (tmp_path / "out.txt").write_text("\nclé\nübung\nhttp://host/é\nd0\nclé\nclé\nno\n", encoding="utf-8")
    source = opened(decomposed, str(tmp_path / "out.txt"))
    assert source.counts.tolist() == [1]
    assert [source.selected(index).tolist() for index in indexes(source)] == [[3]]
    assert "3 of its 5 entries list a sample" in caplog.text
    assert "line 5, 'd0'" in caplog.text


def test_opt_out_must_match_rejects_unmatched_entries(decomposed: str, tmp_path: Path):
    listed, saved = tmp_path / "out.txt", str(tmp_path / "saved.json")
    listed.write_text("clé\nhttp://host/D\n", encoding="utf-8")
    config = SourceConfig(shards=decomposed, opt_out=str(listed))
    open_source(Storage(), config, saved)
    strict = SourceConfig(shards=decomposed, opt_out=str(listed), opt_out_must_match=True)
    with pytest.raises(DataError, match=r"1 of its 2 entries.*line 2, 'http://host/D'.*opt_out_must_match"):
        open_source(Storage(), strict, saved)
    listed.write_text("clé\nhttp://host/d\n", encoding="utf-8")
    assert open_source(Storage(), strict, saved).counts.tolist() == [2]


def test_empty_opt_out_list_matches_nothing(folder: str, tmp_path: Path):
    (tmp_path / "out.txt").write_text("\n \n")
    assert read(folder, str(tmp_path / "out.txt")) == list(range(9))


def test_saved_counts_of_version_1_are_ignored(decomposed: str, tmp_path: Path):
    (tmp_path / "out.txt").write_text("clé\n", encoding="utf-8")
    saved = tmp_path / "saved.json"
    opened(decomposed, str(tmp_path / "out.txt"), str(saved))
    stale = json.loads(saved.read_text()) | {"counts": [4]}
    del stale["version"]
    saved.write_text(json.dumps(stale))
    assert opened(decomposed, str(tmp_path / "out.txt"), str(saved)).counts.tolist() == [3]


def keys_read(source: Source) -> list[list[str]]:
    """Return the keys of every slot of each shard, read through the loader's own reader."""
    reader = SampleReader(Storage(), {"pairs": source})
    try:
        return [
            [reader.read(SampleRef("pairs", 0, shard, number)).key for number in range(count)]
            for shard, count in enumerate(source.counts.tolist())
        ]
    finally:
        reader.close()


def test_sample_refs_count_selected_samples_only(make_pairs, make_pair, tmp_path: Path):
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


def test_trusted_shards_are_read_like_others(make_pairs):
    source = counted(make_pairs("pairs", [3, 2]), [3, 2])
    assert all(shard.is_trusted for shard in source.manifest.shards)
    assert keys_read(source) == [["pairs00000", "pairs00001", "pairs00002"], ["pairs00003", "pairs00004"]]


def test_wrong_trusted_count_stops_the_reader(make_pairs):
    source = counted(make_pairs("pairs", [3, 2]), [3, 1])
    with pytest.raises(DataError, match=r"00001\.tar: it has 2 samples, and the index of another tool said 1"):
        keys_read(source)
