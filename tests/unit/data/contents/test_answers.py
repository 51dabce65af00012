"""Plain form and soft scores of answers, as in the VQA evaluation."""

from __future__ import annotations

import itertools

import pytest

from pipeline.data.contents.answers import SCORES, answer_scores, frequent_answers, plain_answer


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("A Teddy Bear.", "teddy bear"),
        ("the  net\n", "net"),
        ("Two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("its", "its"),  # a word of its own
        ("yes, it is", "yes it is"),  # punctuation at the edge of a word is removed
        ("black/white", "black white"),  # punctuation between words becomes a space
        ("1,000", "1000"),
        ("3.50", "3.50"),
        ("no.", "no"),
        ("?", ""),
    ],
)
def test_answer_is_compared_in_its_plain_form(said: str, plain: str) -> None:
    assert plain_answer(said) == plain


def test_plain_answers_are_unchanged() -> None:
    for said in ("black white", "don't know", "2", "3.50", "teddy bear", "y'all'd've"):
        assert plain_answer(plain_answer(said)) == plain_answer(said)


@pytest.mark.parametrize("count", range(11))
def test_scores_equal_the_official_vqa_accuracy(count: int) -> None:
    """Compute the official rule in full: min(agreeing others / 3, 1), for each nine of the ten people."""
    people = [True] * count + [False] * (10 - count)
    nines = itertools.combinations(people, 9)
    official = sum(min(sum(nine) / 3, 1.0) for nine in nines) / 10
    assert SCORES[min(count, 4)] == pytest.approx(official)


def test_answers_are_counted_in_their_plain_form() -> None:
    assert answer_scores(["Net", "a net", "net.", "mesh", "", "?"]) == {"net": 0.9, "mesh": 0.3}


def test_frequent_answers_keep_the_order_of_appearance() -> None:
    chosen = ["no", "yes", "No.", "2", "two", "yes", "red"]
    assert frequent_answers(chosen, min_count=2) == ("no", "yes", "2")
    assert frequent_answers(["yes"] * 9 + ["no"] * 8) == ("yes",)
