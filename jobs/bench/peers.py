"""Loaders of other projects for `mome bench loader`, built as their documentation shows, with equal augmentation.

webdataset_pil: webdataset, Pillow, and torch's DataLoader. open_clip_composition: the pipeline of open_clip's training
data, on Pillow instead of torchvision. Both yield (image, text) batches without end: images (B, 3, S, S) float32 in
[-1, 1]; text (B, 3, L) int64, the tokens, the masked tokens and the labels.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from pipeline.config.schema import RunConfig
from pipeline.data.contents.images import draw_crop
from pipeline.data.examples.augment import APPLIED, FILL, MAX_MAGNITUDE, ROTATE, SHEAR, TRANSLATE, enhance_factor
from pipeline.data.randomness import CounterRandom

IGNORED = -100  # label of a token that is not masked
IMAGES = "jpg;png;jpeg;webp"
SAMPLE_BUFFER, SAMPLE_INITIAL = 5000, 1000  # open_clip's shuffle buffers of samples
SHARD_BUFFER, SHARD_INITIAL = 2000, 500  # and of shards
EPOCHS = 20  # of the shard list before the pipeline restarts, which drops an incomplete batch


@dataclass(frozen=True)
class PeerRecipe:
    """The data and the work of a peer, as a run of ours with one stage; every worker process receives a copy."""

    config: RunConfig
    shards: tuple[str, ...]  # paths of the tars
    vocabulary: str  # path of the file
    workers: int
    samples_per_worker: int  # and epoch; a larger shuffle buffer would never fill

    def image(self, picture: Image.Image) -> Tensor:
        """Crop, flip, augment and normalise in torchvision's order of operations."""
        augment, size = self.config.data.augment, self.config.model.image_size
        counter = CounterRandom(random.getrandbits(64))
        top, left, height, width = draw_crop(picture.height, picture.width, augment.crop_scale, counter)
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for _ in range(augment.num_ops):
            operation = OPERATIONS[random.choice(NAMES)]
            sign = random.choice((-1.0, 1.0))
            if random.random() < APPLIED:
                picture = operation(picture, augment.magnitude / MAX_MAGNITUDE, sign)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return pixels.clone().sub_(0.5).div_(0.5)

    def text(self, record: dict[str, Any]) -> dict[str, Any]:
        """Tokenize one of the captions with transformers' tokenizer."""
        return load_tokenizer(self.vocabulary)(
            random.choice(record["captions"]),
            padding="max_length",
            truncation=True,
            max_length=self.config.stages[0].max_text_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
        )

    def collate(self, examples: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor]:
        """Stack the images and mask whole words with transformers' collator."""
        images, texts = zip(*examples, strict=True)
        collator = DataCollatorForLanguageModeling(
            load_tokenizer(self.vocabulary),
            mlm_probability=self.config.stages[0].masking.mlm_probability,
            whole_word_mask=True,
            mask_replace_prob=1.0,  # the only choice that the collator supports for whole words
            random_replace_prob=0.0,
        )
        masked = collator([dict(text) for text in texts])
        ids, labels = masked["input_ids"], masked["labels"]
        return torch.stack(images), torch.stack([torch.where(labels == IGNORED, ids, labels), ids, labels], dim=1)


Batches = Iterator[tuple[Tensor, Tensor]]


def webdataset_pil(recipe: PeerRecipe) -> Batches:
    """Yield batches of webdataset's tutorial loader: its reader and shuffle, Pillow, and torch's DataLoader."""

    def example(sample: dict[str, Any]) -> tuple[Any, Any]:
        data = next(sample[name] for name in IMAGES.split(";") if sample.get(name) is not None)
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return recipe.image(picture.convert("RGB")), recipe.text(json.loads(sample["json"]))

    dataset = webdataset.WebDataset(list(recipe.shards), shardshuffle=100, seed=recipe.config.seed)
    dataset = dataset.shuffle(min(1000, recipe.samples_per_worker)).map(example).repeat()
    return iter(
        DataLoader(
            dataset, recipe.config.stages[0].global_batch_size, num_workers=recipe.workers, collate_fn=recipe.collate
        )
    )


def open_clip_composition(recipe: PeerRecipe) -> Batches:
    """Yield batches of open_clip's pipeline: seeded shard shuffle, large sample buffer, batches made by the workers."""
    available = recipe.samples_per_worker
    stages = [
        webdataset.SimpleShardList(list(recipe.shards) * EPOCHS),
        webdataset.detshuffle(bufsize=SHARD_BUFFER, initial=SHARD_INITIAL, seed=recipe.config.seed),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(min(SAMPLE_BUFFER, available), initial=min(SAMPLE_INITIAL, available)),
        webdataset.select(lambda sample: "json" in sample and any(name in sample for name in IMAGES.split(";"))),
        webdataset.decode("pilrgb"),
        webdataset.rename(image=IMAGES, text="json"),
        webdataset.map_dict(image=recipe.image, text=recipe.text),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(recipe.config.stages[0].global_batch_size, collation_fn=recipe.collate, partial=False),
    ]
    dataset = webdataset.DataPipeline(*stages).repeat()
    return iter(
        webdataset.WebLoader(
            dataset, batch_size=None, shuffle=False, num_workers=recipe.workers, persistent_workers=True
        )
    )


PEERS: dict[str, Callable[[PeerRecipe], Batches]] = {
    "webdataset_pil": webdataset_pil,
    "open_clip_composition": open_clip_composition,
}


@lru_cache(maxsize=1)
def load_tokenizer(vocabulary: str) -> BertTokenizer:
    """Return the tokenizer, built once per process: building it costs as much as loading a hundred samples."""
    return BertTokenizer(vocabulary)


def _affine(picture: Image.Image, inverse: tuple[float, ...]) -> Image.Image:
    """Apply the transform whose inverse maps output to input pixels, as Pillow expects it."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=FILL
    )  # fmt: skip


# Name → operation(image, strength 0 … 1, sign ±1), equal to those of pipeline/data/examples/augment.py.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "Identity": lambda picture, strength, sign: picture,
    "AutoContrast": lambda picture, strength, sign: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, strength, sign: ImageOps.equalize(picture),
    "Brightness": lambda picture, strength, sign: ImageEnhance.Brightness(picture).enhance(enhance_factor(strength)),
    "Sharpness": lambda picture, strength, sign: ImageEnhance.Sharpness(picture).enhance(enhance_factor(strength)),
    "ShearX": lambda picture, strength, sign: _affine(picture, (1, -sign * strength * SHEAR, 0, 0, 1, 0)),
    "ShearY": lambda picture, strength, sign: _affine(picture, (1, 0, 0, -sign * strength * SHEAR, 1, 0)),
    "TranslateX": lambda picture, strength, sign: _affine(
        picture, (1, 0, -sign * strength * TRANSLATE * picture.width, 0, 1, 0)
    ),
    "TranslateY": lambda picture, strength, sign: _affine(
        picture, (1, 0, 0, 0, 1, -sign * strength * TRANSLATE * picture.height)
    ),
    "Rotate": lambda picture, strength, sign: picture.rotate(
        sign * strength * ROTATE, Image.Resampling.BILINEAR, fillcolor=FILL
    ),
}
NAMES = tuple(OPERATIONS)
