"""What the peers do to a sample: random-resized crop, flip and RandAugment on Pillow pictures; words and masks.

The same crop, operations, chances and magnitudes as ours (pipeline/data/examples/augment.py), by the libraries that
loaders of this field use for them: Pillow, pixels to normalised floats in torchvision's order of operations,
transformers' tokenizer for each caption and its whole-word collator for each batch.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from pipeline.data.contents.images import draw_crop
from pipeline.data.examples.augment import APPLIED, FILL, MAX_MAGNITUDE, ROTATE, SHEAR, TRANSLATE, enhance_factor
from pipeline.data.randomness import CounterRandom

IGNORED = -100  # the label of a token that is not masked
MEAN = STD = torch.full((3, 1, 1), 0.5)


@dataclass(frozen=True)
class PillowRecipe:
    """From a decoded picture and its captions to a row. Every worker process gets a copy.

    With `normalise` images are (3, size, size) float32 in [-1, 1]; else (size, size, 3) uint8.
    """

    vocabulary: str  # its file
    size: int
    crop_scale: tuple[float, float]
    operations: int
    magnitude: int
    max_text_length: int
    mask_probability: float
    normalise: bool

    def image(self, picture: Image.Image) -> Tensor:
        top, left, height, width = draw_crop(picture.height, picture.width, self.crop_scale, _counter())
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(rand_augment(picture, self.operations, self.magnitude)))
        if not self.normalise:
            return pixels
        # torchvision's ToTensor (copy, then divide) and Normalize (clone, then channel by channel).
        scaled = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return scaled.clone().sub_(MEAN).div_(STD)

    def text(self, record: dict[str, Any]) -> dict[str, Any]:
        """The tokens of one of the captions, as transformers' tokenizer gives them."""
        return load_tokenizer(self.vocabulary)(
            random.choice(record["captions"]),
            padding="max_length",
            truncation=True,
            max_length=self.max_text_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
        )

    def collate(self, rows: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor]:
        """Images, and (B, 3, max_text_length) int64: the tokens, the same masked, and what the masks hide."""
        images, texts = zip(*rows, strict=True)
        collator = DataCollatorForLanguageModeling(
            load_tokenizer(self.vocabulary),
            mlm_probability=self.mask_probability,
            whole_word_mask=True,
            mask_replace_prob=1.0,  # all it can do to whole words
            random_replace_prob=0.0,
        )
        masked = collator([dict(text) for text in texts])
        ids, labels = masked["input_ids"], masked["labels"]
        return torch.stack(images), torch.stack([torch.where(labels == IGNORED, ids, labels), ids, labels], dim=1)


@lru_cache(maxsize=1)
def load_tokenizer(vocabulary: str) -> BertTokenizer:
    """Made once in each process: building it costs as much as loading a hundred samples."""
    return BertTokenizer(vocabulary)


def decode_rgb(data: bytes) -> Image.Image:
    """What webdataset's `decode("pilrgb")` does."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        return picture.convert("RGB")


def rand_augment(picture: Image.Image, operations: int, magnitude: int) -> Image.Image:
    """Draw `operations` operations; carry each out with chance 1/2, at `magnitude` of 10."""
    for _ in range(operations):
        operation = OPERATIONS[random.choice(NAMES)]
        sign = random.choice((-1.0, 1.0))
        if random.random() < APPLIED:
            picture = operation(picture, magnitude / MAX_MAGNITUDE, sign)
    return picture


def shear(picture: Image.Image, amount: float, horizontal: bool) -> Image.Image:
    of_y, of_x = (amount, 0.0) if horizontal else (0.0, amount)
    return _affine(picture, (1, -of_y, 0, -of_x, 1, 0))


def translate(picture: Image.Image, share: float, horizontal: bool) -> Image.Image:
    right, down = (share * picture.width, 0.0) if horizontal else (0.0, share * picture.height)
    return _affine(picture, (1, 0, -right, 0, 1, -down))


def _affine(picture: Image.Image, inverse: tuple[float, ...]) -> Image.Image:
    """Pillow asks where each new pixel comes from: the inverse of what moves the picture."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=FILL
    )  # fmt: skip


def _counter() -> CounterRandom:
    return CounterRandom(random.getrandbits(64))


# Name → operation(picture, strength 0 … 1, sign ±1): ours, name by name.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "Identity": lambda picture, strength, sign: picture,
    "AutoContrast": lambda picture, strength, sign: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, strength, sign: ImageOps.equalize(picture),
    "Brightness": lambda picture, strength, sign: ImageEnhance.Brightness(picture).enhance(enhance_factor(strength)),
    "Sharpness": lambda picture, strength, sign: ImageEnhance.Sharpness(picture).enhance(enhance_factor(strength)),
    "ShearX": lambda picture, strength, sign: shear(picture, sign * strength * SHEAR, horizontal=True),
    "ShearY": lambda picture, strength, sign: shear(picture, sign * strength * SHEAR, horizontal=False),
    "TranslateX": lambda picture, strength, sign: translate(picture, sign * strength * TRANSLATE, horizontal=True),
    "TranslateY": lambda picture, strength, sign: translate(picture, sign * strength * TRANSLATE, horizontal=False),
    "Rotate": lambda picture, strength, sign: picture.rotate(
        sign * strength * ROTATE, Image.Resampling.BILINEAR, fillcolor=FILL
    ),
}
NAMES = tuple(OPERATIONS)
