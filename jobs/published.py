"""Published checkpoints: a single file of tensors, or a Hugging Face folder with the files next to them.

model.safetensors | pytorch_model.bin            all tensors
model.safetensors.index.json | pytorch_model.bin.index.json    the file of each tensor
config.json                                      the model's sizes and the labels of its head
preprocessor_config.json | processor_config.json image preprocessing
vocab.txt | tokenizer.json                       vocabulary
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError, StorageError
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.text import Tokenizer, stated_lowercase
from pipeline.data.storage import NotFound, Storage, join, split
from pipeline.models.checkpoints.files import Published, read_json, read_tensors

log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"
CONFIG, PROCESSOR, PROCESSORS = "config.json", "preprocessor_config.json", "processor_config.json"
VOCABULARY, TOKENIZER = "vocab.txt", "tokenizer.json"
TRUE = ("true", "yes", "entailment", "1")
UNNAMED = {
    ANSWERS: "the %d answers have no names: give --answers FILE (a JSON list) for mome predict and mome evaluate",
    CLASSES: "the %d classes have no names: mome predict gives their numbers",
}


def read_published(storage: Storage, path: str, hugging_face: bool) -> tuple[Published, str]:
    """Return the tensors at a path and their folder.

    For `hugging_face` formats, config.json and the image processor's config in the folder are read too. Raises
    CheckpointError for missing or damaged files.
    """
    file, folder = _weights_of(storage, path)
    published = _sharded(storage, folder, file) if file.endswith(INDEX) else read_tensors(storage.read(file), file)
    if hugging_face:
        return replace(published, config=_json(storage, folder, CONFIG), processor=_processor(storage, folder)), folder
    return published, folder


def vocabulary_of(storage: Storage, folder: str) -> Tokenizer | None:
    """Return a Hugging Face folder's tokenizer, of its case; None where there is none. CheckpointError if damaged."""
    url = join(folder, VOCABULARY)
    if storage.exists(url):
        return Tokenizer.load(storage, url)
    tokenizer = _json(storage, folder, TOKENIZER)
    if tokenizer is None:
        return None
    model = tokenizer.get("model")
    numbers = model.get("vocab") if isinstance(model, dict) and model.get("type", "WordPiece") == "WordPiece" else None
    is_numbered = isinstance(numbers, dict) and all(type(number) is int for number in numbers.values())
    tokens = {number: token for token, number in numbers.items()} if is_numbered and numbers else {}
    if not tokens or set(tokens) != set(range(len(tokens))):
        raise CheckpointError(
            f"{join(folder, TOKENIZER)}: holds no WordPiece vocabulary; name a vocab.txt with --vocabulary"
        )
    lowercase = stated_lowercase(storage, folder)
    normalizer = tokenizer.get("normalizer")
    if lowercase is None and isinstance(normalizer, dict) and isinstance(normalizer.get("lowercase"), bool):
        lowercase = normalizer["lowercase"]
    return Tokenizer([tokens[number] for number in range(len(tokens))], lowercase)


def _weights_of(storage: Storage, path: str) -> tuple[str, str]:
    """The file of tensors, or their index, that a path means; and its folder."""
    inside = next((join(path, name) for name in WEIGHTS if storage.exists(join(path, name))), None)
    if inside is not None:
        return inside, path.rstrip("/")
    try:
        storage.info(path)
    except StorageError as error:
        if not isinstance(error, NotFound) and not isinstance(error.__cause__, IsADirectoryError):
            raise
        raise CheckpointError(
            f"{path}: no such file, and no folder with {' or '.join(WEIGHTS)}; give a published checkpoint"
        ) from error
    return path, split(path)[0]


