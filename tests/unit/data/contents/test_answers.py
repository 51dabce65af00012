"""Answers in the plain form that VQA's evaluation compares, and what ten people's answers make each one worth."""

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
        ("yes, it is", "yes it is"),  # a mark at a word's edge goes
        ("black/white", "black white"),  # one between words parts them
        ("1,000", "1000"),
        ("3.50", "3.50"),
        ("no.", "no"),
        ("?", ""),
    ],
)
def test_an_answer_is_compared_in_its_plain_form(said: str, plain: str) -> None:
    assert plain_answer(said) == plain


def test_the_plain_form_of_a_plain_answer_is_itself() -> None:
    for said in ("black white", "don't know", "2", "3.50", "teddy bear", "y'all'd've"):
        assert plain_answer(plain_answer(said)) == plain_answer(said)


@pytest.mark.parametrize("count", range(11))
def test_scores_are_the_official_accuracy_averaged_over_nine_of_ten_people(count: int) -> None:
    """The evaluation's own rule, min(others who agree / 3, 1) for each nine of the ten, computed in full."""
    people = [True] * count + [False] * (10 - count)
    nines = itertools.combinations(people, 9)
    official = sum(min(sum(nine) / 3, 1.0) for nine in nines) / 10
    assert SCORES[min(count, 4)] == pytest.approx(official)


def test_answers_that_differ_only_in_form_count_together() -> None:
    assert answer_scores(["Net", "a net", "net.", "mesh", "", "?"]) == {"net": 0.9, "mesh": 0.3}


def test_listed_answers_are_the_frequent_ones_in_the_order_of_their_first_appearance() -> None:
    chosen = ["no", "yes", "No.", "2", "two", "yes", "red"]
    assert frequent_answers(chosen, min_count=2) == ("no", "yes", "2")
    assert frequent_answers(["yes"] * 9 + ["no"] * 8) == ("yes",)
