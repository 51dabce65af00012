"""The annotation files of fine-tuning's data sets, as they are published, to samples.

    vqa        VQA v2: a questions file, and annotations of ten people each       -> questions, answers.json
    vg_qa      Visual Genome's question_answers.json, one answer each             -> questions, answers.json
    nlvr2      NLVR2's lines of JSON, two images each                           -> statements
    karpathy   Karpathy's dataset_coco.json and dataset_flickr30k.json, by split  -> pairs
    classes    a folder with a folder of images for each class (ImageNet's)     -> labelled, classes.json

What is bad or has no image is told to `Problems` and left out. A question's image is stored with each question.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.config.errors import DataError
from pipeline.data.building.files import (
    Problems,
    Sample,
    beginning_of,
    clean_captions,
    clean_lines,
    entries_of,
    files_below,
    folders_below,
    json_of,
    number_in,
    pass_over,
    read_image,
    read_listed_image,
    suffix_of,
    text_in,
)
from pipeline.data.building.importers import Keys, described_sample, pair_sample
from pipeline.data.contents.answers import answer_scores, frequent_answers, plain_answer
from pipeline.data.contents.choices import ANSWERS, CLASSES, Choices
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.shards.tar import clean_name

AnnotationKind = Literal["vqa", "vg_qa", "nlvr2", "karpathy", "classes"]
KINDS: tuple[AnnotationKind, ...] = get_args(AnnotationKind)
TRAINED_WITH = {"train": ("train", "restval")}  # Karpathy's split of COCO keeps more of its training images apart


@dataclass(frozen=True)
class Options:
    """What the kinds need besides their file; those that do not need it leave it."""

    images: Path | None = None  # the folder that images are in; None: the file's own
    annotations: tuple[Path, ...] = ()  # vqa: files of answers; none: found by the questions file's name
    split: str | None = None  # karpathy: which images; None: all
    listed_only: bool = False  # vqa, vg_qa: leave out questions that no listed answer is right for
    min_count: int | None = None  # vqa, vg_qa: how often a listed answer is at least given; None: as published, 9


@dataclass(frozen=True)
class Annotations:
    """Samples, read as they are asked for, and what goes next to their shards, by file name."""

    samples: Iterator[Sample]
    choices: Mapping[str, Choices]


def find_annotations(source: Path) -> AnnotationKind | None:
    """The kind of an annotation file, by its beginning; None for what is none (a folder is not looked into)."""
    if not source.is_file() or source.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
        return None
    begin = beginning_of(source)
    signs: dict[AnnotationKind, tuple[str, ...]] = {
        "vg_qa": (r'"qas"\s*:', r'"qa_id"\s*:'),
        "vqa": (r'"questions"\s*:\s*\[',),
        "karpathy": (r'"sentences"\s*:', r'"split"\s*:', r'"filename"\s*:'),
        "nlvr2": (r'"sentence"\s*:', r'"identifier"\s*:', r'"label"\s*:'),
    }
    return next((kind for kind, all_of in signs.items() if all(re.search(each, begin) for each in all_of)), None)


def read_annotations(source: Path, kind: AnnotationKind, problems: Problems, options: Options) -> Annotations:
    """Raises DataError when the source is missing or no such file, and for lists that would be empty."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder on this machine. Check the path")
    readers: dict[AnnotationKind, Callable[[Path, Problems, Options], Annotations]] = {
        "vqa": vqa_samples,
        "vg_qa": visual_genome_samples,
        "nlvr2": nlvr2_samples,
        "karpathy": karpathy_samples,
        "classes": class_samples,
    }
    return readers[kind](source, problems, options)


# VQA v2 and Visual Genome's questions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    where: str
    key: str
    question: str
    answers: Mapping[str, float]
    question_id: int | str
    pictures: Sequence[str]  # names that the image may have below the images' folder


