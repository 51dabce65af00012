"""A vocabulary that cannot encode the captions is reported when it is chosen, and raises an alert in its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.training.prepare import Coverage, load_coverage, measure_coverage


@pytest.fixture
def folders(tmp_path: Path, make_tar: Any) -> list[str]:
    """Build a folder of English captions and one of Arabic captions."""
    urls = []
    for name, caption in {
        "english": "a red cat",
        "arabic": "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0.tar").write_bytes(make_tar({str(n): {"txt": caption.encode()} for n in range(5)}))
        index_shards(Storage(), str(folder))
        urls.append(str(folder))
    return urls


def test_unknown_tokens_are_measured_per_source_and_reported(folders: list[str], tmp_path: Path, caplog: Any) -> None:
    run, tokenizer = str(tmp_path / "run"), Tokenizer([*SPECIALS, "a", "red", "cat"])
    found = measure_coverage(Storage(), run, tokenizer, folders)
    assert found.unknown == {folders[0]: 0.0, folders[1]: 1.0}
    assert "100.0% of the tokens" in caplog.text
    assert folders[1] in (found.alert or "")
    assert load_coverage(Storage(), run) == found == measure_coverage(Storage(), run, tokenizer, [])
    assert measure_coverage(Storage(), run, Tokenizer([*SPECIALS, "a"]), folders[:1]).worst == pytest.approx(2 / 3)


def test_matching_vocabulary_raises_no_alert() -> None:
    assert Coverage("x", {}).alert is None
    assert Coverage("x", {"a": 0.01}).alert is None
    assert Coverage("x", {"a": 0.0101, "b": 0.0}).alert is not None


def test_missing_or_malformed_record_is_ignored(tmp_path: Path) -> None:
    assert load_coverage(Storage(), str(tmp_path)) is None
    (tmp_path / "vocabulary.json").write_text("[1]")
    assert load_coverage(Storage(), str(tmp_path)) is None
