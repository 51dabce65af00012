"""Answers to questions about pictures, as VQA judges them: their plain form, what each is worth, and which are listed.

Ten people answer each question of VQA v2 (arXiv 1612.00837). An answer that c of them gave is right to the degree
that the official evaluation gives it on average over nine of the ten: min(c / 3, 1) while its giver is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

MIN_COUNT = 9  # questions whose chosen answer a listed answer is at least: 3,129 answers of VQA v2's train and val
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # of an answer that 0, 1, 2, 3, and 4 or more people gave

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
# Contractions whose spelling without an apostrophe is no word of its own; those with two are also met with one of them.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's
    how'd how'll how's i'd've isn't it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _spellings(word: str) -> list[str]:
    """A contraction without one of its apostrophes."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_SPELT = {wrong: right for right in _CONTRACTIONS.split() for wrong in _spellings(right)}


def plain_answer(answer: str) -> str:
    """An answer as VQA's evaluation compares it: no punctuation, no article, digits for number words, lower case."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number_with_comma = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        stands_at_an_edge = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if stands_at_an_edge or has_number_with_comma else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_SPELT.get(word, word) for word in words if word not in _ARTICLES)


def answer_scores(given: Iterable[str]) -> dict[str, float]:
    """What each of some people's answers to one question is worth, in its plain form; empty ones are nothing."""
    counts = Counter(plain for answer in given if (plain := plain_answer(answer)))
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in counts.items()}


def frequent_answers(chosen: Iterable[str], min_count: int = MIN_COUNT) -> tuple[str, ...]:
    """The plain answers that at least `min_count` questions' chosen answers are, in the order they first appear in.

    Over VQA's train and val annotations, in this order, these are the classes of the published models, in their order.
    """
    counts = Counter(plain for answer in chosen if (plain := plain_answer(answer)))
    return tuple(answer for answer, count in counts.items() if count >= min_count)