def vqa_samples(file: Path, problems: Problems, options: Options) -> Annotations:
    """The questions of one of VQA's questions files, with the answers that its annotations file gives.

    The list of answers is made of all annotation files given, in their order, so that every split that is built with
    the same files gets the same list: the published one is of train's and val's, in this order.
    """
    content = json_of(file)
    files = options.annotations or (_annotations_beside(file),)
    questions = entries_of(
        file, "questions", _field(file, "VQA questions file", content, "questions"),
        lambda q: (number_in(q, "question_id"), number_in(q, "image_id"), text_in(q, "question")), problems,
        "'questions' (question_id, image_id, question)",
    )  # fmt: skip
    subtype = str(content.get("data_subtype", ""))
    given: dict[int, dict[str, float]] = {}
    chosen: list[str] = []
    wanted = {question for question, _, _ in questions}
    for each in files:
        annotations = entries_of(
            each, "annotations", _field(each, "VQA annotations file", json_of(each), "annotations"), _vqa_answers,
            problems, "'annotations' (question_id, answers: ten times 'answer')",
        )  # fmt: skip
        for question_id, most_chosen, people in annotations:
            chosen.append(most_chosen)
            if question_id in wanted:
                given[question_id] = answer_scores(people)

    def asked() -> Iterator[_Asked]:
        for question_id, image, text in questions:
            where = f"{file}, question {question_id}"
            if not given.get(question_id):
                problems.add(where, f"no answers to it in {', '.join(str(each) for each in files)}")
                continue
            names = _coco_names(subtype, image)
            yield _Asked(where, f"{subtype}-{question_id}", text, given[question_id], question_id, names)

    return _questions(file, asked(), frequent_answers(chosen, *_count(options)), problems, options)


def _vqa_answers(annotation: Any) -> tuple[int, str, list[str]]:
    people = [text_in(answer, "answer") for answer in annotation["answers"]]
    chosen = annotation.get("multiple_choice_answer") or _most_given(people)
    return number_in(annotation, "question_id"), text_in({"answer": chosen}, "answer") if chosen else "", people


def visual_genome_samples(file: Path, problems: Problems, options: Options) -> Annotations:
    """Visual Genome's questions; each has one answer, which is right."""
    pictures = entries_of(
        file, "pictures", json_of(file), lambda picture: (number_in(picture, "id"), list(picture["qas"])), problems,
        "a list of images with 'id' and 'qas' (qa_id, question, answer)",
    )  # fmt: skip
    found = entries_of(
        file, "questions", [(image, qa) for image, qas in pictures for qa in qas],
        lambda one: (one[0], number_in(one[1], "qa_id"), text_in(one[1], "question"), text_in(one[1], "answer")),
        problems, "qa_id, question, answer",
    )  # fmt: skip

    def asked() -> Iterator[_Asked]:
        for image, question_id, text, answer in found:
            where = f"{file}, question {question_id}"
            if plain := plain_answer(answer):
                names = [f"{folder}{image}.jpg" for folder in ("", "VG_100K/", "VG_100K_2/")]
                yield _Asked(where, f"vg-{question_id}", text, {plain: 1.0}, question_id, names)
            else:
                problems.add(where, "its answer is empty")

    listed = frequent_answers((answer for _, _, _, answer in found), *_count(options))
    return _questions(file, asked(), listed, problems, options)


def _questions(
    file: Path, asked: Iterable[_Asked], listed: tuple[str, ...], problems: Problems, options: Options
) -> Annotations:
    if not listed:
        raise DataError(
            f"{file}: no answer is given often enough to be listed; give --min-count below the published 9, or all "
            "annotation files with --annotations"
        )
    choices = Choices(listed)
    root = options.images or file.parent
    key_of = Keys()

    def samples() -> Iterator[Sample]:
        for one in asked:
            if options.listed_only and not choices.numbered(one.answers):
                problems.leave_out(one.where, "none of its answers is listed")
                continue
            image = read_listed_image(root, one.pictures, one.where, problems)
            if image is not None:
                described = {"question": one.question, "answers": one.answers, "question_id": one.question_id}
                yield from described_sample(key_of(one.key), image, described, one.where, problems)

    return Annotations(samples(), {ANSWERS: choices})


def _coco_names(subtype: str, image: int) -> list[str]:
    """What COCO names an image: in 2014 and 2015 with its split, from 2017 on by its number alone."""
    names = [f"{image:012d}.jpg", f"{subtype}/{image:012d}.jpg"]
    return [f"COCO_{subtype}_{image:012d}.jpg", f"{subtype}/COCO_{subtype}_{image:012d}.jpg", *names]


