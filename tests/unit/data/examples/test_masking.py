"""Masking: whole words with equal probability, at least one of a text; a fixed number of patches."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data.contents.text import Tokenizer, Tokens
from pipeline.data.examples.masking import COVERED, mask_patches, mask_whole_words, patch_replacements
from pipeline.data.randomness import CounterRandom, hash64

CAPTIONS = ["a zebra", "dogs", "an antelope overtakes the hippopotamus quickly", "a man in a red shirt rides a horse"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a man in a red shirt the dog an o", "abcdefghijklmnopqrstuvwxyz"] * 9, size=90)


def masked_many(tokenizer: Tokenizer, tokens: Tokens, times: int = 400, probability: float = 0.15, whole: bool = True):
    for key in range(times):
        yield mask_whole_words(tokens, CounterRandom(hash64("test", key)), probability, whole, tokenizer)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_trap_05_every_caption_gets_whole_masked_words_with_their_labels(tokenizer, caption):
    tokens = tokenizer.encode(caption, 40)
    words, before = np.array(tokens.word_of), np.array(tokens.ids)
    assert len(set(words)) < len(words)  # some word has several tokens
    for masked in masked_many(tokenizer, tokens):
        hidden = set(words[masked.positions])
        assert (len(hidden) > 0, -1 in hidden) == (True, False)  # neither [CLS] nor [SEP]
        assert masked.positions.tolist() == np.flatnonzero(np.isin(words, list(hidden))).tolist()
        assert (masked.labels == before[masked.positions]).all()
        rest = np.setdiff1d(np.arange(len(before)), masked.positions)
        assert (masked.ids[rest] == before[rest]).all()
        assert masked.ids.dtype == masked.positions.dtype == masked.labels.dtype == np.int64
    repeated = (next(masked_many(tokenizer, tokens)) for _ in range(2))
    assert len({masked.ids.tobytes() + masked.positions.tobytes() for masked in repeated}) == 1


def test_trap_05_all_tokens_of_a_word_are_replaced_equally_unless_single_tokens_are_requested(tokenizer):
    tokens = tokenizer.encode(CAPTIONS[2], 40)
    words, before = np.array(tokens.word_of), np.array(tokens.ids)
    for masked in masked_many(tokenizer, tokens, probability=0.5):
        for word in set(words[masked.positions]):
            now = masked.ids[words == word]
            assert (now == tokenizer.mask_id).all() or (now != tokenizer.mask_id).all()
            assert (now == before[words == word]).all() or len(now) == 1 or (now != before[words == word]).any()
    masked = next(masked_many(tokenizer, tokenizer.encode("", 40)))
    assert len(masked.positions) == len(masked.labels) == 0
    assert masked.ids.tolist() == [tokenizer.cls_id, tokenizer.sep_id]
    tokens = tokenizer.encode("hippopotamus", 40)
    assert {len(masked.positions) for masked in masked_many(tokenizer, tokens, 20, whole=False)} <= {1, 2, 3}
    assert {len(masked.positions) for masked in masked_many(tokenizer, tokens, 20)} == {len(tokens.ids) - 2}


def test_eight_words_in_ten_become_masks_and_one_in_ten_stays(tokenizer):
    tokens, fates = tokenizer.encode("a b c d e f g h i j", 40), Counter[str]()
    counts = np.zeros(len(tokens.ids))
    for masked in masked_many(tokenizer, tokens, 5000, probability=0.1):
        (now,) = masked.ids[masked.positions].tolist()
        assert now >= tokenizer.mask_id  # random ids are never special
        fates["mask" if now == tokenizer.mask_id else "kept" if now == masked.labels else "random"] += 1
        counts[masked.positions] += 1
    expected = {"mask": 0.8, "kept": 0.1 + 0.1 / len(tokenizer.ordinary_ids), "random": 0.1}
    assert {fate: n / 5000 for fate, n in fates.items()} == pytest.approx(expected, abs=0.02)
    assert counts[0] == counts[-1] == 0
    assert np.abs(counts[1:-1] / 5000 - 0.1).max() < 0.02  # the same for every word


@pytest.mark.parametrize("whole", [True, False])
def test_masking_does_not_depend_on_pieces_or_text_length(tokenizer, whole):
    lengths = np.random.default_rng(7)
    masked_of, words_of = np.zeros((2, 4))  # fraction by the number of pieces of a word
    masked_in, tokens_in = np.zeros((2, 31))  # fraction by the number of words of a caption
    for key in range(20_000):
        pieces = lengths.choice((1, 2, 3), size=lengths.integers(1, 31), p=(0.6, 0.3, 0.1))
        word_of = [-1, *np.repeat(np.arange(len(pieces)), pieces), -1]
        tokens = Tokens([9] * len(word_of), word_of)
        masked = mask_whole_words(tokens, CounterRandom(hash64("words", key)), 0.15, whole, tokenizer)
        hidden = np.bincount(np.array(word_of)[masked.positions], minlength=len(pieces))
        masked_in[len(pieces)] += len(masked.positions)
        tokens_in[len(pieces)] += sum(pieces)
        if len(pieces) >= 7:  # shorter captions always lose a word, which is more than 15 %
            np.add.at(masked_of, pieces, hidden / pieces)
            np.add.at(words_of, pieces, 1)
    assert np.abs(masked_of[1:] / words_of[1:] - 0.15).max() < 0.004
    fractions = masked_in[7:] / tokens_in[7:]
    assert np.abs(fractions - 0.15).max() < 0.02  # no saw-tooth over the caption's length: 0.10 to 0.20 with a budget
    assert abs(np.mean(fractions) - 0.15) < 0.003


def test_number_of_masked_patches_is_fixed_blocks_are_compact_and_no_position_is_left_out() -> None:
    single = [(196, 78, False), (36, 14, False), (4, 1, False), (4, 4, False)]
    blocks = [(grid**2, k, True) for grid, k in ((14, 78), (14, 75), (14, 1), (4, 6), (4, 15), (3, 9))]
    for patches, expected, in_blocks in single + blocks:
        drawn = [mask_patches(patches, expected / patches, CounterRandom(hash64(k)), in_blocks) for k in range(50)]
        assert {len(np.unique(positions)) for positions in drawn} == {expected}
        assert all((np.diff(p) > 0).all() and p[0] >= 0 and p[-1] < patches and p.dtype == np.int64 for p in drawn)
        assert len({p.tobytes() for p in drawn}) > 1 or expected == patches
        for fraction, count in ((0.01, max(1, round(patches / 100))), (1.0, patches)):
            assert len(mask_patches(patches, fraction, CounterRandom(1), in_blocks)) == count
    fractions = {}  # of the masked patches' inner borders, those between two masked patches
    for blocks in (True, False):
        drawn = [mask_patches(196, 0.4, CounterRandom(hash64(key)), blocks) for key in range(400)]
        masks = np.zeros((400, 14, 14), dtype=bool)
        np.put_along_axis(masks.reshape(400, 196), np.stack(drawn), True, axis=1)
        pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
        fractions[blocks] = pairs / (2 * masks.sum())
        assert masks.sum(axis=0).min() > 8  # corners are rare among blocks, which lie wholly inside
    assert fractions[False] < 0.45 < 0.75 < fractions[True]
    counts = np.bincount(np.concatenate([mask_patches(16, 0.5, CounterRandom(hash64(k))) for k in range(1000)]))
    assert np.abs(counts / 1000 - 0.5).max() < 0.06


def test_trap_section_3_patch_replacement_has_three_branches():
    """80 % mask embedding, 10 % another patch, 10 % unchanged; published code omits the last."""
    positions = mask_patches(196, 0.5, CounterRandom(7))
    drawn = np.stack([patch_replacements(positions, 196, 0.8, 0.1, CounterRandom(hash64(key))) for key in range(300)])
    is_covered, is_kept = drawn == COVERED, drawn == positions
    assert (is_covered.mean(), is_kept.mean()) == (pytest.approx(0.8, abs=0.01), pytest.approx(0.1, abs=0.01))
    assert set(drawn[~is_covered & ~is_kept].tolist()) == set(range(196))
    assert (patch_replacements(positions, 196, 1.0, 0.0, CounterRandom(1)) == COVERED).all()
    assert (patch_replacements(positions, 196, 0.0, 0.0, CounterRandom(1)) == positions).all()
    assert (patch_replacements(positions, 196, 0.0, 1.0, CounterRandom(1)) != positions).all()
