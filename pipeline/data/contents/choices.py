"""Names that a head chooses among (answers, classes): a JSON list next to the shards, and with the weights trained on
it. Answers are compared and scored as the evaluation of VQA v2 does (arXiv 1612.00837): an answer that c of ten people
gave has the score min(c / 3, 1) over nine of them, averaged over the person left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.shards.manifest import parse_pattern
from pipeline.data.storage import NotFound, Storage, join

ANSWERS, CLASSES = "answers.json", "classes.json"


class Choices(tuple[str, ...]):
    """A list of distinct texts; each is numbered by its index."""

    __slots__ = ()

    def to_bytes(self) -> bytes:
        return json.dumps(self, ensure_ascii=False, indent=0).encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Choices:
        """Parse a JSON list of distinct texts. Raises ConfigError, naming `where`, for anything else."""
        try:
            names = json.loads(data)
            json.dumps(names, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ConfigError(f"{where}: it contains {half!r}, a lone surrogate. Correct it") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error}); expected a JSON list of texts") from error
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{where}: expected a JSON list of texts, as `mome shards build` writes next to shards")
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ConfigError(f"{where}: {twice!r} is listed more than once")
        return Choices(names)


def answers_with(choices: Mapping[str, Choices], num_outputs: int | None, where: str) -> Choices:
    """Return the answers that came with weights, which name the `num_outputs` of their head. Raises ConfigError."""
    if (answers := choices.get(ANSWERS)) is not None and num_outputs in (None, len(answers)):
        return answers
    listed = "came without a list of answers" if answers is None else f"came with a list of {len(answers)} answers"
    raise ConfigError(
        f"{where}: these weights {listed} ({ANSWERS}), but their vqa head has {num_outputs} outputs. Import them again "
        "with --answers FILE: a JSON list with one answer for each output of the head, in their order"
    )


def choices_of(config: RunConfig, stages: Sequence[StageConfig], storage: Storage) -> dict[str, Choices]:
    """Return by file name the answers and class names of the heads that some stages train, from the last stage that
    trains each. Class names are optional. Raises ConfigError for a missing list of answers or a wrong length.
    """
    loaded: dict[str, Choices] = {}
    heads = ("vqa", ANSWERS, "num_answers"), ("classification", CLASSES, "num_classes")
    for stage, (objective, file, key) in product(stages, heads):
        if objective not in stage.objectives:
            continue
        shards = config.sources[next(iter(stage.sources))].shards
        url = (file == ANSWERS and stage.answer_list) or join(parse_pattern(shards).folder, file)
        try:
            choices = Choices.from_bytes(storage.read(url), url)
        except NotFound as error:
            if file == CLASSES:
                continue
            raise ConfigError(
                f"stages.{stage.name}.answer_list: {url} does not exist; set it to a JSON list of answers, which "
                "`mome shards build` writes next to the shards of VQA questions"
            ) from error
        if len(choices) != (expected := getattr(stage, key)):
            raise ConfigError(f"stages.{stage.name}.{key}: {expected}, but {url} lists {len(choices)}; set it to that")
        loaded[file] = choices
    return loaded


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
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTIONS.split() for mark in re.finditer("'", word)
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


def count_answers(answers: Iterable[str]) -> Counter[str]:
    """Count the plain answers, in order of first appearance; empty ones are dropped."""
    return Counter(plain for answer in answers if (plain := plain_answer(answer)))


def answer_scores(answers: Iterable[str]) -> dict[str, float]:
    """Return the soft score of each plain answer among people's answers to one question; empty answers are dropped."""
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in count_answers(answers).items()}
