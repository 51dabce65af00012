"""Predictions of a checkpoint for given inputs (`mome predict`, `mome explain`) and for shards (`mome embed`)."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jobs.configs import Caller, source_types
from jobs.console import PLAIN_SECONDS, notify, poll, write_output
from jobs.distributed import device_of, on_workers, ranks_here
from pipeline.config.errors import ConfigError
from pipeline.config.schema import MODEL_SECTIONS
from pipeline.config.urls import absolute
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.evaluation.embedding import DONE, Embedder, embed_shards
from pipeline.evaluation.explain import explain, render_explanation, untrained_notes
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.retrieval import Predictor
from pipeline.inference import load
from pipeline.objectives import modules_for
from pipeline.training.checkpoint.committed import COMMIT
from pipeline.training.checkpoint.weights import weights_info

FORMATS = (".html", ".png")


def predict(
    checkpoint: str, image: str | None, other: str | None, text: str | None, top: int = 5, caller: Caller = Caller()
) -> dict[str, Any]:
    """Return probabilities by name; images are paths or URLs. Raises ConfigError, CheckpointError, DataError."""
    if other is not None and image is None:
        raise ConfigError("--second-image is given without --image; give the first image with --image")
    model = load(checkpoint, storage=Storage(caller.storage), tracking_uri=caller.server)
    images = [url for url in (image, other) if url is not None]
    return model.predict(images, text, top) | {"stage": model.stage.name, "checkpoint": model.url}


def explain_checkpoint(checkpoint: str, image: str, text: str, out: str, caller: Caller = Caller()) -> dict[str, Any]:
    """Draw the word-patch alignment to `out`; return it as numbers. Raises ConfigError, CheckpointError, DataError."""
    if not out.endswith(FORMATS):
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    storage = Storage(caller.storage)
    trained = load(checkpoint, "cpu", storage, caller.server)
    config, stage = trained.config, trained.stage
    if modules_for(trained.model, "wpa", "pairs") is None:
        able = ", ".join(kind for kind in MODEL_SECTIONS if source_types(kind)["wpa"])
        raise ConfigError(
            f"{checkpoint}: a model of kind '{config.model.kind}' does not read words and patches together; "
            f"give a checkpoint of one that does ({able})"
        )
    pixels = torch.from_numpy(trained.pixels(image).copy())
    explanation = explain(trained.model, trained.tokenizer, pixels, text, stage.max_text_length)
    notes = untrained_notes(config, stage.name)
    heading = f"{trained.url}, stage {stage.name}, step {trained.step}"
    write_output(storage, out, render_explanation(explanation, text, heading, notes, Path(out).suffix), "--out")
    words = []
    for word in explanation.words:
        row, column = divmod(int(word.heat.argmax()), word.heat.shape[1])
        hottest = {"row": row, "column": column, "share": word.heat.max().item()}
        conditions = {"with_image": asdict(word.with_image), "without_image": asdict(word.without_image)}
        words.append({"word": word.word, "hottest_patch": hottest, **conditions})
    return {"out": out, "distance": explanation.distance, "notes": notes, "words": words}


def embed(
    shards: str, checkpoint: str, out: str, workers: int | None = None, caller: Caller = Caller()
) -> dict[str, Any] | None:
    """Write the embeddings of all images and captions of a folder of shards; return what `mome embed --json` prints.

    A repeated call continues where it stopped. With `workers`, that many ranks on Ray share the shards; under torchrun
    its ranks do, and all but rank 0 get None. Raises ConfigError for a checkpoint that was not trained with ITC,
    CheckpointError, DataError.
    """
    shards, checkpoint, out = (absolute(url.rstrip("/")) for url in (shards, checkpoint, out))
    storage, folder = Storage(caller.storage), join(out, DONE)

    def work(ranks: Ranks) -> dict[str, Any]:
        """Embed on this rank; all ranks call it."""
        own = Storage(caller.storage)
        trained = load(checkpoint, device_of(ranks), own)
        digest = hashlib.sha256(own.read(join(trained.url, COMMIT))).hexdigest()
        predictor = Predictor(trained.model, trained.tokenizer, trained.config.evaluation.batch_size)
        embedder = Embedder(predictor, trained.config, trained.stage, digest)
        return {"out": out, "checkpoint": trained.url, **embed_shards(embedder, own, shards, out, ranks)}

    ranks = ranks_here() if workers is None else SINGLE_PROCESS
    if ranks.rank != 0:
        work(ranks)
        return None
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
        return work(ranks) if workers is None else on_workers(work, config, workers, "embedding")
