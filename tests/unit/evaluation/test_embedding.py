"""Embeddings of a folder of shards equal those of one image or caption at a time, for any rank and resume point."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from pipeline.config.errors import ConfigError
from pipeline.data.building.importers import write_shards
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from pipeline.evaluation.embedding import DONE, Embedder, embed_shards
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.retrieval import Predictor


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory):
    """Pack the session's scenes into shards of seven."""
    folder = str(tmp_path_factory.mktemp("shards"))
    scenes = iter_samples(Storage(), config.sources["unseen"].shards)
    write_shards(Storage(), ({"__key__": sample.key, **sample.members} for sample in scenes), folder, 7)
    return folder


@pytest.fixture
def embed(model, config, tokenizer, shards, tmp_path):
    """Return a function that embeds the shards into a folder and returns the summary."""

    def embed(out, digest="weights-a", ranks=SINGLE_PROCESS, stage=-1, url=shards, storage=None):
        embedder = Embedder(Predictor(model, tokenizer), config, config.stages[stage], digest)
        return embed_shards(embedder, storage or Storage(), url, out if "://" in out else str(tmp_path / out), ranks)

    return embed


def tables(out: Path):
    return {file.name: parquet.read_table(file) for file in sorted(out.glob("*.parquet"))}


def test_every_image_and_caption_has_its_vector(embed, tmp_path, model, held_out, tokenizer):
    summary = embed("out")
    assert summary == {"shards": 4, "already_done": 0, "images": 24, "captions": 48, "skipped": 0}
    rows = [row for table in tables(tmp_path / "out").values() for row in table.to_pylist()]
    assert [row["key"] for row in rows] == [key for key in held_out.keys for _ in range(3)]
    assert [row["caption"] for row in rows] == [None, 0, 1] * 24
    assert [row["image_id"] for row in rows[::3]] == held_out.image_id.tolist()
    vectors = torch.tensor(np.array([row["vector"] for row in rows], dtype=np.float32)).view(24, 3, -1)
    predictor = Predictor(model, tokenizer)
    texts = predictor.embed_texts([tokens.ids for tokens in held_out.tokens])
    torch.testing.assert_close(vectors[:, 0], predictor.embed_images(held_out.images), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vectors[:, 1:].flatten(0, 1), texts, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="stage vision trained no contrast"):
        embed("out", stage=0)


def test_outdated_embeddings_are_computed_again_and_ranks_share_the_shards(embed, tmp_path):
    class One(Ranks):
        def __init__(self, rank):
            self.rank, self.world_size = rank, 3

    assert embed("out")["images"] == 24
    assert embed("out")["already_done"] == 4
    assert [embed("three", ranks=One(rank))["images"] for rank in (0, 2)] == [10, 7]
    assert embed("three")["already_done"] == 3
    assert tables(tmp_path / "three") == tables(tmp_path / "out")
    out = tmp_path / "out"
    written, rows = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}, tables(out)
    next((out / DONE).iterdir()).unlink()  # killed after a shard's file and before its record
    assert embed("out")["already_done"] == 3
    assert sum(file.stat().st_mtime_ns != time for file, time in written.items()) == 1, "a finished file was rewritten"
    assert tables(out) == rows
    first = min(out.glob("*.parquet"))
    first.unlink()
    assert embed("out")["already_done"] == 3
    record = next((tmp_path / "out" / DONE).iterdir())
    record.write_text(json.dumps({**json.loads(record.read_text()), "shard": "another"}))
    assert embed("out")["already_done"] == 3
    assert embed("out", digest="weights-b")["already_done"] == 0
    assert parquet.read_schema(first).metadata[b"mome.checkpoint"] == b"weights-b"


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_buckets_and_folders_give_equal_embeddings(embed, shards, tmp_path, s3):
    storage = Storage(s3.config)
    for file in Path(shards).iterdir():
        storage.upload(file, s3.url("shards", file.name))
    embed("here")
    summaries = [embed(s3.url("out"), url=s3.url("shards"), storage=storage) for _ in range(2)]
    assert [(summary["already_done"], summary["images"]) for summary in summaries] == [(0, 24), (4, 24)]
    for name, table in tables(tmp_path / "here").items():
        (tmp_path / name).write_bytes(storage.read(s3.url("out", name)))
        assert parquet.read_table(tmp_path / name) == table
