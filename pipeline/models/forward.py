"""Named forward inputs and outputs: a training step requests several forwards in one call.

    outputs = model({
        "image": ForwardInput(image=…, heads=("itc",)),
        "masked": ForwardInput(image=…, text=…, heads=("mlm",)),
    })
    outputs["masked"]["mlm"]

Inputs with an image only, a text only, or both (fused) differ only in their members, and the model routes by these. A
model draws no random numbers: `drop_path_mask` is an argument.

Shapes: B examples, L tokens, H x W pixels, P patches, R regions, F features of a region, K selected positions,
N layers, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Head = (
    Literal["itc", "itm", "mlm", "mim", "decoded_image", "alignment", "moc", "mrfr"]
    | Literal["classes", "answers", "nlvr2", "ranking", "tokens"]
)
InputKind = Literal["image", "text", "regions"]
ForwardOutput = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Regions:
    """A detector's regions of each image."""

    features: Tensor  # (B, R, F) float32; zeros where a region is masked
    location: Tensor  # (B, R, 5) float32: x1 / W, y1 / H, x2 / W, y2 / H, fraction of the image's area
    keep: Tensor  # (B, R) bool, False at padding


@dataclass(frozen=True)
class ForwardInput:
    """The tensors of one forward and the heads whose outputs are requested.

    Heads and their outputs; a model raises ValueError naming a head that it lacks:
      itc           image or text: `itc` (B, D), unit vectors, and `scale`, the exponentiated logit scale (0-d), so
                    that no parameter is read outside the engine's forward; VLMo adds `itc_vl` and `scale_vl`
      itm           fused: `itm` (B, 2), logits of (not matched, matched); a head with one logit z returns (0, z)
      mlm           text or fused: `mlm` (B, K, V), logits at `mask_positions`
      mim           image or fused: `mim` (B, K, targets), predictions at `patch_positions`
      decoded_image image whose `visible_patches` omit the masked ones: `mim` (B, K, targets), the image decoder's
                    predictions at `patch_positions` (MAE)
      alignment     fused: `words` (B, L, D) and `patches` (B, P, D), final features without the image's [CLS];
                    `words_keep` (B, L) bool, False at [CLS], [SEP] and padding; `patches_keep` (B, P) bool
      moc, mrfr     with regions: (B, K, classes) and (B, K, F), predictions at `region_positions`
      classes       image: `classes` (B, classes), logits
      answers       fused: `answers` (B, answers), logits
      nlvr2         fused with `second_image`: `nlvr2` (B, 2), logits of (false, true)
      ranking       fused: `ranking` (B,), higher for a better match
      tokens        any: `tokens`, final normalised features of every position (text first, then image with its [CLS])
    """

    heads: tuple[Head, ...]
    image: Tensor | None = None  # (B, H, W, 3) uint8
    image_size: Tensor | None = None  # (B, 2) int64: rows and columns of the canvas that hold the image; None: all
    # (B, K) int64: the patches that enter the encoder, padded with -1; None: all. Patches are numbered row by row over
    # the image itself, here and below, so that no number depends on the size of the canvas around it.
    visible_patches: Tensor | None = None
    second_image: Tensor | None = None  # (B, H, W, 3) uint8
    second_image_size: Tensor | None = None  # (B, 2) int64
    regions: Regions | None = None
    text: Tensor | None = None  # (B, L) int64
    text_keep: Tensor | None = None  # (B, L) bool, False at padding
    mask_positions: Tensor | None = None  # (B, K) int64: tokens that the mlm head reads
    patch_positions: Tensor | None = None  # (B, K) int64: masked patches, padded with -1
    patch_replacements: Tensor | None = None  # (B, K) int64: patch shown instead; -1: the mask embedding
    region_positions: Tensor | None = None  # (B, K) int64: regions that the region heads read
    drop_path_mask: Tensor | None = None  # (B, N, 2) bool: attention and feed-forward branches kept; None: all


def drop_masked_patches(forward_input: ForwardInput, num_patches: int) -> ForwardInput:
    """Return the input of a model with an image decoder: its encoder reads the unmasked patches in ascending order."""
    masked = forward_input.patch_positions
    assert masked is not None
    is_masked = torch.zeros(len(masked), num_patches, dtype=torch.uint8, device=masked.device).scatter(1, masked, 1)
    visible = is_masked.argsort(dim=1, stable=True)[:, : num_patches - masked.shape[1]]
    heads = tuple[Head, ...]("decoded_image" if head == "mim" else head for head in forward_input.heads)
    return replace(forward_input, heads=heads, visible_patches=visible)
