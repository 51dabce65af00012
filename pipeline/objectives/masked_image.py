"""Masked image modelling: a patch's mean colour (ViT, section B.1.2), its pixels (MAE), or any other class (BEiT).

Shapes: B rows, H x W pixels, P patches, K masked patches a row, p side of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

COLOUR_BITS = 3  # a channel
PIXEL_EPSILON = 1e-6
IGNORED = -100  # the class of what is no masked patch


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, 3) -> (B, P, p * p * 3), patches row by row."""
    return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The square image that `patchify` cut: (B, P, p * p * 3) -> (B, H, W, 3)."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=patch_size, q=patch_size)


def mean_colour_targets(image: Tensor, positions: Tensor, patch_size: int) -> Tensor:
    """The class of each chosen patch's mean colour, three bits a channel: (B, K) int64 below 512.

    image (B, H, W, 3) uint8, positions (B, K).
    """
    colour = _chosen(image, positions, patch_size).unflatten(-1, (-1, 3)).mean(dim=-2)
    red, green, blue = (colour.long() >> (8 - COLOUR_BITS)).unbind(-1)
    return (red << 2 * COLOUR_BITS) | (green << COLOUR_BITS) | blue


def pixel_targets(image: Tensor, positions: Tensor, patch_size: int) -> Tensor:
    """The chosen patches' pixels, each patch with mean 0 and variance 1: (B, K, p * p * 3) float32 (MAE, section 4).

    image (B, H, W, 3) uint8, positions (B, K). A patch of one colour is all zeros.
    """
    pixels = _chosen(image, positions, patch_size) / 127.5 - 1.0
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) / (variance + PIXEL_EPSILON).sqrt()


def masked_image_loss(prediction: Tensor, target: Tensor, is_masked: Tensor | None = None) -> Tensor:
    """Summed over masked patches: cross-entropy for classes (B, K), mean squared error a patch for pixels (B, K, …).

    `is_masked` (B, K) is False where a row has fewer masked patches than K; None: nowhere.
    """
    if target.is_floating_point():
        errors = (prediction.float() - target).square().mean(dim=-1)
        return (errors if is_masked is None else errors * is_masked).sum()
    if is_masked is not None:
        target = target.masked_fill(~is_masked, IGNORED)
    logits = prediction.float().flatten(0, 1)
    return F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="sum")


def reconstruct(image: Tensor, positions: Tensor, prediction: Tensor, patch_size: int) -> Tensor:
    """The image with its chosen patches painted as predicted: (B, H, W, 3) uint8, for the eye.

    Classes paint the middle of their colour; pixels borrow the true patch's mean and deviation, which they were
    normalised by.
    """
    patches = patchify(image, patch_size)
    if prediction.shape[-1] == patches.shape[-1]:
        pixels = _chosen(image, positions, patch_size)
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        painted = prediction.float() * variance.sqrt() + mean
    else:
        painted = _colours(prediction.argmax(dim=-1)).repeat(1, 1, patch_size**2)
    painted = painted.round().clamp(0, 255).to(torch.uint8)
    where = positions.unsqueeze(-1).expand_as(painted)
    return unpatchify(patches.scatter(1, where, painted), patch_size)


def _chosen(image: Tensor, positions: Tensor, patch_size: int) -> Tensor:
    """The pixels of the chosen patches as float32: (B, K, p * p * 3)."""
    patches = patchify(image, patch_size)
    return patches.gather(1, positions.unsqueeze(-1).expand(-1, -1, patches.shape[-1])).float()


def _colours(classes: Tensor) -> Tensor:
    """The middle colour of each class: (B, K) -> (B, K, 3) float32."""
    width = 1 << (8 - COLOUR_BITS)
    channels = [classes >> 2 * COLOUR_BITS, classes >> COLOUR_BITS, classes]
    return torch.stack([(c & (1 << COLOUR_BITS) - 1) * width + width // 2 for c in channels], dim=-1).float()
