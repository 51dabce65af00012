"""Masked image modelling (MIM): predict a patch's mean colour (ViT), pixels (MAE) or visual token (BEiT).

Shapes: n examples, H x W pixels, P patches, K masked patches per example, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import RunConfig, SourceType, StageConfig, TransformerConfig
from pipeline.data.batch import IGNORED, Batch
from pipeline.data.storage import NotFound, Storage, join
from pipeline.models.embeddings import canvas_patches
from pipeline.models.forward import ForwardInput, ForwardOutput, InputKind, drop_masked_patches
from pipeline.objectives import Objective, cross_entropy, require

if TYPE_CHECKING:
    from pipeline.models.visual_tokens import VisualTokenizer

COLOUR_BITS = 3  # per channel
PIXEL_EPSILON = 1e-6


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(n, H, W, 3) -> (n, P, p * p * 3), patches row by row."""
    return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Invert `patchify` for a square image: (n, P, p * p * 3) -> (n, H, W, 3)."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=patch_size, q=patch_size)


def patch_targets(image: Tensor, positions: Tensor, patch_size: int, target: str) -> Tensor:
    """Return what is predicted of the patches at `positions` (n, K) of an image (n, H, W, 3) uint8.

    "mean_colour": the class of a patch's mean colour, three bits per channel (ViT, section B.1.2), (n, K) int64.
    "pixels": its pixels, normalized per patch (of one colour: zeros), (n, K, p * p * 3) float32 (MAE, section 4).
    """
    patches = patchify(image, patch_size)
    pixels = patches.gather(1, positions.unsqueeze(-1).expand(-1, -1, patches.shape[-1])).float()
    if target == "pixels":
        pixels = pixels / 127.5 - 1.0
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (variance + PIXEL_EPSILON).sqrt()
    red, green, blue = (pixels.unflatten(-1, (-1, 3)).mean(dim=-2).long() >> (8 - COLOUR_BITS)).unbind(-1)
    return (red << 2 * COLOUR_BITS) | (green << COLOUR_BITS) | blue


def mim_loss(prediction: Tensor, target: Tensor, is_masked: Tensor | None = None) -> Tensor:
    """Return the sum over masked patches (None: all) of the cross-entropy (int64) or mean squared error (pixels)."""
    if target.is_floating_point():
        errors = (prediction.float() - target).square().mean(dim=-1)
        return (errors if is_masked is None else errors * is_masked).sum()
    return cross_entropy(prediction, target if is_masked is None else target.masked_fill(~is_masked, IGNORED))


def reconstruct(image: Tensor, positions: Tensor, prediction: Tensor, patch_size: int) -> Tensor:
    """Return the image with the selected patches painted from their predictions: (n, H, W, 3) uint8, for display."""
    patches = patchify(image, patch_size)
    index = positions.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    if prediction.shape[-1] == patches.shape[-1]:
        variance, mean = torch.var_mean(patches.gather(1, index).float(), dim=-1, keepdim=True)
        predicted = prediction.float() * variance.sqrt() + mean
    else:
        classes, width = prediction.argmax(dim=-1), 1 << (8 - COLOUR_BITS)
        channels = [classes >> 2 * COLOUR_BITS, classes >> COLOUR_BITS, classes]
        colours = [(channel & (1 << COLOUR_BITS) - 1) * width + width // 2 for channel in channels]
        predicted = torch.stack(colours, dim=-1).float().repeat(1, 1, patch_size**2)
    return unpatchify(patches.scatter(1, index, predicted.round().clamp(0, 255).to(torch.uint8)), patch_size)


class MIM(Objective):
    """Masked patches, replaced in the encoder's input or, with a decoder, left out. Only ViLT reads the text too."""

    source_types = frozenset({"pairs", "images"})
    head = "mim"
    evaluations: ClassVar = {"pairs": "mim"}
    fields = frozenset({"masked_patches"})
    counted = "patch_positions"
    head_options = staticmethod(
        lambda stage: {
            "image_target": stage.image_target,
            "visual_tokens": stage.image_tokenizer.tokens if stage.image_tokenizer else 0,
            "image_decoder": stage.image_decoder,
        }
    )

    @classmethod
    def inputs(cls, source_type: SourceType, model: TransformerConfig) -> tuple[frozenset[InputKind], ...]:
        with_text = source_type == "pairs" and model.kind == "vilt"
        return (frozenset({"image", "text"}) if with_text else frozenset({"image"}),)

    @staticmethod
    def faults(config: RunConfig, stage: StageConfig) -> Iterator[str]:
        kind = config.model.kind
        if stage.image_target == "visual_tokens" and stage.image_tokenizer is None:
            yield "image_tokenizer: required by image_target: visual_tokens; set the location of its weights"
        if kind == "vilt" and stage.image_target == "visual_tokens":
            yield "image_target: visual_tokens are defined on square images, and vilt keeps the aspect ratio"
        if kind == "vilt" and stage.masking.patch_shape == "blocks":
            yield "masking.patch_shape: blocks are defined on square images, and vilt keeps the aspect ratio"
        if stage.image_decoder is not None:
            if kind not in ("vlmo", "vit"):
                yield f"image_decoder: supported by models of kind vlmo and vit; model.kind is {kind}"
            if stage.masking.mask_token_prob < 1:
                yield "masking.mask_token_prob: must be 1 with image_decoder, whose encoder reads no masked patch"

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        positions, replacements = require(examples.patch_positions), examples.patch_replacements
        forward = self.fusion_forward(examples, "hidden")
        masked = replace(forward, patch_positions=positions, patch_replacements=replacements)
        if examples.image_size is None:  # only ViLT reads the text
            masked = replace(masked, text=None, text_keep=None)
        if self.stage.image_decoder is not None:
            masked = drop_masked_patches(masked, (require(examples.image).shape[1] // self.context.patch_size) ** 2)
        return {"hidden": masked}

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        image, positions, size = require(examples.image), require(examples.patch_positions), self.context.patch_size
        is_masked = None
        if examples.image_size is not None:
            is_masked = positions >= 0
            grid = torch.div(examples.image_size, size, rounding_mode="floor")
            positions = canvas_patches(positions.clamp(min=0), grid, image.shape[2] // size)
        if self.stage.image_target == "visual_tokens":
            tokenizer = self.context.image_tokenizer
            assert tokenizer is not None, "the stage's image tokenizer must be loaded before its first step"
            target = tokenizer(image, image.shape[1] // size).gather(1, positions)
        else:
            target = patch_targets(image, positions, size, self.stage.image_target)
        return mim_loss(outputs["hidden"]["mim"], target, is_masked)


def load_image_tokenizer(stage: StageConfig, storage: Storage, device: torch.device) -> VisualTokenizer | None:
    """Return the stage's image tokenizer on a device, or None if it needs none; check its number of tokens."""
    settings = stage.image_tokenizer
    if "mim" not in stage.objectives or stage.image_target != "visual_tokens" or settings is None:
        return None
    from pipeline.models.visual_tokens import read_tokenizer  # imports transformers, which is slow

    names = ("config.json", "model.safetensors")
    try:
        config, weights = (storage.read(join(settings.weights, name)) for name in names)
    except NotFound as error:
        raise CheckpointError(f"{settings.weights}: no image tokenizer ({', '.join(names)}): {error}") from error
    tokenizer = read_tokenizer(config, weights, settings.weights)
    if tokenizer.tokens != settings.tokens:
        raise ConfigError(
            f"stage {stage.name}: image_tokenizer.tokens is {settings.tokens}, but {settings.weights} has "
            f"{tokenizer.tokens} tokens; set that number"
        )
    return tokenizer.to(device)
