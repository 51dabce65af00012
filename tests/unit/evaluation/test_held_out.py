"""Held-out pairs are read completely and in the manifest's order, and unusable samples are counted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig, SourceConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import EvalPairs, load_pairs


def test_every_pair_is_read_in_the_order_of_the_manifest(
    config: RunConfig, storage: Storage, held_out: EvalPairs
) -> None:
    assert held_out.keys == tuple(s.key for s in iter_samples(storage, config.sources["unseen"].shards))
    assert held_out.images[:].shape == (24, 32, 32, 3)
    assert held_out.images[3].dtype == torch.uint8
    assert held_out.caption_of.tolist() == [image for image in range(24) for _ in range(2)]
    assert [
        held_out.captions[i][n] for i, n in zip(held_out.caption_of, held_out.caption_numbers(), strict=True)
    ] == list(held_out.texts())
    assert len(held_out.tokens) == 48
    assert held_out.skipped == {}


def test_a_limit_keeps_the_first_pairs(
    config: RunConfig, storage: Storage, tokenizer: Tokenizer, held_out: EvalPairs
) -> None:
    few = load_pairs(config, storage, "unseen", 5, tokenizer, max_text_length=40)
    assert few.keys == held_out.keys[:5]
    assert torch.equal(few.images[:], held_out.images[:5])
    assert torch.equal(few.image_id, held_out.image_id[:5])


def test_unknown_sources_and_sources_without_pairs_are_rejected(
    config: RunConfig, storage: Storage, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match="'nowhere' is not a source of this run; sources with pairs: unseen"):
        load_pairs(config, storage, "nowhere", None, tokenizer, max_text_length=40)
    with pytest.raises(ConfigError, match="'pictures' has no pairs"):
        load_pairs(config, storage, "pictures", None, tokenizer, max_text_length=40)


def _picture(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _mixed(config: RunConfig, storage: Storage, folder: Path, bad: int) -> RunConfig:
    samples = [
        {
            "__key__": f"{number:03d}",
            "png": b"no picture" if number < bad else _picture((number, 0, 0)),
            "json": json.dumps({"captions": ["a red square", "two circles"], "image_id": number // 2}).encode(),
        }
        for number in range(10)
    ]
    write_shards(storage, iter(samples), str(folder), 4)
    return config.model_copy(update={"sources": {"mixed": SourceConfig(shards=str(folder))}})


def test_a_bad_sample_is_left_out_and_counted(
    config: RunConfig, storage: Storage, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = load_pairs(
        _mixed(config, storage, tmp_path / "a", 1), storage, "mixed", None, tokenizer, max_text_length=40
    )
    assert len(found) == 9
    assert sum(found.skipped.values()) == 1
    assert "image: " in next(iter(found.skipped))
    assert found.image_id[1] == found.image_id[2] != found.image_id[3]


def test_too_many_bad_samples_are_fatal_with_their_reasons(
    config: RunConfig, storage: Storage, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"5 of 10 samples are bad: image: .*max_bad_rate"):
        load_pairs(_mixed(config, storage, tmp_path / "b", 5), storage, "mixed", None, tokenizer, max_text_length=40)
