"""What people run instead: three loaders of other projects over the same shards, as their documentation builds them.

Each gives (image, text) batches without end; PillowRecipe tells what the rows are.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import webdataset
from torch.utils.data import DataLoader

from jobs.bench.pillow import PillowRecipe, decode_rgb

WARM_UP_BATCHES = 6
IMAGES = "jpg;png;jpeg;webp"
SAMPLE_BUFFER, SAMPLE_INITIAL = 5000, 1000  # open_clip's shuffle of samples
SHARD_BUFFER, SHARD_INITIAL = 2000, 500  # and of shards
PASSES = 20  # over the shards before its stages start anew, which throws an unfinished batch away
RAY_STORE_BYTES = 2**30


@dataclass(frozen=True)
class Work:
    """The data a peer reads, and with how many processes."""

    shards: tuple[str, ...]  # paths of tars
    counts: tuple[int, ...]  # samples of each
    samples: int  # to be measured
    batch: int
    workers: int
    seed: int
    recipe: PillowRecipe


@dataclass(frozen=True)
class Stream:
    """Batches that bring a loader to its steady state, then those to be counted. Both are (image, text)."""

    warm_up: Iterator[tuple[Any, Any]]
    batches: Iterator[tuple[Any, Any]]

    @staticmethod
    def endless(batches: Iterator[tuple[Any, Any]]) -> Stream:
        """What is prepared ahead when the count begins is as much as when it ends."""
        return Stream(itertools.islice(batches, WARM_UP_BATCHES), batches)


def webdataset_pil(work: Work) -> Stream:
    """webdataset's reader and buffers, Pillow, torch's DataLoader: the tutorial's loader."""
    recipe = work.recipe

    def row(sample: dict[str, Any]) -> tuple[Any, Any]:
        return recipe.image(decode_rgb(_picture(sample))), recipe.text(json.loads(sample["json"]))

    dataset = webdataset.WebDataset(list(work.shards), shardshuffle=100, seed=work.seed)
    dataset = dataset.shuffle(min(1000, _share(work))).map(row).repeat()
    return Stream.endless(iter(DataLoader(dataset, work.batch, num_workers=work.workers, collate_fn=recipe.collate)))


def open_clip_composition(work: Work) -> Stream:
    """The stages of open_clip's training data: seeded shard shuffle, large sample buffer, batches made by the workers.

    Its pictures are transformed by torchvision on Pillow; here by the same Pillow calls without torchvision.
    """
    stages = [
        webdataset.SimpleShardList(list(work.shards) * PASSES),
        webdataset.detshuffle(bufsize=SHARD_BUFFER, initial=SHARD_INITIAL, seed=work.seed),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(min(SAMPLE_BUFFER, _share(work)), initial=min(SAMPLE_INITIAL, _share(work))),
        webdataset.select(_is_pair),
        webdataset.decode("pilrgb"),
        webdataset.rename(image=IMAGES, text="json"),
        webdataset.map_dict(image=work.recipe.image, text=work.recipe.text),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(work.batch, collation_fn=work.recipe.collate, partial=False),
    ]
    dataset = webdataset.DataPipeline(*stages).repeat()
    loader = webdataset.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=work.workers, persistent_workers=True
    )
    return Stream.endless(iter(loader))


def ray_data(work: Work) -> Stream:
    """Ray Data's webdataset reader, Pillow in map_batches, iter_batches, on a Ray of `workers` CPUs of its own.

    It prepares as far ahead as its store has room, so whole passes are counted; the warm-up starts its workers.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=work.workers,
        object_store_memory=RAY_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    wanted = sum(before < work.samples for before in itertools.accumulate(work.counts, initial=0)) or 1
    passes = (_ray_pass(work, work.shards[:wanted]) for _ in itertools.count())
    return Stream(_ray_pass(work, work.shards[: work.workers]), itertools.chain.from_iterable(passes))


def _ray_pass(work: Work, shards: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    import ray

    recipe = work.recipe

    def rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = [(recipe.image(decode_rgb(_picture(each))), recipe.text(json.loads(each["json"]))) for each in samples]
        image, text = recipe.collate(made)
        return {"image": image.numpy(), "text": text.numpy()}

    # Undecoded, since its own decoder would send whole pictures through the object store.
    dataset = ray.data.read_webdataset(list(shards), decoder=None).map_batches(rows, batch_size=work.batch)
    for batch in dataset.iter_batches(batch_size=work.batch, batch_format="numpy"):
        yield batch["image"], batch["text"]


PEERS: dict[str, Callable[[Work], Stream]] = {
    "webdataset_pil": webdataset_pil,
    "open_clip_composition": open_clip_composition,
    "ray_data": ray_data,
}


def _share(work: Work) -> int:
    """Samples a worker reads in a pass: a larger buffer would be emptied before it is full."""
    return max(1, sum(work.counts) // work.workers)


def _picture(sample: dict[str, Any]) -> bytes:
    return next(sample[name] for name in IMAGES.split(";") if sample.get(name) is not None)


def _is_pair(sample: dict[str, Any]) -> bool:
    return "json" in sample and any(name in sample for name in IMAGES.split(";"))
