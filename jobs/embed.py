"""`mome embed`: write the embeddings of all images and captions of a folder of shards as Parquet files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jobs.caller import Caller
from jobs.console import PLAIN_SECONDS, notify, poll
from jobs.distributed import device_of, on_workers, ranks_here, run_request
from pipeline.config.urls import absolute
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.evaluation.embedding import DONE, Embedder, checkpoint_digest, embed_shards
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.inference import build_trained_model, load_usable_weights
from pipeline.training.checkpoint import COMMIT, weights_info


@dataclass(frozen=True)
class EmbedRequest:
    """Shards to embed, the checkpoint, and the output folder."""

    shards: str
    checkpoint: str
    out: str
    caller: str = "{}"  # a Caller, as JSON

    def store(self) -> Storage:
        return Caller.model_validate_json(self.caller).store()


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
    storage = caller.store()
    config = caller.applied(weights_info(storage, request.checkpoint).config)
    with poll(_EmbedProgress(request, storage).update, PLAIN_SECONDS):
        if workers is not None:
            return on_workers(_embed_rank, config, workers, "embedding", asdict(request))
        return _embed(request, ranks)


class _EmbedProgress:
    """Progress of the ranks, wherever they run, from the records of finished shards."""

    def __init__(self, request: EmbedRequest, storage: Storage):
        self._shards = len(load_manifest(storage, request.shards).shards)
        self._folder, self._storage = join(request.out, DONE), storage
        self._before = self._last = storage.list_info(self._folder)

    def update(self) -> None:
        """Print a line if shards were finished since the last call."""
        now = self._storage.list_info(self._folder)
        if now != self._last:
            self._last = now
            new = sum(self._before.get(name) != info for name, info in now.items())
            notify(f"embedding: {new} shards finished, of {self._shards} in the folder", style="dim")


def _embed_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """Embed shards on a Ray Train worker."""
    return run_request(loop_config, lambda request, ranks: _embed(EmbedRequest(**request), ranks))


def _embed(request: EmbedRequest, ranks: Ranks) -> dict[str, Any]:
    storage = request.store()
    weights = load_usable_weights(storage, request.checkpoint)
    config, stage = weights.config, weights.config.stage_named(weights.stage)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase)
    digest = checkpoint_digest(storage.read(join(weights.url, COMMIT)))
    embedder = Embedder(build_trained_model(weights).to(device_of(ranks)), tokenizer, config, stage, digest)
    result = embed_shards(embedder, storage, request.shards, request.out, ranks, config.data.max_bad_rate)
    return {"out": request.out, "checkpoint": weights.url, **asdict(result)}
