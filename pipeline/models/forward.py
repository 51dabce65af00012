"""What a training step asks of a model: several named passes in one call, and their features by name.

    outputs = model({
        "image": ForwardInput(image=…, heads=("itc",)),
        "masked": ForwardInput(image=…, text=…, heads=("mlm",)),
    })
    outputs["masked"]["mlm"]

A pass with an image only, a text only, or both (fused) differs in nothing but its members: the model routes
by what is there. Randomness arrives as an argument (`drop_path_mask`); a model draws nothing itself.

Shapes: B rows, L tokens, H x W pixels, P patches, R regions, F numbers of a region, K chosen positions a row,
N layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Head = Literal[
    "itc",
    "itm",
    "mlm",
    "mim",
    "decoded_image",
    "alignment",
    "moc",
    "mrfr",
    "classes",
    "answers",
    "nlvr2",
    "ranking",
    "tokens",
]
ForwardOutput = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Regions:
    """A detector's regions of some pictures."""

    features: Tensor  # (B, R, F) float32; zeros where a region is hidden
    location: Tensor  # (B, R, 5) float32: x1 / W, y1 / H, x2 / W, y2 / H, share of the picture's area
    keep: Tensor  # (B, R) bool, False at padding


@dataclass(frozen=True)
class ForwardInput:
    """One reading of some rows, and the heads whose outputs are wanted.

    A model offers the heads that its kind has, and refuses others by name. Heads and what they return:
      itc           on an image or a text pass: `itc` (B, D), unit vectors, and `scale`, the exponentiated logit scale
                    (0-d), so that no parameter is read outside the engine's forward; VLMo adds a second contrast,
                    `itc_vl` and `scale_vl`
      itm           on a fused pass: `itm` (B, 2), logits of (not matched, matched); a head of one logit z gives (0, z)
      mlm           on a text or fused pass: `mlm` (B, K, V), logits at `mask_positions`
      masked_image  on an image or fused pass: `mim` (B, K, targets), predictions at `patch_positions`
      decoded_image on an image pass whose `visible_patches` leave out the masked ones: `mim` (B, K, targets),
                    a decoder's predictions at `patch_positions`; of a model built with an image decoder (MAE)
      alignment     on a fused pass: `words` (B, L, D) and `patches` (B, P, D), final features without the image's
                    [CLS]; `words_keep` (B, L) bool, False at [CLS], [SEP] and padding; `patches_keep` (B, P) bool
      region_class, region_features
                    on a pass with regions: (B, K, classes) and (B, K, F), predictions at `region_positions`
      classes       on an image pass: `classes` (B, classes), logits
      answers       on a fused pass: `answers` (B, answers), logits
      reasoning     on a fused pass with `second_image`: `nlvr2` (B, 2), logits of (false, true)
      ranking       on a fused pass: `ranking` (B,), the higher the better text and image fit
      tokens        any pass: `tokens`, final normalised features of every position (text first, then image with its
                    CLS in front), for inspection
    """

    heads: tuple[Head, ...]
    image: Tensor | None = None  # (B, H, W, 3) uint8
    image_size: Tensor | None = None  # (B, 2) int64: rows and columns of `image` that are picture; None: all
    # (B, K) int64: the patches that enter the encoder, padded with -1; None: all. Patches are numbered row by row over
    # the picture itself, here and below: no number depends on how large the canvas around it is.
    visible_patches: Tensor | None = None
    second_image: Tensor | None = None  # (B, H, W, 3) uint8
    second_image_size: Tensor | None = None  # (B, 2) int64
    regions: Regions | None = None
    text: Tensor | None = None  # (B, L) int64
    text_keep: Tensor | None = None  # (B, L) bool, False at padding
    mask_positions: Tensor | None = None  # (B, K) int64: tokens the mlm head reads
    patch_positions: Tensor | None = None  # (B, K) int64: patches masked, read by masked_image; padded with -1
    patch_replacements: Tensor | None = (
        None  # (B, K) int64: the patch of the picture shown there; -1: the mask embedding
    )
    region_positions: Tensor | None = None  # (B, K) int64: regions that the region heads read
    drop_path_mask: Tensor | None = None  # (B, N, 2) bool: attention and feed-forward branches kept; None keeps all


def unmasked_patches(masked: Tensor, num_patches: int) -> Tensor:
    """The patches that are not masked, ascending: masked (B, K), each row's all different -> (B, num_patches - K)."""
    is_masked = torch.zeros(len(masked), num_patches, dtype=torch.uint8, device=masked.device).scatter(1, masked, 1)
    return is_masked.argsort(dim=1, stable=True)[:, : num_patches - masked.shape[1]]


def drop_masked_patches(one: ForwardInput, num_patches: int) -> ForwardInput:
    """A pass over masked pictures as a model with an image decoder reads it: masked patches never enter the encoder."""
    assert one.patch_positions is not None
    visible = unmasked_patches(one.patch_positions, num_patches)
    heads = tuple[Head, ...]("decoded_image" if head == "mim" else head for head in one.heads)
    return replace(one, heads=heads, visible_patches=visible)
