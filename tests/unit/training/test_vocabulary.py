"""The choice of a run's vocabulary, whether its tokenizer lowercases text, and whether it covers the captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.training.prepare import Coverage, choose_tokenizer, load_coverage, measure_coverage
from tests.support.tiny_model import tiny_config

CASED, UNCASED = (*SPECIALS, "the", "Rome"), (*SPECIALS, "the", "rome")


def run_config(folder: Path, tokens: tuple[str, ...], stated: bool | None, lowercase: bool | None = None) -> RunConfig:
    """Return a run whose vocabulary comes with a tokenizer_config.json that states do_lower_case, unless None."""
    (folder / "vocab.txt").write_text("\n".join(tokens))
    if stated is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": stated}))
    config = tiny_config()
    keys = {"vocabulary": str(folder / "vocab.txt"), "lowercase": lowercase}
    return config.model_copy(update={"output": str(folder), "tokenizer": config.tokenizer.model_copy(update=keys)})


@pytest.mark.parametrize(("tokens", "lowercase"), [(CASED, False), (UNCASED, True)])
@pytest.mark.parametrize("is_stated", [True, False])
def test_lowercasing_follows_the_vocabulary(
    tmp_path: Path, tokens: tuple[str, ...], lowercase: bool, is_stated: bool
) -> None:
    config = run_config(tmp_path, tokens, lowercase if is_stated else None)
    assert choose_tokenizer(config, Storage()).lowercase is lowercase


@pytest.mark.parametrize(("tokens", "stated"), [(CASED, True), (UNCASED, False)])
def test_contradicting_tokenizer_config_requires_the_key(tmp_path: Path, tokens: tuple[str, ...], stated: bool) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer\.lowercase: .*do_lower_case {str(stated).lower()}; set the key"):
        choose_tokenizer(run_config(tmp_path, tokens, stated), Storage())
    for lowercase in (True, False):
        chosen = choose_tokenizer(run_config(tmp_path, tokens, stated, lowercase), Storage())
        assert chosen.lowercase is lowercase


def test_unknown_tokens_are_measured_per_source_and_reported(tmp_path: Path, make_tar: Any, caplog: Any) -> None:
    captions = {"english": "a red cat", "arabic": "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621"}
    english, arabic = urls = [str(tmp_path / name) for name in captions]
    for url, caption in zip(urls, captions.values(), strict=True):
        Path(url).mkdir()
        Path(url, "0.tar").write_bytes(make_tar({str(n): {"txt": caption.encode()} for n in range(5)}))
        index_shards(Storage(), url)
    run, tokenizer = str(tmp_path / "run"), Tokenizer([*SPECIALS, "a", "red", "cat"])
    coverage = measure_coverage(Storage(), run, tokenizer, urls)
    assert coverage.unknown == {english: 0.0, arabic: 1.0}
    assert "100.0% of the tokens" in caplog.text
    assert arabic in (coverage.alert or "")
    assert load_coverage(Storage(), run) == coverage == measure_coverage(Storage(), run, tokenizer, [])
    assert measure_coverage(Storage(), run, Tokenizer([*SPECIALS, "a"]), [english]).worst == pytest.approx(2 / 3)


@pytest.mark.parametrize(("unknown", "alerts"), [({}, False), ({"a": 0.01}, False), ({"a": 0.0101, "b": 0.0}, True)])
def test_alert_is_raised_above_one_percent(unknown: dict[str, float], alerts: bool) -> None:
    assert (Coverage("x", unknown).alert is not None) == alerts


@pytest.mark.parametrize("record", [None, "[1]"])
def test_missing_or_malformed_record_is_ignored(tmp_path: Path, record: str | None) -> None:
    if record is not None:
        (tmp_path / "vocabulary.json").write_text(record)
    assert load_coverage(Storage(), str(tmp_path)) is None