def _annotations_beside(questions: Path) -> Path:
    """VQA's own names: v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    found = questions.with_name(name)
    if found == questions or not found.exists():
        raise DataError(
            f"{questions}: no answers next to it (looked for {name}). Give --annotations FILE, for each file"
        )
    return found


def _most_given(people: Sequence[str]) -> str:
    return Counter(people).most_common(1)[0][0] if people else ""


def _count(options: Options) -> tuple[int, ...]:
    return () if options.min_count is None else (options.min_count,)


# NLVR2 ----------------------------------------------------------------------------------------------------------------


def nlvr2_samples(file: Path, problems: Problems, options: Options) -> Annotations:
    """NLVR2's lines; the images of dev-850-0-0 are dev-850-0-img0.png and dev-850-0-img1.png, the left one first."""
    root = options.images or file.parent
    key_of = Keys()

    def samples() -> Iterator[Sample]:
        for where, record in _lines(file, problems):
            try:
                name, sentence = text_in(record, "identifier"), text_in(record, "sentence").strip()
                label = {"true": True, "false": False}[str(record["label"]).lower()]
            except (KeyError, TypeError, ValueError) as error:
                expected = "an object with 'identifier', 'sentence' and 'label' True or False"
                problems.add(where, f"expected {expected} ({type(error).__name__}: {error})")
                continue
            names = [_nlvr2_names(name, record.get("directory"), side) for side in (0, 1)]
            images = [read_listed_image(root, each, where, problems) for each in names]
            if images[0] is not None and images[1] is not None:
                both = {
                    f"{side}.{kind}": data for side, image in enumerate(images) for kind, data in (image or {}).items()
                }
                described = {"sentence": sentence, "label": label, "id": name}
                yield from described_sample(key_of(name), both, described, where, problems)

    return Annotations(samples(), {})


def _nlvr2_names(identifier: str, directory: Any, side: int) -> list[str]:
    picture = f"{identifier.rpartition('-')[0]}-img{side}.png"
    split = identifier.partition("-")[0]
    folders = ["", f"{split}/", *([f"{directory}/", f"{split}/{directory}/"] if directory is not None else [])]
    return [f"{folder}{picture}" for folder in folders]


# Retrieval and classes ------------------------------------------------------------------------------------------------


def _karpathy_picture(entry: Any) -> tuple[str, str, str, list[Any], int]:
    sentences = [sentence["raw"] for sentence in entry["sentences"]]
    number = number_in(entry, "cocoid" if "cocoid" in entry else "imgid")
    return text_in(entry, "filename"), str(entry.get("filepath", "")), text_in(entry, "split"), sentences, number


def karpathy_samples(file: Path, problems: Problems, options: Options) -> Annotations:
    """Images of one split, or of all, with their sentences. COCO's `train` brings its `restval`, as in the papers."""
    content = json_of(file)
    pictures = entries_of(
        file, "images", _field(file, "Karpathy split file", content, "images"), _karpathy_picture, problems,
        "'images' (filename, split, sentences: 'raw', cocoid or imgid)",
    )  # fmt: skip
    splits = TRAINED_WITH.get(options.split or "", (options.split,))
    there = Counter(split for _, _, split, _, _ in pictures)
    if options.split is not None and not any(split in there for split in splits):
        told = ", ".join(f"{split} ({count})" for split, count in there.items())
        raise DataError(f"{file}: no image is of split '{options.split}'; its splits: {told}")
    root = options.images or file.parent
    key_of = Keys()

    def samples() -> Iterator[Sample]:
        for name, folder, split, sentences, image_id in pictures:
            if options.split is not None and split not in splits:
                continue
            where = f"{file}, image {name}"
            if not (said := clean_captions(sentences, where, problems)):
                continue
            image = read_listed_image(root, [name, f"{folder}/{name}"] if folder else [name], where, problems)
            if image is not None:
                yield from pair_sample(key_of(Path(name).stem), image, said, image_id, where, problems)

    return Annotations(samples(), {})


def class_samples(folder: Path, problems: Problems, options: Options) -> Annotations:
    """A folder's folders are the classes, numbered in the order of their names; images may lie deeper."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with a folder of images for each class")
    _, classes, others = next(folders_below(folder, problems), (folder, [], []))
    if not classes:
        raise DataError(f"{folder}: no folder in it; expected one of images for each class")
    for name in others:
        if suffix_of(name) in EXTENSIONS:
            problems.add(str(folder / name), "it lies in no class's folder")
        else:
            pass_over(folder / name, problems)
    key_of = Keys()

    def samples() -> Iterator[Sample]:
        for number, name in enumerate(classes):
            path = None
            for path in files_below(folder / name, EXTENSIONS, problems):
                image = read_image(path, str(path), problems)
                if image is not None:
                    key = key_of(str(path.relative_to(folder).with_suffix("")))
                    yield {"__key__": key, **image, "cls": str(number).encode()}
            if path is None:
                told = f"it is class {number} without an image; if it is no class, move it away and build again"
                problems.leave_out(str(folder / name), told)

    names = tuple(clean_name(os.fsencode(name)) for name in classes)
    return Annotations(samples(), {CLASSES: Choices(names)})


# Files ----------------------------------------------------------------------------------------------------------------


def _field(file: Path, what: str, content: Any, name: str) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise DataError(f"{file} is no {what}. Expected an object with '{name}'")
    return content[name]


def _lines(file: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    for where, line in clean_lines(file, problems):
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"not JSON ({error})")
