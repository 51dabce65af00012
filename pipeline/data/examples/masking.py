"""What is hidden from the model: whole words of a text, patches of a picture.

Masking acts on one text before padding, so that neither padding nor [CLS] and [SEP] can take a masked place (the
published collators pad first, which leaves short captions without a masked word).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.randomness import CounterRandom

BLOCK_AREA, BLOCK_ASPECT = 16, 10 / 3  # BEiT's: a block's fewest patches, and the most that a side exceeds the other
COVERED = -1  # stands in for a patch that the mask embedding covers
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
    """Mask each word (each token, unless `whole_word`) with the same `probability`, and at least one word of a text.

    `probability` times the number of words are masked, rounded up or down at random, so that the expected fraction of
    masked words, and of masked tokens, is `probability` for any length of text and of words. A budget of tokens, as
    in BERT's and VLMo's collators, masks words of several pieces less often: they exceed what is left of it. Each
    chosen word is replaced as one: all of its tokens become [MASK], or all become random ordinary tokens, or all stay.
    """
    ids = np.array(tokens.ids, dtype=np.int64)
    groups = _groups(tokens.word_of, whole_word)
    order = random.permutation(len(groups))
    count = max(1, math.floor(probability * len(groups) + random.uniform()))
    chosen: list[int] = []
    for which in order[:count]:
        _replace(ids, groups[which], random, tokenizer)
        chosen.extend(groups[which])
    positions = np.array(sorted(chosen), dtype=np.int64)
    return Masked(ids, positions, np.array(tokens.ids, dtype=np.int64)[positions])


def mask_patches(num_patches: int, fraction: float, random: CounterRandom, blocks: bool = False) -> np.ndarray:
    """Ascending positions (K,) int64 of the masked patches; K depends on the fraction alone, and is at least 1.

    With `blocks` they are masked by rectangles of a square grid, else one by one.
    """
    count = min(num_patches, max(1, round(fraction * num_patches)))
    if blocks:
        return mask_blocks(math.isqrt(num_patches), count, random)
    return np.sort(random.permutation(num_patches)[:count]).astype(np.int64)


def mask_blocks(grid: int, count: int, random: CounterRandom) -> np.ndarray:
    """Exactly `count` patches of a grid x grid picture, covered by rectangles: ascending positions (count,) int64.

    BEiT's block-wise masking (arXiv 2106.08254, algorithm 1): rectangles of at least 16 patches and of aspect 0.3 to
    3.3 fall anywhere, over one another too, until enough is covered. BEiT's release stops short of the count where no
    rectangle fits any more; here the last one is cut, row by row, so that all pictures have equally many.
    """
    masked = np.zeros((grid, grid), dtype=bool)
    left = count
    while left:
        area = BLOCK_AREA + random.uniform() * max(0, left - BLOCK_AREA)
        stretch = math.exp((2 * random.uniform() - 1) * math.log(BLOCK_ASPECT))
        rows = min(grid, max(1, round(math.sqrt(area * stretch))))
        columns = min(grid, max(1, round(math.sqrt(area / stretch))))
        top, first = random.integer(grid - rows + 1), random.integer(grid - columns + 1)
        block = masked[top : top + rows, first : first + columns]
        fresh = np.argwhere(~block)[:left]
        block[fresh[:, 0], fresh[:, 1]] = True
        left -= len(fresh)
    return np.flatnonzero(masked).astype(np.int64)


def stand_ins(
    positions: np.ndarray, num_patches: int, covered: float, swapped: float, random: CounterRandom
) -> np.ndarray:
    """What the encoder is shown at the masked `positions` (K,): (K,) int64, -1 for the mask embedding, else a patch.

    Each is covered with probability `covered`, shows another patch of the picture, any but its own, with probability
    `swapped`, and otherwise stays (ViT, section B.1.2: 0.8, 0.1 and 0.1).
    """
    shown = positions.copy()
    for place, position in enumerate(positions):
        fate = random.uniform()
        if fate < covered:
            shown[place] = COVERED
        elif fate < covered + swapped and num_patches > 1:
            shown[place] = (position + 1 + random.integer(num_patches - 1)) % num_patches
    return shown


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
