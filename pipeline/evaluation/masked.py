"""Masked words of held-out captions and masked patches of held-out images, predicted by the model.

Words are predicted with the pair's own image, with another image, and from text alone; the difference of the first two
accuracies is what the image contributes. Whole words are replaced by [MASK], chosen by the sample and the caption
alone, even where training masks single tokens, whose neighbours give them away. The accuracy is therefore a property of
the weights, for every batch size and limit.

Shapes: N images, M captions, T masked tokens of all captions, K masked patches of an image, H x W pixels, P patches,
p the patch side.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import MaskingConfig, RunConfig, StageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.masking import mask_patches, mask_whole_words
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.evaluation.datasets import EvalPairs, pad_token_ids
from pipeline.evaluation.ranks import compute_batches
from pipeline.evaluation.retrieval import Predictor, run_forward
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.objectives.mim import patchify, reconstruct, unpatchify

RECONSTRUCTED = 64  # images whose masked patches are filled in; the report shows the first few
_WORD_SEED, _PATCH_SEED = 2111_02358, 2106_08254  # fixed, so that every checkpoint predicts the same words and patches
OWN, OTHER, TEXT_ONLY = "own image", "another image", "text only"  # conditions of the predictions of masked words
_TOP = 3
_GREY = 128


class MaskedCaptions(NamedTuple):
    """Captions with [MASK] tokens: ids, masked positions, and the original tokens at those positions."""

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]


class MaskedTokenPredictions(NamedTuple):
    """The best tokens (T, 3), their probabilities, the true tokens (T,) and the probability of each."""

    tokens: Tensor
    probabilities: Tensor
    truth: Tensor
    truth_probability: Tensor
    accuracy: float


class MaskedLanguage(NamedTuple):
    """Predictions of the same masked words by condition, from images only where the model's stage fused them."""

    masked: MaskedCaptions
    predictions: dict[str, MaskedTokenPredictions]
    image_of_other: Tensor | None = None  # (M,) the other image shown with each caption


class Reconstruction(NamedTuple):
    """Images (N, H, W, 3) uint8, and mean absolute differences over masked patches as fractions of full scale.

    Without a model, a patch is predicted by its own mean for pixels, otherwise by the visible patches' mean colour.
    Normalised pixels are shown with each patch's own mean and standard deviation, as masked autoencoders do.
    """

    original: Tensor
    masked: Tensor  # with grey masked patches
    filled: Tensor  # with the model's patches
    error: float
    error_without_model: float
    stage: str


def words_of(word_of: Iterable[int]) -> dict[int, list[int]]:
    """Return the indices of each word's tokens, in text order; `word_of` is -1 at tokens outside words."""
    words: dict[int, list[int]] = {}
    for index, word in enumerate(word_of):
        if word >= 0:
            words.setdefault(word, []).append(index)
    return words


def mask_captions(held_out: EvalPairs, masking: MaskingConfig, tokenizer: Tokenizer) -> MaskedCaptions:
    """Mask words of every caption, at least one, chosen by the sample's key and the caption's number."""
    rows, positions, labels = [], [], []
    numbered = [(key, n) for key, own in zip(held_out.keys, held_out.captions, strict=True) for n in range(len(own))]
    for tokens, (key, number) in zip(held_out.tokens, numbered, strict=True):
        random = CounterRandom(hash64(_WORD_SEED, key, number))
        masked = mask_whole_words(tokens, random, masking.mlm_probability, True, tokenizer)
        chosen = tuple(map(int, masked.positions))
        rows.append(tuple(tokenizer.mask_id if i in chosen else token for i, token in enumerate(tokens.ids)))
        positions.append(chosen)
        labels.append(tuple(int(tokens.ids[position]) for position in chosen))
    return MaskedCaptions(tuple(rows), tuple(positions), tuple(labels))


def mismatched_images(image_id: Tensor) -> Tensor:
    """Return for each image one of another id (N,), all distinct if possible. Raises ValueError where all are equal."""
    ids, counts = image_id.unique(return_counts=True)
    if len(ids) < 2:
        raise ValueError("all held-out images are the same one: there is no other image to compare with")
    # Rotated by the size of the largest group of equal ids, none meets its own, unless one id fills more than half.
    order = image_id.argsort(stable=True)
    other = torch.empty_like(order)
    other[order] = order.roll(-int(counts.max()))
    for image in (image_id[other] == image_id).nonzero()[:, 0].tolist():
        other[image] = (image_id != image_id[image]).nonzero()[0, 0]
    return other


