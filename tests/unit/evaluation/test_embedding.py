"""Embeddings of a folder of shards equal those of one image or caption at a time, for any rank and resume point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from pipeline.evaluation import embedding
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.embedding import Embedder, embed_shards
from pipeline.evaluation.ranks import Ranks
from pipeline.evaluation.retrieval import embed_images, embed_texts
from pipeline.models.vlmo import VLMo


@pytest.fixture
def shards(config: RunConfig, tmp_path: Path) -> str:
    """Pack the session's scenes into shards of seven."""
    from pipeline.data.building.importers import write_shards

    samples = [
        {"__key__": sample.key, **sample.members} for sample in iter_samples(Storage(), config.sources["unseen"].shards)
    ]
    write_shards(Storage(), iter(samples), str(tmp_path / "shards"), 7)
    return str(tmp_path / "shards")


@pytest.fixture
def embedder(model: VLMo, config: RunConfig, tokenizer: Tokenizer) -> Embedder:
    return Embedder(model, tokenizer, config, config.stages[-1], "weights-a")


def tables(out: Path) -> dict[str, Any]:
    return {file.name: parquet.read_table(file) for file in sorted(out.glob("*.parquet"))}


def test_every_image_and_caption_has_its_vector(
    embedder: Embedder, shards: str, tmp_path: Path, model: VLMo, held_out: EvalPairs, tokenizer: Tokenizer
) -> None:
    found = embed_shards(embedder, Storage(), shards, str(tmp_path / "out"))
    assert (found.shards, found.already_done, found.images, found.captions, found.skipped) == (4, 0, 24, 48, 0)
    rows = [row for table in tables(tmp_path / "out").values() for row in table.to_pylist()]
    assert [row["key"] for row in rows] == [key for key in held_out.keys for _ in range(3)]
    assert [row["caption"] for row in rows] == [None, 0, 1] * 24
    assert [row["image_id"] for row in rows[::3]] == held_out.image_id.tolist()
    vectors = torch.tensor(np.array([row["vector"] for row in rows], dtype=np.float32))
    images, texts = embed_images(model, held_out.images), embed_texts(model, held_out.token_ids(), tokenizer.pad_id)
    torch.testing.assert_close(vectors.view(24, 3, -1)[:, 0], images, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vectors.view(24, 3, -1)[:, 1:].flatten(0, 1), texts, atol=1e-6, rtol=1e-5)


def test_resumed_embedding_equals_the_uninterrupted_one(
    embedder: Embedder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_shards(embedder, Storage(), shards, str(tmp_path / "whole"))
    original, written = Storage.write, []

    def write(self: Storage, url: str, data: bytes) -> None:
        """Raise before the third record is written, when its shard's file already exists."""
        if embedding.DONE in url:
            written.append(url)
            if len(written) == 3:
                raise KeyboardInterrupt
        original(self, url, data)

    monkeypatch.setattr(Storage, "write", write)
    with pytest.raises(KeyboardInterrupt):
        embed_shards(embedder, Storage(), shards, str(tmp_path / "killed"))
    assert len(tables(tmp_path / "killed")) == 3
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.parquet")}
    found = embed_shards(embedder, Storage(), shards, str(tmp_path / "killed"))
    assert (found.shards, found.already_done, found.images) == (4, 2, 24)
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.parquet")}
    assert sum(after[name] == before[name] for name in before) == 2, "what was finished is not written again"


def test_outdated_embeddings_are_computed_again(
    embedder: Embedder, shards: str, tmp_path: Path, model: VLMo, config: RunConfig, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    embed_shards(embedder, Storage(), shards, str(out))
    assert embed_shards(embedder, Storage(), shards, str(out)).already_done == 4
    first = sorted(out.glob("*.parquet"))[0]
    first.unlink()
    assert embed_shards(embedder, Storage(), shards, str(out)).already_done == 3
    record = next(iter((out / embedding.DONE).iterdir()))
    record.write_text(json.dumps({**json.loads(record.read_text()), "shard": "another"}))
    assert embed_shards(embedder, Storage(), shards, str(out)).already_done == 3
    others = Embedder(model, tokenizer, config, config.stages[-1], "weights-b")
    assert embed_shards(others, Storage(), shards, str(out)).already_done == 0
    assert parquet.read_schema(first).metadata[b"mome.checkpoint"] == b"weights-b"


def test_shards_are_distributed_over_ranks(embedder: Embedder, shards: str, tmp_path: Path) -> None:
    class One(Ranks):
        def __init__(self, rank: int):
            self.rank, self.world_size = rank, 3

    alone = embed_shards(embedder, Storage(), shards, str(tmp_path / "alone"))
    found = [embed_shards(embedder, Storage(), shards, str(tmp_path / "three"), One(rank)) for rank in (2, 1)]
    assert [each.images for each in found] == [7, 7]
    assert embed_shards(embedder, Storage(), shards, str(tmp_path / "three")).already_done == 2
    assert tables(tmp_path / "three") == tables(tmp_path / "alone")
    assert alone.images == 24


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_buckets_and_folders_give_equal_embeddings(embedder: Embedder, shards: str, tmp_path: Path, s3: Any) -> None:
    storage = Storage(s3.config)
    for file in Path(shards).iterdir():
        storage.upload(file, s3.url("shards", file.name))
    embed_shards(embedder, Storage(), shards, str(tmp_path / "here"))
    found = embed_shards(embedder, storage, s3.url("shards"), s3.url("out"))
    assert (found.already_done, found.images) == (0, 24)
    assert embed_shards(embedder, storage, s3.url("shards"), s3.url("out")).already_done == 4
    for name, table in tables(tmp_path / "here").items():
        (tmp_path / name).write_bytes(storage.read(s3.url("out", name)))
        assert parquet.read_table(tmp_path / name) == table


def test_weights_without_itc_are_rejected(model: VLMo, config: RunConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="stage vision trained no contrast"):
        Embedder(model, tokenizer, config, config.stages[0], "weights-a")
