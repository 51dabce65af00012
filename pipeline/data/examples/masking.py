"""Masking of whole words of a text, before it is padded, and of patches or regions of an image."""

import math
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.randomness import CounterRandom, permutation

BLOCK_AREA, BLOCK_ASPECT = 16, 10 / 3  # BEiT: minimum patches of a block, and its maximum aspect ratio
COVERED = -1  # the replacement of a patch that is shown as the mask embedding
ZEROED = 0.9  # ImageBERT: 90 % of the masked regions lose their features, 10 % keep them
REPLACED, KEPT = 0.8, 0.9  # BERT: 80 % of the chosen words become [MASK], 10 % random tokens, 10 % stay


class Masked(NamedTuple):
    """A text with masked words: ids (L,) int64; positions (K,) int64 ascending; labels (K,) the original ids."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def mask_whole_words(
    tokens: Tokens, random: CounterRandom, probability: float, whole_word: bool, tokenizer: Tokenizer
) -> Masked:
    """Mask `probability` times the number of words (of tokens, unless `whole_word`), rounded at random to keep the
    expected fraction, and at least one. (A budget of tokens, as in BERT's and VLMo's collators, masks words of several
    pieces less often.) All tokens of a chosen word become [MASK], or all become random ordinary tokens, or all stay.
    """
    words: list[list[int]] = []  # the token positions of each word (of each token, unless `whole_word`)
    for position, (before, word) in enumerate(pairwise([-1, *tokens.word_of])):
        if word >= 0 and whole_word and word == before:
            words[-1].append(position)
        elif word >= 0:
            words.append([position])
    order = permutation(random.integer(), len(words))
    count = max(1, math.floor(probability * len(words) + random.uniform()))
    original, ordinary = np.array(tokens.ids, dtype=np.int64), tokenizer.ordinary_ids
    ids, chosen = original.copy(), [words[number] for number in order[:count]]
    for places in chosen:
        draw = random.uniform()
        if draw < REPLACED:
            ids[places] = tokenizer.mask_id
        elif draw >= KEPT:
            ids[places] = [ordinary[random.integer(len(ordinary))] for _ in places]
    positions = np.array(sorted(chain.from_iterable(chosen)), dtype=np.int64)
    return Masked(ids, positions, original[positions])


def mask_patches(num_patches: int, fraction: float, random: CounterRandom, blocks: bool = False) -> np.ndarray:
    """Return ascending positions (K,) int64 of masked patches or regions; K depends on the fraction and is at least 1.
    With `blocks`, rectangles of a square grid are masked until enough is covered (BEiT, arXiv 2106.08254, algorithm 1):
    of at least 16 patches and of aspect 0.3 to 3.3, the last cut row by row, so that all images have the same number.
    """
    remaining = min(num_patches, max(1, round(fraction * num_patches)))
    if not blocks:
        return np.sort(permutation(random.integer(), num_patches)[:remaining])
    grid = math.isqrt(num_patches)
    masked = np.zeros((grid, grid), dtype=bool)
    while remaining:
        area = BLOCK_AREA + random.uniform() * max(0, remaining - BLOCK_AREA)
        stretch = math.exp((2 * random.uniform() - 1) * math.log(BLOCK_ASPECT))
        rows = min(grid, max(1, round(math.sqrt(area * stretch))))
        columns = min(grid, max(1, round(math.sqrt(area / stretch))))
        top, first = random.integer(grid - rows + 1), random.integer(grid - columns + 1)
        block = masked[top : top + rows, first : first + columns]
        fresh = np.argwhere(~block)[:remaining]
        block[fresh[:, 0], fresh[:, 1]] = True
        remaining -= len(fresh)
    return np.flatnonzero(masked).astype(np.int64)


def patch_replacements(
    positions: np.ndarray, num_patches: int, mask_prob: float, random_prob: float, random: CounterRandom
) -> np.ndarray:
    """Return the patch shown at each position: (K,) int64, its own, another, or -1: mask embedding (ViT, B.1.2)."""
    shown = positions.copy()
    for place, position in enumerate(positions):
        draw = random.uniform()
        if draw < mask_prob:
            shown[place] = COVERED
        elif draw < mask_prob + random_prob and num_patches > 1:
            shown[place] = (position + 1 + random.integer(num_patches - 1)) % num_patches
    return shown
