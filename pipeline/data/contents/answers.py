"""Answers to questions about images as the VQA evaluation scores them: normal form, soft scores, answer lists.

Ten people answer each question of VQA v2 (arXiv 1612.00837). An answer that c of them gave has the score that the
official evaluation gives it: min(c / 3, 1) over nine of the ten people, averaged over the person left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

MIN_COUNT = 9  # minimum number of questions with a listed answer: 3,129 answers of VQA v2's train and val
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # of an answer that 0, 1, 2, 3, and 4 or more people gave

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
# Contractions that are not words of their own without an apostrophe; those with two also occur with one of them.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's
    how'd how'll how's i'd've isn't it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


_SPELT = {  # a contraction without one of its apostrophes -> the contraction
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, letter in enumerate(word)
    if letter == "'"
}


def plain_answer(answer: str) -> str:
    """Return an answer as VQA compares it: lower case, no punctuation or articles, digits for number words."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number_with_comma = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        is_at_word_edge = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_at_word_edge or has_number_with_comma else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_SPELT.get(word, word) for word in words if word not in _ARTICLES)


def answer_scores(answers: Iterable[str]) -> dict[str, float]:
    """Return the soft score of each plain answer among people's answers to one question; empty answers are dropped."""
    counts = Counter(plain for answer in answers if (plain := plain_answer(answer)))
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in counts.items()}


def frequent_answers(chosen: Iterable[str], min_count: int = MIN_COUNT) -> tuple[str, ...]:
    """Return the plain answers chosen for at least `min_count` questions, in order of first appearance.

    Over the train and val annotations of VQA v2, in this order, these are the classes of the published models.
    """
    counts = Counter(plain for answer in chosen if (plain := plain_answer(answer)))
    return tuple(answer for answer, count in counts.items() if count >= min_count)
