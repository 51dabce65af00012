"""What a head chooses among, by name: the answers to questions, the classes of pictures.

A list is a JSON list of texts beside the shards, and goes with the weights that were trained on it. Shards name answers
by their text, so that one folder of shards serves every list.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.shards.manifest import shard_folder
from pipeline.data.storage import NotFound, Storage, join

ANSWERS, CLASSES = "answers.json", "classes.json"


@dataclass(frozen=True)
class Choices:
    """Different texts; the number of each is its place."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def numbered(self, scores: Mapping[str, float]) -> dict[int, float]:
        """The listed ones among scored texts, by number."""
        return {self._numbers[name]: score for name, score in scores.items() if name in self._numbers}

    def to_bytes(self) -> bytes:
        return json.dumps(self.names, ensure_ascii=False, indent=0).encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Choices:
        """Raises ConfigError, with `where` it was read from, for anything but a JSON list of different texts."""
        try:
            names = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is no JSON ({error}); expected a JSON list of texts") from error
        if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
            raise ConfigError(f"{where}: expected a JSON list of texts, as mome shards build writes beside shards")
        try:
            "".join(names).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ConfigError(f"{where}: it holds {half!r}, half a character. Correct it") from error
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ConfigError(f"{where}: {twice!r} is listed more than once")
        return Choices(tuple(names))


def answers_with(choices: Mapping[str, Choices], num_outputs: int | None, where: str) -> Choices:
    """Return the answers that came with weights, which name the `num_outputs` of their head. Raises ConfigError."""
    listed = choices.get(ANSWERS)
    if listed is not None and num_outputs in (None, len(listed)):
        return listed
    found = "came without a list of answers" if listed is None else f"came with a list of {len(listed)} answers"
    raise ConfigError(
        f"{where}: these weights {found} ({ANSWERS}), and their answering head has {num_outputs} outputs to be named. "
        "Import them again with --answers FILE: a JSON list of as many, in the order of the head's outputs"
    )


def load_answers(config: RunConfig, stage: StageConfig, storage: Storage) -> Choices | None:
    """The answers that a stage chooses among; None if it answers nothing.

    Raises ConfigError when the list is missing or is not as long as `answers` says.
    """
    if "vqa" not in stage.objectives:
        return None
    url = stage.answer_list or _beside(config, stage, ANSWERS)
    try:
        found = Choices.from_bytes(storage.read(url), url)
    except NotFound as error:
        raise ConfigError(
            f"stages.{stage.name}.answer_list: there is no {url}; name the list of answers (a JSON list), which "
            "mome shards build writes beside the shards of VQA's questions"
        ) from error
    if len(found) != stage.num_answers:
        raise ConfigError(
            f"stages.{stage.name}.num_answers: {stage.num_answers} given, and {url} lists {len(found)}; set that"
        )
    return found


def load_classes(config: RunConfig, stage: StageConfig, storage: Storage) -> Choices | None:
    """The names of the classes that a stage tells apart; None where its shards have no list of them.

    Raises ConfigError when the list is not as long as `classes` says.
    """
    if "classification" not in stage.objectives:
        return None
    url = _beside(config, stage, CLASSES)
    try:
        found = Choices.from_bytes(storage.read(url), url)
    except NotFound:
        return None
    if len(found) != stage.num_classes:
        raise ConfigError(
            f"stages.{stage.name}.num_classes: {stage.num_classes} given, and {url} lists {len(found)}; set that"
        )
    return found


def choices_of(config: RunConfig, stages: Sequence[StageConfig], storage: Storage) -> dict[str, Choices]:
    """By file name, what the heads choose among that some stages trained, as the last that trained each knew it."""
    found: dict[str, Choices] = {}
    for stage in stages:
        for name, load in ((ANSWERS, load_answers), (CLASSES, load_classes)):
            if (choices := load(config, stage, storage)) is not None:
                found[name] = choices
    return found


def _beside(config: RunConfig, stage: StageConfig, name: str) -> str:
    return join(shard_folder(config.sources[next(iter(stage.sources))].shards), name)
