"""What a model sees in one picture with one text: the patches each word aligns to, and its guesses of each word.

The patches are those that optimal transport moves the word's final features to (`objectives.word_patch`), as in ViLT's
figure 4. For the guesses each word is masked in turn, and read with the picture and without it.

Shapes: H x W pixels as the model reads them, G x C rows and columns of patches, L tokens, P = GC patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.images import resize_for
from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.evaluation.masked_language import Guesses, MaskedCaptions, guess
from pipeline.evaluation.retrieval import reading
from pipeline.models.forward import ForwardInput
from pipeline.models.model import Model
from pipeline.objectives.word_patch import word_patch_cost, word_patch_distance, word_patch_plan


@dataclass(frozen=True)
class Guess:
    word: str
    probability: float
    is_right: bool


@dataclass(frozen=True)
class Condition:
    """A masked word's best guesses, and the probability of the word that stands there."""

    guesses: tuple[Guess, ...]
    truth_probability: float


@dataclass(frozen=True)
class ExplainedWord:
    word: str
    heat: Tensor  # (G, C) float32: the share of the word that goes to each patch; sums to 1
    with_image: Condition
    without_image: Condition


@dataclass(frozen=True)
class Explanation:
    picture: Tensor  # (H, W, 3) uint8, as the model read it
    words: tuple[ExplainedWord, ...]
    distance: float  # what the whole plan costs: 0 where every word equals its patches, 1 where nothing is alike


def explain(model: Model, tokenizer: Tokenizer, picture: np.ndarray, text: str, max_text: int) -> Explanation:
    """Reads a decoded picture (H, W, 3) uint8 with a text; words beyond `max_text` tokens are not read.

    The model has the heads `alignment` and `mlm`. Raises DataError where no token is left of the text.
    """
    tokens = tokenizer.encode(text, max_text)
    words = positions_of_words(tokens)
    if not words:
        raise DataError(f"no token is left of the text {text!r}; give at least one word")
    shown = torch.from_numpy(resize_for(picture, model.config).copy())
    plan, distance = _plan(model, shown, tokens)
    masked = mask_each(tokens, words, tokenizer.mask_id)
    every_word = torch.zeros(len(words), dtype=torch.int64)
    with_image = guess(model, masked, tokenizer.pad_id, shown[None], every_word)
    without_image = guess(model, masked, tokenizer.pad_id)
    columns = shown.shape[1] // model.config.patch_size
    first = masked.first()
    explained = [
        ExplainedWord(
            word=tokenizer.decode(tokens.ids[position] for position in places),
            heat=share_of(plan, places).view(-1, columns),
            with_image=_condition(with_image, masked, first[number : number + 2], tokenizer),
            without_image=_condition(without_image, masked, first[number : number + 2], tokenizer),
        )
        for number, places in enumerate(words)
    ]
    return Explanation(shown, tuple(explained), distance)


def untrained(config: RunConfig, stage_name: str) -> list[str]:
    """What of an explanation the weights were never trained for, by this stage or one before it."""
    index = config.stages.index(config.stage_named(stage_name))
    before = config.stages[: index + 1]
    notes = []
    if not any("word_patch" in stage.objectives for stage in before):
        notes.append("No stage trained word_patch: the plan shows how its features happen to lie.")
    if not any("masked_language" in stage.objectives for stage in before):
        notes.append("No stage trained masked_language: the guesses are those of an untrained head.")
    elif not any("masked_language" in s.objectives and config.use_of(s) == "pairs" for s in before):
        notes.append("No stage trained masked_language beside pictures: only the guesses without one were learnt.")
    return notes


def positions_of_words(tokens: Tokens) -> list[list[int]]:
    """The positions of each word's tokens, in the text's order."""
    words: dict[int, list[int]] = {}
    for position, word in enumerate(tokens.word_of):
        if word >= 0:
            words.setdefault(word, []).append(position)
    return list(words.values())


def mask_each(tokens: Tokens, words: Sequence[Sequence[int]], mask_id: int) -> MaskedCaptions:
    """The text once for each word, with that word masked whole."""
    rows = tuple(
        tuple(mask_id if position in places else token for position, token in enumerate(tokens.ids)) for places in words
    )
    labels = tuple(tuple(tokens.ids[position] for position in places) for places in words)
    return MaskedCaptions(rows, tuple(tuple(places) for places in words), labels)


def share_of(plan: Tensor, positions: Sequence[int]) -> Tensor:
    """How the tokens at `positions` spread over the patches, by a plan (L, P): (P,), sums to 1."""
    moved = plan[list(positions)].sum(dim=0)
    return moved / moved.sum()


def _plan(model: Model, picture: Tensor, tokens: Tokens) -> tuple[Tensor, float]:
    """The plan (L, P) of one text and one picture, and what it costs."""
    with reading(model) as device:
        one = ForwardInput(
            heads=("alignment",), image=picture[None].to(device), text=torch.tensor([tokens.ids], device=device)
        )
        found = model({"only": one})["only"]
        cost = word_patch_cost(found["words"], found["patches"])
        plan = word_patch_plan(cost, found["words_keep"], found["patches_keep"])
        return plan[0].cpu(), float(word_patch_distance(cost, plan))


def _condition(guesses: Guesses, masked: MaskedCaptions, span: Sequence[int], tokenizer: Tokenizer) -> Condition:
    """Guesses of the word whose tokens are numbers start … stop of all masked ones.

    Of a word of several tokens only one guess is given, the best of each: the second best of its parts make no word.
    """
    rows = slice(*span)
    truth = masked.truth()[rows]
    ranks = range(guesses.tokens.shape[1] if len(truth) == 1 else 1)
    best = [
        Guess(
            word=tokenizer.decode(guesses.tokens[rows, rank].tolist()),
            probability=guesses.probabilities[rows, rank].prod().item(),
            is_right=bool((guesses.tokens[rows, rank] == truth).all()),
        )
        for rank in ranks
    ]
    return Condition(tuple(best), guesses.truth_probability[rows].prod().item())
