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

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.examples.masking import mask_patches
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.evaluation.retrieval import eval_mode
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.objectives.mim import patchify, unpatchify
from pipeline.objectives.mim import reconstruct as paint

Painted = Literal["mean_colour", "pixels"]  # targets that can be looked at; visual tokens cannot
_SEED = 2106_08254
_GREY = 128


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
    target: Painted,
    batch: int = 64,
    decoded: bool = False,
) -> Reconstruction:
    """Hides `fraction` of each picture's patches, chosen by its key, and fills them with the model's predictions.

    `decoded` says that the model's encoder never reads hidden patches, and a decoder of its own predicts them.
    """
    patches = patchify(images.float(), patch_size)  # (N, P, p*p*3), 0 to 255
    randoms = [CounterRandom(hash64(_SEED, key)) for key in keys]
    positions = torch.from_numpy(np.stack([mask_patches(patches.shape[1], fraction, each) for each in randoms]))
    filled = paint(
        images, positions, _predict(model, images, positions, batch, patches.shape[1] if decoded else None), patch_size
    )
    hidden, guessed = _at(patches, positions), _at(patchify(filled.float(), patch_size), positions)
    if target == "pixels":
        plain = _means(hidden)
        error, without = _difference(guessed, hidden), _difference(plain.tile(patch_size**2), hidden)
    else:
        plain = _visible_mean(patches, positions)
        error, without = _difference(_means(guessed), _means(hidden)), _difference(plain, _means(hidden))
    masked = _put(patches, positions, torch.full_like(plain, _GREY), patch_size)
    return Reconstruction(images, masked, filled, error, without)


def _predict(model: nn.Module, images: Tensor, positions: Tensor, batch: int, decoded_of: int | None) -> Tensor:
    """Predictions at `positions`; `decoded_of` is the number of patches where a decoder makes them."""
    parts = []
    with eval_mode(model) as device:
        for start in range(0, len(images), batch):
            span = slice(start, start + batch)
            wanted = ForwardInput(
                heads=("mim",), image=images[span].to(device), patch_positions=positions[span].to(device)
            )
            wanted = wanted if decoded_of is None else drop_masked_patches(wanted, decoded_of)
            parts.append(model({"only": wanted})["only"]["mim"].float().cpu())
    return torch.cat(parts)


def _at(patches: Tensor, positions: Tensor) -> Tensor:
    """(N, K, p*p*3) the patches at `positions` (N, K)."""
    return patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[-1]))


def _means(patches: Tensor) -> Tensor:
    """(N, K, 3) the mean colour of each patch."""
    return patches.unflatten(-1, (-1, 3)).mean(dim=-2)


def _put(patches: Tensor, positions: Tensor, colours: Tensor, patch_size: int) -> Tensor:
    """Pictures (N, H, W, 3) uint8 with flat `colours` (N, K, 3) in the places of the hidden patches."""
    painted = colours.tile(patch_size**2)
    filled = patches.scatter(1, positions[..., None].expand_as(painted), painted)
    return unpatchify(filled, patch_size).round().to(torch.uint8)


def _visible_mean(patches: Tensor, positions: Tensor) -> Tensor:
    """(N, K, 3) the mean colour of each picture's visible patches, for every hidden one."""
    visible = torch.ones(patches.shape[:2]).scatter(1, positions, 0.0)[..., None]
    mean = (_means(patches) * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)
    return mean[:, None].expand(-1, positions.shape[1], -1)


def _difference(guessed: Tensor, truth: Tensor) -> float:
    return (guessed - truth).abs().mean().div(255).item()
