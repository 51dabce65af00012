"""`mome embed`: write the embeddings of all images and captions of a folder of shards as Parquet files."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from jobs.caller import Caller
from jobs.console import PLAIN_SECONDS, notify, poll
from jobs.distributed import device_of, on_workers, ranks_here, run_request
from pipeline.config.urls import absolute
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import join
from pipeline.evaluation.embedding import DONE, Embedder, embed_shards
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.inference import build_trained_model, load_usable_weights
from pipeline.training.checkpoint import COMMIT, weights_info


@dataclass(frozen=True)
class EmbedRequest:
    """Shards to embed, the checkpoint, and the output folder."""

    shards: str
    checkpoint: str
    out: str
    caller: str  # a Caller, as JSON


def embed(
    shards: str, checkpoint: str, out: str, workers: int | None = None, caller: Caller = Caller()
) -> dict[str, Any] | None:
    """Embed the shards and return what `mome embed --json` prints; a repeated call continues where it stopped.

    With `workers`, that many ranks on Ray share the shards; under torchrun its ranks do, and all but rank 0 get None.
    Raises ConfigError for a checkpoint that was not trained with ITC, CheckpointError, DataError.
    """
    shards, checkpoint, out = (absolute(url.rstrip("/")) for url in (shards, checkpoint, out))
    request = EmbedRequest(shards, checkpoint, out, caller.model_dump_json())
    ranks = ranks_here() if workers is None else SINGLE_PROCESS
    if ranks.rank != 0:
        _embed(request, ranks)
        return None
    storage, folder = caller.store(), join(out, DONE)
    config = caller.applied(weights_info(storage, checkpoint).config)
    total = len(load_manifest(storage, shards).shards)
    before = last = storage.list_info(folder)

    def show_progress() -> None:
        """Print a line if any rank, wherever it runs, has written the record of a shard since the last call."""
        nonlocal last
        now = storage.list_info(folder)
        if now != last:
            last = now
            new = sum(before.get(name) != info for name, info in now.items())
            notify(f"embedding: {new} shards finished, of {total} in the folder", style="dim")

    with poll(show_progress, PLAIN_SECONDS):
        if workers is not None:
            return on_workers(_embed_rank, config, workers, "embedding", asdict(request))
        return _embed(request, ranks)


def _embed_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """Embed shards on a Ray Train worker."""
    return run_request(loop_config, lambda request, ranks: _embed(EmbedRequest(**request), ranks))


def _embed(request: EmbedRequest, ranks: Ranks) -> dict[str, Any]:
    storage = Caller.model_validate_json(request.caller).store()
    weights = load_usable_weights(storage, request.checkpoint)
    config, stage = weights.config, weights.config.stage_named(weights.stage)
    tokenizer = Tokenizer(weights.vocabulary or SPECIALS, config.tokenizer.lowercase)
    digest = hashlib.sha256(storage.read(join(weights.url, COMMIT))).hexdigest()
    embedder = Embedder(build_trained_model(weights).to(device_of(ranks)), tokenizer, config, stage, digest)
    result = embed_shards(embedder, storage, request.shards, request.out, ranks, config.data.max_bad_rate)
    return {"out": request.out, "checkpoint": weights.url, **asdict(result)}
