"""`mome embed`: the vectors of every picture and caption of a bucket of shards, as Parquet."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jobs.evaluate import model_of
from jobs.shared import answered, device_of, on_workers, ranks_here
from pipeline.config.paths import absolute
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage, join
from pipeline.evaluation.embedding import Embedder, digest_of, embed_source
from pipeline.evaluation.evaluate import stage_of
from pipeline.evaluation.ranks import Ranks
from pipeline.training.checkpoint import COMMIT, config_of_weights, load_weights


@dataclass(frozen=True)
class Asked:
    shards: str
    checkpoint: str
    out: str


def embed(shards: str, checkpoint: str, out: str, workers: int | None = None) -> dict[str, Any] | None:
    """What was embedded, as `mome embed --json` prints it; the same call again goes on where it was stopped.

    With `workers` so many ranks on Ray share the shards; under torchrun its ranks do, and all but the first get None.
    Raises ConfigError for a checkpoint that trained no contrast, CheckpointError, DataError.
    """
    asked = Asked(*(absolute(url.rstrip("/")) for url in (shards, checkpoint, out)))
    if workers is not None:
        config = config_of_weights(Storage(), asked.checkpoint)
        return on_workers(_embed_rank, config, workers, "embedding", asdict(asked))
    ranks = ranks_here()
    found = _embed(asked, ranks)
    return found if ranks.rank == 0 else None


def _embed_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker."""
    return answered(loop_config, lambda asked, ranks: _embed(Asked(**asked), ranks))


def _embed(asked: Asked, ranks: Ranks) -> dict[str, Any]:
    weights = load_weights(Storage(), asked.checkpoint)
    config, stage = weights.config, stage_of(weights.config, weights.stage)
    storage = Storage(config.storage)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary)
    digest = digest_of(storage.read(join(weights.url, COMMIT)))
    embedder = Embedder(model_of(weights).to(device_of(ranks)), tokenizer, config, stage, digest)
    found = embed_source(embedder, storage, asked.shards, asked.out, ranks, config.data.max_bad_rate)
    return {"out": asked.out, "checkpoint": weights.url, **asdict(found)}
