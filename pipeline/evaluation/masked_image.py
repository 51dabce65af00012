"""Reconstruction of masked patches of held-out images by a model that was trained on masked images.

Normalised pixels are shown with each patch's own mean and standard deviation, as masked autoencoders do: those two
numbers come from the image, the pattern from the model. Mean colours need nothing of the image. The error is compared
with a prediction without a model: the patch's mean for pixels, otherwise the visible patches' mean colour.

Shapes: N images, H x W pixels, P patches, K masked patches, p the patch side.
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

Painted = Literal["mean_colour", "pixels"]  # targets that can be drawn; visual tokens cannot
_SEED = 2106_08254
_GREY = 128


@dataclass(frozen=True)
class Reconstruction:
    """Images (N, H, W, 3) uint8: originals, with grey masked patches, and with the model's patches.

    `error` and `error_without_model` are mean absolute differences over masked patches, as fractions of full scale.
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
    """Mask `fraction` of each image's patches, chosen by its key, and fill them with the model's predictions.

    `decoded`: the model has an image decoder, and its encoder never reads masked patches.
    """
    patches = patchify(images.float(), patch_size)  # (N, P, 3 p²), 0 to 255
    randoms = [CounterRandom(hash64(_SEED, key)) for key in keys]
    positions = torch.from_numpy(np.stack([mask_patches(patches.shape[1], fraction, random) for random in randoms]))
    predictions = []
    with eval_mode(model) as device:
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            image, masked_patches = images[rows].to(device), positions[rows].to(device)
            forward_input = ForwardInput(heads=("mim",), image=image, patch_positions=masked_patches)
            if decoded:
                forward_input = drop_masked_patches(forward_input, patches.shape[1])
            predictions.append(model({"only": forward_input})["only"]["mim"].float().cpu())
    filled = paint(images, positions, torch.cat(predictions), patch_size)
    index = positions[..., None].expand(-1, -1, patches.shape[-1])
    truth, predicted = patches.gather(1, index), patchify(filled.float(), patch_size).gather(1, index)
    if target == "pixels":
        plain = _mean_colours(truth)
        error, without = _difference(predicted, truth), _difference(plain.tile(patch_size**2), truth)
    else:
        visible = torch.ones(patches.shape[:2]).scatter(1, positions, 0.0)[..., None]
        mean = (_mean_colours(patches) * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)
        plain, colours = mean[:, None].expand(-1, positions.shape[1], -1), _mean_colours(truth)
        error, without = _difference(_mean_colours(predicted), colours), _difference(plain, colours)
    grey = patches.scatter(1, index, float(_GREY))
    return Reconstruction(images, unpatchify(grey, patch_size).round().to(torch.uint8), filled, error, without)


def _mean_colours(patches: Tensor) -> Tensor:
    """Return the mean colour (N, K, 3) of each patch."""
    return patches.unflatten(-1, (-1, 3)).mean(dim=-2)


def _difference(predicted: Tensor, truth: Tensor) -> float:
    return (predicted - truth).abs().mean().div(255).item()
