"""The choice of a run's vocabulary, and whether its tokenizer lowercases text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import SPECIALS
from pipeline.data.storage import Storage
from pipeline.training.prepare import choose_tokenizer

CASED, UNCASED = (*SPECIALS, "the", "Rome"), (*SPECIALS, "the", "rome")


def run_config(folder: Path, tokens: tuple[str, ...], stated: bool | None, **tokenizer: Any) -> RunConfig:
    (folder / "vocab.txt").write_text("\n".join(tokens))
    if stated is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": stated}))
    stage = {"name": "stage", "sources": {"one": 1.0}, "objectives": {"mlm": {}}, "steps": 1, "global_batch_size": 8}
    return validate(
        {
            "name": "test",
            "output": str(folder / "runs"),
            "model": {
                "width": 16,
                "layers": 2,
                "heads": 2,
                "vision_language_layers": 1,
                "image_size": 16,
                "patch_size": 8,
            },
            "sources": {"one": {"shards": str(folder), "type": "text"}},
            "data": {"streams": 8},
            "tokenizer": {"vocabulary": str(folder / "vocab.txt"), **tokenizer},
            "stages": [stage],
        },
        "test",
    )


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
        chosen = choose_tokenizer(run_config(tmp_path, tokens, stated, lowercase=lowercase), Storage())
        assert chosen.lowercase is lowercase
