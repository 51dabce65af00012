"""What is hidden from the model: whole words of a text, patches of a picture.

Masking acts on one text before padding, so that neither padding nor [CLS] and [SEP] can take a masked place or
count towards the budget (the published collators pad first, which leaves short captions without a masked word).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.randomness import CounterRandom
from pipeline.data.text import Tokenizer, Tokens

REPLACED, KEPT = 0.8, 0.9  # BERT: 80 % of the chosen words become [MASK], 10 % random tokens, 10 % stay


@dataclass(frozen=True)
class Masked:
    """A text with words hidden: ids (L,) int64; positions (K,) int64 ascending; labels (K,) what stood there."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def mask_whole_words(
    tokens: Tokens, random: CounterRandom, probability: float, whole_word: bool, tokenizer: Tokenizer
) -> Masked:
    """Hide about `probability` of the real tokens, whole words at a time (single tokens if not `whole_word`).

    Words are chosen in random order; one that exceeds what is left of the budget is passed over, except the
    first, so that every text with a word has a masked word. Each chosen word is replaced as one: all of its
    tokens become [MASK], or all become random ordinary tokens, or all stay.
    """
    ids = np.array(tokens.ids, dtype=np.int64)
    groups = _groups(tokens.word_of, whole_word)
    budget = max(1, round(probability * sum(len(group) for group in groups)))
    chosen: list[int] = []
    for which in random.permutation(len(groups)):
        group = groups[which]
        if chosen and len(chosen) + len(group) > budget:
            continue
        _replace(ids, group, random, tokenizer)
        chosen.extend(group)
        if len(chosen) >= budget:
            break
    positions = np.array(sorted(chosen), dtype=np.int64)
    return Masked(ids, positions, np.array(tokens.ids, dtype=np.int64)[positions])


def mask_patches(num_patches: int, fraction: float, random: CounterRandom) -> np.ndarray:
    """Ascending positions (K,) int64 of the hidden patches; K depends on the fraction alone, and is at least 1."""
    count = min(num_patches, max(1, round(fraction * num_patches)))
    return np.sort(random.permutation(num_patches)[:count]).astype(np.int64)


def _groups(word_of: list[int], whole_word: bool) -> list[list[int]]:
    """Token positions word by word; specials (-1) belong to none."""
    groups: list[list[int]] = []
    before = -1
    for position, word in enumerate(word_of):
        if word < 0:
            continue
        if whole_word and word == before:
            groups[-1].append(position)
        else:
            groups.append([position])
        before = word
    return groups


def _replace(ids: np.ndarray, group: list[int], random: CounterRandom, tokenizer: Tokenizer) -> None:
    fate = random.uniform()
    if fate < REPLACED:
        ids[group] = tokenizer.mask_id
    elif fate >= KEPT:
        ordinary = tokenizer.ordinary_ids
        ids[group] = [ordinary[random.integer(len(ordinary))] for _ in group]