def _sharded(storage: Storage, folder: str, index: str) -> Published:
    """Tensors of several files, as an index of Hugging Face spreads them."""
    spread = read_json(storage.read(index), index).get("weight_map")
    if not isinstance(spread, dict) or not spread or not all(_is_plain_name(name) for name in spread.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensors' names to files of the same folder")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(spread.values())):
        url = join(folder, name)
        if not storage.exists(url):
            raise CheckpointError(f"{url}: is missing; {split(index)[1]} names it, so download the folder again")
        tensors |= read_tensors(storage.read(url), url).tensors
    if missing := sorted(spread.keys() - tensors.keys()):
        raise CheckpointError(f"{index}: names {', '.join(missing[:4])}, which its files do not hold")
    return Published(tensors)


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[^/\\\0]{1,255}", name) is not None and name not in (".", "..")


def _json(storage: Storage, folder: str, name: str) -> dict[str, Any] | None:
    url = join(folder, name)
    return read_json(storage.read(url), url) if storage.exists(url) else None


def _processor(storage: Storage, folder: str) -> Mapping[str, Any] | None:
    """Return the image processor's config; newer transformers store all processors in one file."""
    alone = _json(storage, folder, PROCESSOR)
    if alone is not None:
        return alone
    image = (_json(storage, folder, PROCESSORS) or {}).get("image_processor")
    return image if isinstance(image, dict) else None


def choices_of_published(
    storage: Storage,
    published: Published,
    answers: int | None,
    classes: int | None,
    judges_statements: bool,
    answers_file: str | None,
) -> dict[str, Choices]:
    """Return what the heads choose among, by file name: `answers_file`, else the file's own header, else id2label.

    Raises ConfigError for a list that is not as long as its head, and for labels of statements the wrong way round.
    """
    if answers_file is not None and answers is None:
        raise ConfigError(f"--answers {answers_file}: these weights answer no questions; leave --answers out")
    labels = (_numbered((published.config or {}).get("id2label")) or []) if judges_statements else []
    if [label.lower() in TRUE for label in labels] == [True, False]:
        raise ConfigError(
            f"config.json: id2label says that 0 is {labels[0]!r}; in mome, statements are true at 1. Swap the labels "
            "and the two rows of classifier.3"
        )
    choices: dict[str, Choices] = {}
    for name, size in ((ANSWERS, answers), (CLASSES, classes)):
        if size is None:
            continue
        listed: Choices | None
        if name == ANSWERS and answers_file is not None:
            listed, where = _answers_in(storage, answers_file), f"--answers {answers_file}"
        elif name in published.metadata:
            listed, where = Choices.from_bytes(published.metadata[name].encode(), name), "the file's header"
        else:
            listed, where = _labels(published.config or {}, size), "config.json: id2label"
        if listed is None:
            log.warning("%s", UNNAMED[name] % size)
            continue
        if len(listed) != size:
            raise ConfigError(
                f"{where}: names {len(listed)}, the head has {size} outputs; give the list that it was trained with"
            )
        choices[name] = listed
    return choices


def _answers_in(storage: Storage, url: str) -> Choices:
    """A JSON list, a JSON object of answers and their numbers (either way round), or one answer a line."""
    try:
        data = storage.read(url)
    except NotFound as error:
        raise ConfigError(
            f"--answers {url}: no such file; give a JSON list of answers, or one answer a line"
        ) from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] in (b"[", b"{"):
            raise ConfigError(
                f"--answers {url}: is no JSON ({error}); give a JSON list, or one answer a line"
            ) from error
        try:
            value = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise ConfigError(f"--answers {url}: is no UTF-8 text ({error}); give a JSON list of answers") from error
    if isinstance(value, dict):
        by_number = {number: answer for answer, number in value.items() if isinstance(number, int | str)}
        value = _numbered(value) or _numbered(by_number)
    return Choices.from_bytes(json.dumps(value).encode(), f"--answers {url}")


def _labels(config: Mapping[str, Any], size: int) -> Choices | None:
    """The names in a config.json's id2label; None where it has none for this head, or only made-up ones."""
    names = _numbered(config.get("id2label"))
    if names is None or len(names) != size or names == [f"LABEL_{number}" for number in range(size)]:
        return None
    used: set[str] = set()
    distinct = []
    for number, name in enumerate(names):  # ImageNet has two classes called "crane"
        distinct.append(name if name not in used else f"{name} ({number})")
        used.add(distinct[-1])
    where = "config.json: id2label"
    return Choices.from_bytes(json.dumps(distinct).encode(), where) if len(used) == size else None


def _numbered(value: Any) -> list[str] | None:
    """The texts of an object that numbers them from 0, in order; None for anything else."""
    if not isinstance(value, dict) or not value or not all(isinstance(text, str) for text in value.values()):
        return None
    numbers = {str(number): text for number, text in value.items()}
    in_order = [numbers.get(str(number)) for number in range(len(value))]
    return None if None in in_order else [text for text in in_order if text is not None]
