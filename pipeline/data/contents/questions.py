"""Samples for fine-tuning: questions about an image with scored answers, and statements about two images.

A sample of `questions` is an image with json {"question": "…", "answers": {"text": score}, "question_id": …}; scores
are 0 … 1 (see `choices`). A sample of `statements` is two images, members `0.jpg` and `1.jpg` or `left.jpg` and
`right.jpg` (or another format), with json {"sentence": "…", "label": true, "id": "…"}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.contents.members import Members, is_visible, names_of, record_of
from pipeline.data.quarantine import BadSample

MAX_ANSWERS = 10  # different answers to a question: VQA asks ten people
SIDES = (("0", "left"), ("1", "right"))  # member names of the first and of the second image


@dataclass(frozen=True)
class Question:
    text: str
    answers: Mapping[str, float]  # plain answer -> 0 … 1; at least one
    id: str  # '' if the sample has none


@dataclass(frozen=True)
class Statement:
    text: str
    is_true: bool
    id: str  # '' if the sample has none


def question_of(members: Members) -> Question:
    """Return a sample's question. Raises BadSample when it or its answers are missing, empty or malformed."""
    record = record_of(members)
    answers = record.get("answers")
    if not isinstance(answers, dict) or not answers:
        raise BadSample("answers", 'no answers (json with "answers": {"text": score})')
    if len(answers) > MAX_ANSWERS:
        raise BadSample("answers", f"{len(answers)} answers; expected at most {MAX_ANSWERS}")
    for score in answers.values():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise BadSample("answers", f"the score {score!r:.40} is not a number in 0 … 1")
    return Question(_sentence(record, "question"), answers, str(record.get("question_id", "")))


def statement_of(members: Members) -> Statement:
    """Return a sample's statement. Raises BadSample when the sentence or its label is missing."""
    record = record_of(members)
    label = record.get("label")
    if label not in (True, False):  # 1 and 0 equal them
        raise BadSample("label", f"the label {label!r:.40} is neither true nor false")
    return Statement(_sentence(record, "sentence"), bool(label), str(record.get("id", "")))


def _sentence(record: Mapping[str, Any], key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not is_visible(text := text.strip()):
        raise BadSample("caption", f"no {key} (json with {key!r}: a text)")
    return text


def both_images(members: Members) -> tuple[bytes, bytes]:
    """Return the encoded first and second image. Raises BadSample when one is missing."""
    images = []
    for names in SIDES:
        candidates = (members.get(f"{name}.{extension}") for name in names for extension in EXTENSIONS)
        image = next((data for data in candidates if data is not None), None)
        if image is None:
            expected = " or ".join(f"{name}.jpg" for name in names)
            raise BadSample("members", f"no image {expected} (or png, webp, …); it has {names_of(members)}")
        images.append(image)
    return images[0], images[1]
