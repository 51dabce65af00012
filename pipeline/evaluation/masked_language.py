"""Masked words of held-out captions, guessed with the pair's own image, with another one, and from text alone.

What a picture adds to the guess is the distance between the first two accuracies. Words are masked whole, also where
training masks single tokens, whose neighbours give them away; by randomness that depends on the sample and the
caption only; and always stand as [MASK]. So the accuracy is a property of the weights, the same for every batch size
and limit.

Shapes: N images, M captions, T masked tokens of all captions, B rows, L tokens, K masked tokens a row.
"""

from __future__ import annotations

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

_SEED = 2111_02358  # fixed, so that every checkpoint is asked for the same words
_TOP = 3


@dataclass(frozen=True)
class MaskedCaptions:
    """Captions with [MASK] tokens: ids per row, the masked positions of each row and the tokens that stood there."""

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]

    def truth(self) -> Tensor:
        """(T,) the masked tokens, caption after caption."""
        return torch.tensor([token for row in self.labels for token in row], dtype=torch.int64)

    def first(self) -> list[int]:
        """Where each caption's tokens start among all T; one more entry closes the list."""
        starts = [0]
        for row in self.labels:
            starts.append(starts[-1] + len(row))
        return starts


@dataclass(frozen=True)
class MaskedTokenPredictions:
    """What stands in the masked places: the best tokens (T, 3), their probabilities, and that of the truth (T,)."""

    tokens: Tensor
    probabilities: Tensor
    truth_probability: Tensor
    accuracy: float


@dataclass(frozen=True)
class MaskedLanguage:
    """Guesses by condition. The image conditions are None where the model's stage never fused image and text."""

    masked: MaskedCaptions
    image_of_other: Tensor | None  # (M,) the other image each caption was shown with
    own_image: MaskedTokenPredictions | None
    other_image: MaskedTokenPredictions | None
    text_only: MaskedTokenPredictions


def mask_captions(held_out: EvalPairs, masking: MaskingConfig, tokenizer: Tokenizer) -> MaskedCaptions:
    """Masks words of every caption, at least one where it has any, chosen by the sample's key and caption number."""
    rows, positions, labels = [], [], []
    images = held_out.caption_of.tolist()
    for tokens, image, number in zip(held_out.tokens, images, held_out.numbers(), strict=True):
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
    """(N,) for each image the number of another one with a different id; each serves once where that is possible.

    Images in the order of their ids, turned by the size of the largest group of equals: as groups stand together,
    nobody meets its own. Where one id fills more than half, the remainder take the first image that differs.
    Raises ValueError where all images are the same one.
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
    """The model's guesses for every masked token; `image_of` (M,) says which of `images` each caption is shown with.

    Without images the caption is read by a text pass. `image_size` (N, 2) is how much of each canvas is picture.
    """
    with eval_mode(model) as device:

        def guess_rows(span: slice) -> tuple[Tensor, Tensor, Tensor]:
            shown = None if images is None or image_of is None else images[image_of[span]].to(device)
            sizes = None if image_size is None or image_of is None else image_size[image_of[span]].to(device)
            text, keep = pad_token_ids(masked.rows[span], pad)
            positions, real = pad_token_ids(masked.positions[span], 0)
            wanted = ForwardInput(
                heads=("mlm",),
                image=shown,
                image_size=sizes,
                text=text.to(device),
                text_keep=keep.to(device),
                mask_positions=positions.to(device),
            )
            odds = model({"only": wanted})["only"]["mlm"].float().softmax(dim=-1).cpu()[real]  # (tokens, V)
            best = odds.topk(min(_TOP, odds.shape[1]), dim=1)
            truth = pad_token_ids(masked.labels[span], 0)[0][real]
            return best.indices, best.values, odds.gather(1, truth[:, None])[:, 0]

        tokens, probabilities, of_truth = compute_batches(len(masked.rows), batch, ranks, guess_rows)
    return MaskedTokenPredictions(
        tokens=tokens,
        probabilities=probabilities,
        truth_probability=of_truth,
        accuracy=(tokens[:, 0] == masked.truth()).double().mean().item(),
    )


def masked_language(
    model: nn.Module,
    held_out: EvalPairs,
    masking: MaskingConfig,
    tokenizer: Tokenizer,
    fused: bool,
    batch: int = 64,
    ranks: Ranks = SINGLE_PROCESS,
) -> MaskedLanguage:
    """All conditions of one model; `fused` says whether its stage trained guessing words beside an image."""
    masked = mask_captions(held_out, masking, tokenizer)
    text_only = predict_masked_tokens(model, masked, tokenizer.pad_id, batch=batch, ranks=ranks)
    if not fused:
        return MaskedLanguage(masked, None, None, None, text_only)
    images, sizes = held_out.images, held_out.image_size
    own = predict_masked_tokens(model, masked, tokenizer.pad_id, images, held_out.caption_of, batch, sizes, ranks)
    if len(held_out.image_id.unique()) < 2:
        return MaskedLanguage(masked, None, own, None, text_only)
    image_of_other = mismatched_images(held_out.image_id)[held_out.caption_of]
    other = predict_masked_tokens(model, masked, tokenizer.pad_id, images, image_of_other, batch, sizes, ranks)
    return MaskedLanguage(masked, image_of_other, own, other, text_only)


def words_of(masked: MaskedCaptions, caption: int, word_of: Sequence[int]) -> list[list[int]]:
    """The masked words of a caption, each as the places of its tokens in `masked.positions[caption]`."""
    words: dict[int, list[int]] = {}
    for place, position in enumerate(masked.positions[caption]):
        words.setdefault(word_of[position], []).append(place)
    return list(words.values())
