"""Masked words of held-out captions, predicted with the pair's own image, with another image, and from text alone.

The difference of the first two accuracies is what the image contributes. Whole words are masked, even where training
masks single tokens, whose neighbours give them away. The masks depend on the sample and the caption only, and every
masked token is replaced by [MASK]. The accuracy is therefore a property of the weights, for every batch size and limit.

Shapes: N images, M captions, T masked tokens of all captions, B examples, L tokens, K masked tokens of a caption.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config.schema import MaskingConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.masking import mask_whole_words
from pipeline.data.randomness import CounterRandom, hash64
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks, compute_batches
from pipeline.evaluation.retrieval import Images, eval_mode, pad_token_ids
from pipeline.models.forward import ForwardInput

_SEED = 2111_02358  # fixed, so that every checkpoint predicts the same words
_TOP = 3


@dataclass(frozen=True)
class MaskedCaptions:
    """Captions with [MASK] tokens: ids, masked positions, and the original tokens at those positions."""

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]

    def truth(self) -> Tensor:
        """Return the masked tokens (T,) of all captions."""
        return torch.tensor([token for row in self.labels for token in row], dtype=torch.int64)

    def first(self) -> list[int]:
        """Return the offset of each caption's tokens among all T, followed by T."""
        return list(itertools.accumulate((len(row) for row in self.labels), initial=0))


@dataclass(frozen=True)
class MaskedTokenPredictions:
    """The best tokens (T, 3), their probabilities, and the probability (T,) of the true token."""

    tokens: Tensor
    probabilities: Tensor
    truth_probability: Tensor
    accuracy: float


@dataclass(frozen=True)
class MaskedLanguage:
    """Predictions by condition. The image conditions are None where the model's stage never fused image and text."""

    masked: MaskedCaptions
    image_of_other: Tensor | None  # (M,) the other image shown with each caption
    own_image: MaskedTokenPredictions | None
    other_image: MaskedTokenPredictions | None
    text_only: MaskedTokenPredictions


def mask_captions(held_out: EvalPairs, masking: MaskingConfig, tokenizer: Tokenizer) -> MaskedCaptions:
    """Mask words of every caption, at least one, chosen by the sample's key and the caption's number."""
    rows, positions, labels = [], [], []
    images = held_out.caption_of.tolist()
    for tokens, image, number in zip(held_out.tokens, images, held_out.caption_numbers(), strict=True):
        random = CounterRandom(hash64(_SEED, held_out.keys[image], number))
        masked = mask_whole_words(tokens, random, masking.mlm_probability, True, tokenizer)
        chosen = [int(position) for position in masked.positions]
        ids = list(tokens.ids)
        labels.append(tuple(int(ids[position]) for position in chosen))
        for position in chosen:
            ids[position] = tokenizer.mask_id
        rows.append(tuple(ids))
        positions.append(tuple(chosen))
    return MaskedCaptions(tuple(rows), tuple(positions), tuple(labels))


def mismatched_images(image_id: Tensor) -> Tensor:
    """Return for each image the index (N,) of another one with a different id, each used once where possible.

    Images in the order of their ids are rotated by the size of the largest group of equal ids, so that none meets its
    own. Where one id fills more than half, the rest take the first image that differs. Raises ValueError where all
    images are the same one.
    """
    ids, counts = image_id.unique(return_counts=True)
    if len(ids) < 2:
        raise ValueError("all held-out images are the same one: there is no other image to compare with")
    order = image_id.argsort(stable=True)
    other = torch.empty_like(order)
    other[order] = order.roll(-int(counts.max()))
    for image in (image_id[other] == image_id).nonzero()[:, 0].tolist():
        other[image] = (image_id != image_id[image]).nonzero()[0, 0]
    return other


def predict_masked_tokens(
    model: nn.Module,
    masked: MaskedCaptions,
    pad: int,
    images: Images | None = None,
    image_of: Tensor | None = None,
    batch: int = 64,
    image_size: Tensor | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> MaskedTokenPredictions:
    """Predict every masked token; `image_of` (M,) is the index of the image shown with each caption.

    Without images the model reads the text alone. `image_size` (N, 2) is the extent of each image on its canvas.
    """
    with eval_mode(model) as device:

        def predict(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            text, keep = pad_token_ids(masked.rows[rows], pad)
            positions, is_masked = pad_token_ids(masked.positions[rows], 0)
            forward_input = ForwardInput(
                heads=("mlm",),
                image=None if images is None or image_of is None else images[image_of[rows]].to(device),
                image_size=None if image_size is None or image_of is None else image_size[image_of[rows]].to(device),
                text=text.to(device),
                text_keep=keep.to(device),
                mask_positions=positions.to(device),
            )
            logits = model({"only": forward_input})["only"]["mlm"].float()
            probabilities = logits.softmax(dim=-1).cpu()[is_masked]  # (tokens, V)
            best = probabilities.topk(min(_TOP, probabilities.shape[1]), dim=1)
            truth = pad_token_ids(masked.labels[rows], 0)[0][is_masked]
            return best.indices, best.values, probabilities.gather(1, truth[:, None])[:, 0]

        tokens, probabilities, of_truth = compute_batches(len(masked.rows), batch, ranks, predict)
    accuracy = (tokens[:, 0] == masked.truth()).double().mean().item()
    return MaskedTokenPredictions(tokens, probabilities, of_truth, accuracy)


def masked_language(
    model: nn.Module,
    held_out: EvalPairs,
    masking: MaskingConfig,
    tokenizer: Tokenizer,
    fused: bool,
    batch: int = 64,
    ranks: Ranks = SINGLE_PROCESS,
) -> MaskedLanguage:
    """Predict under all conditions of one model; `fused`: its stage trained masked words with images."""
    masked, pad = mask_captions(held_out, masking, tokenizer), tokenizer.pad_id

    def predict(image_of: Tensor | None) -> MaskedTokenPredictions:
        images = None if image_of is None else held_out.images
        return predict_masked_tokens(model, masked, pad, images, image_of, batch, held_out.image_size, ranks)

    text_only = predict(None)
    own = predict(held_out.caption_of) if fused else None
    if own is None or len(held_out.image_id.unique()) < 2:
        return MaskedLanguage(masked, None, own, None, text_only)
    image_of_other = mismatched_images(held_out.image_id)[held_out.caption_of]
    return MaskedLanguage(masked, image_of_other, own, predict(image_of_other), text_only)


def words_of(masked: MaskedCaptions, caption: int, word_of: Sequence[int]) -> list[list[int]]:
    """Return the masked words of a caption, each as indices of its tokens in `masked.positions[caption]`."""
    words: dict[int, list[int]] = {}
    for index, position in enumerate(masked.positions[caption]):
        words.setdefault(word_of[position], []).append(index)
    return list(words.values())
