"""`mome evaluate` and `mome embed` with ranks on Ray find what one process finds."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet
from short_run import short_config

from jobs.embed import embed
from jobs.evaluate import evaluate_checkpoint
from pipeline.config.schema import RunConfig
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import captions_of_source
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.training.checkpoint import save_weights, stage_url
from pipeline.training.stages import heads


def _weights(folder: Path) -> tuple[RunConfig, str]:
    """Of the second stage, never trained; its scenes are drawn."""
    config, storage = short_config(str(folder), evaluation={"source": "scenes", "limit": 22, "batch": 5}), Storage()
    build_synthetic(storage, config.sources)
    tokenizer = Tokenizer.train(captions_of_source(storage, config.sources["scenes"].shards), 300)
    model = build_model(config.model, tokenizer.size, heads(config, 1), seed=5)
    metadata = {"config": config.model_dump(mode="json"), "stage": "pairs", "step": 16}
    save_weights(storage, stage_url(config, 1), model.state_dict(), list(tokenizer.tokens), metadata)
    return config, stage_url(config, 1)


def test_ranks_on_ray_find_what_one_process_finds(tmp_path: Path) -> None:
    config, url = _weights(tmp_path)
    report = tmp_path / "report.html"
    alone = evaluate_checkpoint(url, track=False, report=report)
    page = report.read_bytes()
    assert evaluate_checkpoint(url, track=False, report=report, workers=2) == alone
    assert alone is not None
    assert (alone["pairs"], alone["trained_on"]) == (22, ["vision", "pairs"])
    assert report.read_bytes().count(b"<img") == page.count(b"<img")
    shards = config.sources["scenes"].shards
    one, two = (embed(shards, url, str(tmp_path / f"{workers}"), workers) for workers in (None, 2))
    assert one is not None
    assert two == {**one, "out": str(tmp_path / "2")}
    files = sorted(file.name for file in (tmp_path / "None").glob("*.parquet"))
    assert files
    for name in files:
        assert parquet.read_table(tmp_path / "None" / name) == parquet.read_table(tmp_path / "2" / name)
