"""A source selects samples by filters and opt-out lists, and its digest depends on the selection."""

import json
import pickle
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import FilterConfig, SourceConfig
from pipeline.data.shards.index import normal_url
from pipeline.data.shards.manifest import load_index
from pipeline.data.shards.source import Source, open_source
from pipeline.data.storage import Storage
from tests.support.pairs import Watched, pair, write_indexed

ROWS = [  # two shards of five and four samples
    {"score": 0.1, "tongue": "en", "url": "http://x/0", "caption": "a"},
    {"score": 0.5, "tongue": "de", "url": "http://x/1", "caption": "a b c d"},
    {"score": 0.9, "tongue": "en", "url": "http://x/2", "caption": "a b"}, {"tongue": "fr", "caption": "a b c"},
    {"score": 0.3, "caption": "a b c d e f", "image_id": 77}, {"score": 0.7, "image_id": "seven", "caption": "x"},
    {"score": 0.2, "caption": "x"}, {"score": 0.8, "caption": "x", "note": "a text that is too long for an index"},
    {"score": 0.6, "caption": "x", "note": 3},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return nine pairs with metadata and images 24 pixels wide."""
    samples = [(f"k{n}", pair(n) | {"json": json.dumps(row).encode()}) for n, row in enumerate(ROWS)]
    return write_indexed(tmp_path, dict(samples[:5]), dict(samples[5:]))


def config(folder: str, opt_out: Path | str | None = None, **filters: dict) -> SourceConfig:
    conditions = {name: FilterConfig(**condition) for name, condition in filters.items()}
    return SourceConfig(shards=folder, filters=conditions, opt_out=None if opt_out is None else str(opt_out))


def opened(folder: str, opt_out: Path | None = None, **filters: dict) -> Source:
    return open_source(Storage(), config(folder, opt_out, **filters))


def selected(source: Source) -> list[list[str]]:
    """Return the keys of the selected samples of each shard, and verify the counts."""
    indexes = [load_index(Storage(), source.url, record) for record in source.manifest.shards]
    keys = [[index.keys[n] for n in source.selected(index)] for index in indexes]
    assert source.counts.tolist() == list(map(len, keys))
    return keys


def numbers(folder: str, opt_out: Path | None = None, **filters: dict) -> list[int]:
    return [int(key[1:]) for keys in selected(opened(folder, opt_out, **filters)) for key in keys]


def test_samples_that_pass_all_filters_are_selected(folder: str) -> None:
    source = opened(folder)  # without filters: every sample
    assert (source.digest, numbers(folder)) == (source.manifest.digest, list(range(9)))
    assert (source.counts.tolist(), source.counts.dtype) == ([5, 4], np.int64)
    for expected, filters in (
        ([1, 2, 5, 7, 8], {"score": {"min": 0.5}}), ([0, 4, 6], {"score": {"max": 0.3}}),
        ([1, 4, 5, 8], {"score": {"min": 0.3, "max": 0.7}}),
        ([2, 3, 7], {"score": {"min": 0.8, "keep_missing": True}}),
        ([0, 2, 3], {"tongue": {"any_of": ("en", "fr")}}), ([1, 3], {"tongue": {"none_of": ("en",)}}),
        ([1, 3, 4, 5, 6, 7, 8], {"tongue": {"none_of": ("en",), "keep_missing": True}}),
        ([1, 3, 4], {"caption_length": {"min": 4}}), ([*range(9)], {"width": {"min": 24}, "height": {"max": 24}}),
        ([2], {"score": {"min": 0.5}, "tongue": {"any_of": ("en",)}}),
        ([1], {"tongue": {"any_of": ("de",)}}),  # an empty shard is allowed
    ):  # fmt: skip
        assert numbers(folder, **filters) == expected
    for filters, error, reason in (
        ({"scor": {"min": 1}}, ConfigError, r"no sample has 'scor'; its shards have caption_length, height, score, t"),
        ({"tongue": {"min": 1}}, ConfigError, r"tongue: it is a text in 00000\.tar"),
        ({"score": {"any_of": ("1",)}}, ConfigError, r"score: it is a number in 0000.\.tar"),
        ({"note": {"min": 1}}, ConfigError, r"note: it is neither a number nor a short text in all of 00001\.tar"),
        ({"tongue": {"any_of": ("nl",)}}, DataError, r"leave none of its 9 samples"),
    ):
        with pytest.raises(error, match=reason):
            opened(folder, **filters)


def test_opted_out_ids_are_not_selected(folder: str, tmp_path: Path, s3) -> None:
    listed, storage = tmp_path / "opt_out.txt", Storage(s3.config)
    listed.write_text("\ufeffk0\n\nhttp://x/2\r\n  77 \nseven\nk00\nhttp://x\nnobody\n", encoding="utf-8")
    assert numbers(folder, listed) == [1, 3, 6, 7, 8]
    assert numbers(folder, listed, score={"min": 0.7}) == [7]
    listed.write_text("\n \n")
    assert numbers(folder, listed) == list(range(9))
    storage.write(s3.url("out.txt"), "\n".join(f"k{n}" for n in range(1, 8)).encode())
    assert open_source(storage, config(folder, s3.url("out.txt"))).counts.tolist() == [1, 1]
    with pytest.raises(DataError, match=r"absent\.txt: the opt-out list is missing"):
        opened(folder, tmp_path / "absent.txt")
    for encoding, line in {"latin-1": 2, "utf-16": 1, "utf-16-le": 1, "utf-32-be": 1}.items():
        listed.write_bytes("k0\nkäse\n".encode(encoding))
        with pytest.raises(DataError, match=rf"opt_out\.txt: line {line} of the opt-out list is not UTF-8"):
            opened(folder, listed)


def test_digest_depends_on_the_selection_whose_counts_are_saved_for_equal_filters(folder: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"nobody {name}\nk1\n")
    scores = ({}, {"score": {"min": 0.5}}, {"score": {"min": 0.51}}, {"score": {"min": 0.5, "keep_missing": True}})
    selections = [*((None, score) for score in scores), (tmp_path / "a.txt", {}), (tmp_path / "b.txt", {})]
    digests, again = ([opened(folder, listed, **score).digest for listed, score in selections] for _ in range(2))
    assert (len(set(digests)), digests) == (6, again)
    source = opened(folder, tmp_path / "a.txt", score={"min": 0.5})
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert (copy.digest, selected(copy)) == (source.digest, [["k2"], ["k5", "k7", "k8"]])
    run, calls = str(tmp_path / "run"), []
    half, more = config(folder, score={"min": 0.5}), config(folder, score={"min": 0.6})
    storage, indexes = Watched(), ["00000.tar.index.npz", "00001.tar.index.npz"]
    first = open_source(storage, half, run, lambda *progress: calls.append(progress[:2]))
    [saved] = (tmp_path / "run" / "selections").iterdir()
    assert (calls, set(storage.names)) == ([(1, 2), (2, 2)], {*indexes, "manifest.json", saved.name})
    storage.names.clear()
    again = open_source(storage, half, run)
    assert (storage.names, again.digest) == (["manifest.json", saved.name], first.digest)
    assert again.counts.tolist() == first.counts.tolist()
    assert open_source(storage, more, run).counts.tolist() == [1, 3]
    assert set(indexes) < set(storage.names)
    stale = json.loads(saved.read_text()) | {"counts": [1, 1]}
    assert saved.write_text(json.dumps(stale))
    assert open_source(storage, half, run).counts.tolist() == [1, 1]
    del stale["version"]  # version 1 compared opt-out lists byte by byte
    for content in ("{", json.dumps(stale)):
        saved.write_text(content)
        assert open_source(storage, half, run).counts.tolist() == first.counts.tolist()


def test_equal_urls_have_one_normal_form_in_which_opt_out_entries_match(tmp_path: Path, caplog: Any) -> None:
    for listed, url in (
        ("HTTP://Example.COM/a", "http://example.com/a"), ("http://x", "http://x:80/"),
        ("https://x:443/a#there", "https://x/a"), ("http://x/a%7eb%c3%a9?q=%2f", "http://x/a~b%C3%A9?q=%2F"),
        ("http://x/Tür", "http://x/T%C3%BCr"), ("http://bücher.de/", "http://xn--bcher-kva.de"),
        ("http://User@x/a", "http://User@X/a"), ("http://[::1]:8080/a", "HTTP://[::1]:8080/a"),
    ):  # fmt: skip
        assert normal_url(listed) == normal_url(url) == normal_url(normal_url(url))
    for other in ("http://x/A", "https://x/a", "http://x:81/a", "http://x/a?b", "http://x/a%2Fb", "x/a"):
        assert normal_url(other) != normal_url("http://x/a")
    for text in ("http://[::1", "http://x:99999999/", "://", "http://..de", "http://x:p/", "a\ud800"):
        assert normal_url(normal_url(text)) == normal_url(text)
    rows = {  # key, image id and URL are spelled differently from the list
        unicodedata.normalize("NFD", "clé"): {"caption": "a"},
        "b": {"caption": "b", "image_id": unicodedata.normalize("NFD", "übung")},
        "c": {"caption": "c", "url": "HTTP://Host/%c3%a9"},
        "d": {"caption": "d", "url": "http://host/d"},
    }
    samples = {key: pair(n) | {"json": json.dumps(row).encode()} for n, (key, row) in enumerate(rows.items())}
    folder, listed, run = write_indexed(tmp_path, samples), tmp_path / "out.txt", str(tmp_path / "run")
    listed.write_text("\nclé\nübung\nhttp://host/é\nd0\nclé\nclé\nno\n", encoding="utf-8")
    assert selected(opened(folder, listed)) == [["d"]]
    assert re.search("3 of its 5 entries list a sample.*line 5, 'd0'", caplog.text)
    listed.write_text("clé\nhttp://host/D\n", encoding="utf-8")
    open_source(Storage(), config(folder, listed), run)
    strict = SourceConfig(shards=folder, opt_out=str(listed), opt_out_must_match=True)
    with pytest.raises(DataError, match=r"1 of its 2 entries.*line 2, 'http://host/D'.*opt_out_must_match"):
        open_source(Storage(), strict, run)
    listed.write_text("clé\nhttp://host/d\n", encoding="utf-8")
    assert open_source(Storage(), strict, run).counts.tolist() == [2]
