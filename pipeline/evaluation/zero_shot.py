"""Pictures told by class without training for it: each is held against texts that name the classes.

A class is the mean, of unit length, of the vectors of its prompts (CLIP, arXiv 2103.00020, section 3.1.4), and a
picture is of the class whose vector is nearest.

Shapes: C classes, T prompts, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import CLASSES, Choices
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import shard_folder
from pipeline.data.storage import NotFound, Storage, join
from pipeline.evaluation.annotated import AnnotatedSource
from pipeline.evaluation.classification import Classification, classified, places_of
from pipeline.evaluation.ranks import ALONE, Ranks
from pipeline.evaluation.retrieval import all_heads, embed_texts, reading
from pipeline.models.forward import ForwardInput


def class_names(config: RunConfig, source: str, storage: Storage) -> tuple[str, ...]:
    """The names of a labelled source's classes, by their numbers; ConfigError where nothing beside it lists them."""
    url = join(shard_folder(config.sources[source].shards), CLASSES)
    try:
        return Choices.from_bytes(storage.read(url), url).names
    except NotFound as error:
        raise ConfigError(
            f"source '{source}' is labelled, and there is no {url} to name its classes; write it: a JSON list of names "
            "in the order of the labels, as mome shards build does for folders of classes"
        ) from error


def class_vectors(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    prompts: Sequence[str],
    max_text: int,
    batch: int = 64,
    ranks: Ranks = ALONE,
) -> Tensor:
    """(C, D) unit vectors; each prompt holds {} in the place of the name."""
    texts = [prompt.replace("{}", name.replace("_", " ")) for name in names for prompt in prompts]
    rows = [each.ids for each in tokenizer.encode_batch(texts, max_text)]
    vectors = embed_texts(model, rows, tokenizer.pad_id, batch, ranks)
    return F.normalize(vectors.unflatten(0, (len(names), len(prompts))).mean(dim=1), dim=1)


def measure_zero_shot(model: nn.Module, source: AnnotatedSource, classes: Tensor) -> Classification:
    """Reads the whole source against the vectors (C, D) of its classes.

    Raises DataError as its `shared`, and for a label that no class has.
    """

    def read() -> tuple[list[int], int]:
        with reading(model) as device:
            return places_of((all_heads(model, one) @ classes.T, known(said)) for one, said in batches(device))

    def batches(device: torch.device) -> Iterator[tuple[ForwardInput, list[int]]]:
        return source.batches(device, "itc")

    def known(labels: list[int]) -> list[int]:
        if max(labels, default=0) >= len(classes):
            raise DataError(f"a picture is of class {max(labels)}, and {len(classes)} are named, from 0")
        return labels

    return classified(source.shared(read))