def predict_masked_tokens(
    predictor: Predictor, masked: MaskedCaptions, held_out: EvalPairs | None = None, image_of: Tensor | None = None
) -> MaskedTokenPredictions:
    """Predict every masked token with the image `image_of` (M,) of `held_out`, or else from the text alone."""

    def predict(rows: slice) -> tuple[Tensor, ...]:
        text, keep = pad_token_ids(masked.rows[rows], predictor.tokenizer.pad_id)
        positions, is_masked = pad_token_ids(masked.positions[rows], 0)
        inputs = ForwardInput(heads=("mlm",), text=text, text_keep=keep, mask_positions=positions)
        if held_out is not None and image_of is not None:
            size = None if held_out.image_size is None else held_out.image_size[image_of[rows]]
            inputs = replace(inputs, image=held_out.images[image_of[rows]], image_size=size)
        logits = run_forward(predictor.model, inputs)["mlm"].float()
        probabilities = logits.softmax(dim=-1).cpu()[is_masked]  # (tokens, V)
        best = probabilities.topk(min(_TOP, probabilities.shape[1]), dim=1)
        truth = pad_token_ids(masked.labels[rows], 0)[0][is_masked]
        return best.indices, best.values, truth, probabilities.gather(1, truth[:, None])[:, 0]

    count = len(masked.rows)
    tokens, probabilities, truth, of_truth = compute_batches(count, predictor.batch_size, predictor.ranks, predict)
    accuracy = (tokens[:, 0] == truth).double().mean().item()
    return MaskedTokenPredictions(tokens, probabilities, truth, of_truth, accuracy)


def reconstruct_images(
    model: nn.Module, held_out: EvalPairs, stage: StageConfig, config: RunConfig
) -> Reconstruction | None:
    """Mask patches of the first images as `stage` does and fill them; None for visual tokens and for varying shapes."""
    if stage.image_target == "visual_tokens" or held_out.image_size is not None:
        return None
    images, patch_size = held_out.images[:RECONSTRUCTED], config.model.patch_size
    size = config.for_stage(stage).model.image_size
    if images.shape[1] != size:
        channels = images.permute(0, 3, 1, 2).float()
        resized = F.interpolate(channels, (size, size), mode="bicubic", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    patches = patchify(images.float(), patch_size)  # (N, P, 3 p²), 0 to 255
    randoms = [CounterRandom(hash64(_PATCH_SEED, key)) for key in held_out.keys[:RECONSTRUCTED]]
    fraction, num_patches, batch = stage.masking.image_mask_ratio, patches.shape[1], config.evaluation.batch_size
    positions = torch.from_numpy(np.stack([mask_patches(num_patches, fraction, random) for random in randoms]))
    predictions = []
    for image, masked in zip(images.split(batch), positions.split(batch), strict=True):
        inputs = ForwardInput(heads=("mim",), image=image, patch_positions=masked)
        if stage.image_decoder is not None:  # the encoder never reads masked patches
            inputs = drop_masked_patches(inputs, num_patches)
        predictions.append(run_forward(model, inputs)["mim"].float().cpu())
    filled = reconstruct(images, positions, torch.cat(predictions), patch_size)
    index = positions[..., None].expand(-1, -1, patches.shape[-1])
    truth, predicted = patches.gather(1, index), patchify(filled.float(), patch_size).gather(1, index)
    pixels = (patches, truth, predicted)
    colours, true_colours, predicted_colours = (values.unflatten(-1, (-1, 3)).mean(dim=-2) for values in pixels)
    if stage.image_target == "pixels":
        without_model = true_colours.tile(patch_size**2)
    else:
        visible = torch.ones(patches.shape[:2]).scatter(1, positions, 0.0)[..., None]
        mean = (colours * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)
        without_model = mean[:, None].expand(-1, positions.shape[1], -1)
        truth, predicted = true_colours, predicted_colours
    error, error_without = ((other - truth).abs().mean().div(255).item() for other in (predicted, without_model))
    grey = unpatchify(patches.scatter(1, index, float(_GREY)), patch_size).round().to(torch.uint8)
    return Reconstruction(images, grey, filled, error, error_without, stage.name)
