"""Masked patches of held-out pictures, filled in by a model that was trained on masked images.

Normalised pixels are shown with each patch's own mean and spread, as masked autoencoders do: those two numbers come
from the picture, the pattern from the model. Mean colours need nothing of the picture. The error stands beside what
the same numbers give without a model: the patch's mean alone for pixels, the visible patches' mean colour otherwise.

Shapes: N images, H x W pixels, P patches, K masked patches a picture, p the patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from pipeline.data.masking import mask_patches
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.evaluation.retrieval import reading
from pipeline.models.passes import Pass

ImageTarget = Literal["mean_colour", "pixels"]
_SEED = 2106_08254
_GREY = 128
_EPSILON = 1e-6  # of pipeline.objectives.masked_image.pixel_targets


@dataclass(frozen=True)
class Reconstruction:
    """Pictures (N, H, W, 3) uint8 as they are, with the masked patches grey, and with the model's patches in place.

    `error` and `error_without_model` are mean absolute differences of the masked patches in units of full scale.
    """

    original: Tensor
    masked: Tensor
    filled: Tensor
    error: float
    error_without_model: float


def reconstruct(
    model: nn.Module,
    images: Tensor,
    keys: Sequence[str],
    patch_size: int,
    fraction: float,
    target: ImageTarget,
    batch: int = 64,
) -> Reconstruction:
    """Hides `fraction` of each picture's patches, chosen by its key, and fills them with the model's predictions."""
    patches = to_patches(images, patch_size)  # (N, P, p*p*3)
    positions = torch.stack(
        [
            torch.from_numpy(mask_patches(patches.shape[1], fraction, CounterRandom(hash64(_SEED, key))))
            for key in keys
        ]
    )
    predictions = _predict(model, images, positions, batch)
    hidden = chosen(patches, positions)
    if target == "pixels":
        guessed, plain = from_pixels(predictions, hidden), hidden.unflatten(-1, (-1, 3)).mean(dim=2)
        truth = hidden
    else:
        guessed, plain = from_colours(predictions.argmax(dim=-1), patch_size), _visible_mean(patches, positions)
        truth = _flat(hidden.unflatten(-1, (-1, 3)).mean(dim=2), patch_size)
    return Reconstruction(
        original=images,
        masked=_with(patches, positions, torch.full_like(hidden, _GREY), images, patch_size),
        filled=_with(patches, positions, guessed, images, patch_size),
        error=_difference(guessed.clamp(0, 255), truth),
        error_without_model=_difference(_flat(plain, patch_size), truth),
    )


def _predict(model: nn.Module, images: Tensor, positions: Tensor, batch: int) -> Tensor:
    parts = []
    with reading(model) as device:
        for start in range(0, len(images), batch):
            span = slice(start, start + batch)
            wanted = Pass(
                heads=("masked_image",), image=images[span].to(device), patch_positions=positions[span].to(device)
            )
            parts.append(model({"only": wanted})["only"]["masked_image"].float().cpu())
    return torch.cat(parts)


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """(N, P, p*p*3) float32, pixel values 0 to 255, patches row by row."""
    return rearrange(images.float(), "n (h p) (w q) c -> n (h w) (p q c)", p=patch_size, q=patch_size)


def chosen(patches: Tensor, positions: Tensor) -> Tensor:
    """(N, K, p*p*3) the patches at `positions` (N, K)."""
    return patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[-1]))


def from_pixels(predictions: Tensor, hidden: Tensor) -> Tensor:
    """Pixel values from normalised ones, by each hidden patch's own mean and standard deviation (over all channels)."""
    mean = hidden.mean(dim=-1, keepdim=True)
    variance = hidden.div(255).var(dim=-1, keepdim=True)
    return predictions * (variance + _EPSILON).sqrt() * 255 + mean


def from_colours(classes: Tensor, patch_size: int) -> Tensor:
    """(N, K, p*p*3) flat patches in the middle of each colour class (N, K): 3 bits a channel, red the highest."""
    bins = torch.stack([(classes >> shift) & 7 for shift in (6, 3, 0)], dim=-1)
    return _flat(bins.float() * 32 + 15.5, patch_size)


def _flat(colours: Tensor, patch_size: int) -> Tensor:
    """(…, 3) colours as whole patches (…, p*p*3)."""
    return colours.tile(patch_size**2)


def _visible_mean(patches: Tensor, positions: Tensor) -> Tensor:
    """(N, K, 3) the mean colour of each picture's visible patches, for every hidden one."""
    visible = torch.ones(patches.shape[:2]).scatter(1, positions, 0.0)
    colours = patches.unflatten(-1, (-1, 3)).mean(dim=2)
    mean = (colours * visible[..., None]).sum(dim=1) / visible.sum(dim=1, keepdim=True).clamp(min=1)
    return mean[:, None].expand(-1, positions.shape[1], -1)


def _with(patches: Tensor, positions: Tensor, put: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """The pictures (N, H, W, 3) uint8 with `put` in the places of the hidden patches."""
    filled = patches.scatter(1, positions[..., None].expand_as(put), put.to(patches.dtype))
    rows = images.shape[1] // patch_size
    whole = rearrange(filled, "n (h w) (p q c) -> n (h p) (w q) c", h=rows, p=patch_size, q=patch_size)
    return whole.round().clamp(0, 255).to(torch.uint8)


def _difference(guessed: Tensor, truth: Tensor) -> float:
    return (guessed - truth).abs().mean().div(255).item()
