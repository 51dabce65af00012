"""`mome embed`: the vectors of every picture and caption of a bucket of shards, as Parquet."""

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
    shards: str
    checkpoint: str
    out: str
    caller: str = "{}"  # a Caller, as JSON

    def store(self) -> Storage:
        return Caller.model_validate_json(self.caller).store()


def embed(
    shards: str, checkpoint: str, out: str, workers: int | None = None, caller: Caller = Caller()
) -> dict[str, Any] | None:
    """What was embedded, as `mome embed --json` prints it; the same call again goes on where it was stopped.

    With `workers` so many ranks on Ray share the shards; under torchrun its ranks do, and all but the first get None.
    Raises ConfigError for a checkpoint that trained no contrast, CheckpointError, DataError.
    """
    shards, checkpoint, out = (absolute(url.rstrip("/")) for url in (shards, checkpoint, out))
    asked = EmbedRequest(shards, checkpoint, out, caller.model_dump_json())
    ranks = ranks_here() if workers is None else SINGLE_PROCESS
    if ranks.rank != 0:
        _embed(asked, ranks)
        return None
    storage = caller.store()
    config = caller.applied(weights_info(storage, asked.checkpoint).config)
    with poll(_Shown(asked, storage).look, PLAIN_SECONDS):
        if workers is not None:
            return on_workers(_embed_rank, config, workers, "embedding", asdict(asked))
        return _embed(asked, ranks)


class _Shown:
    """How far the ranks are, wherever they run: by the records of finished shards."""

    def __init__(self, asked: EmbedRequest, storage: Storage):
        self._shards = len(load_manifest(storage, asked.shards).shards)
        self._folder, self._storage = join(asked.out, DONE), storage
        self._before = self._shown = storage.list_info(self._folder)

    def look(self) -> None:
        """A line, where there is something new."""
        now = self._storage.list_info(self._folder)
        if now != self._shown:
            self._shown = now
            new = sum(self._before.get(name) != info for name, info in now.items())
            notify(f"embedding: {new} shards done by now, of {self._shards} in the folder", style="dim")


def _embed_rank(loop_config: dict[str, str]) -> dict[str, Any]:
    """What Ray Train runs on each worker."""
    return run_request(loop_config, lambda asked, ranks: _embed(EmbedRequest(**asked), ranks))


def _embed(asked: EmbedRequest, ranks: Ranks) -> dict[str, Any]:
    storage = asked.store()
    weights = load_usable_weights(storage, asked.checkpoint)
    config, stage = weights.config, weights.config.stage_named(weights.stage)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase)
    digest = checkpoint_digest(storage.read(join(weights.url, COMMIT)))
    embedder = Embedder(build_trained_model(weights).to(device_of(ranks)), tokenizer, config, stage, digest)
    found = embed_shards(embedder, storage, asked.shards, asked.out, ranks, config.data.max_bad_rate)
    return {"out": asked.out, "checkpoint": weights.url, **asdict(found)}
