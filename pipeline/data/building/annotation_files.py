"""Importers of the published annotation files of fine-tuning data sets.

    vqa        VQA v2: a questions file, and annotations of ten people each       -> questions, answers.json
    vg_qa      Visual Genome's question_answers.json, one answer each             -> questions, answers.json
    nlvr2      NLVR2's lines of JSON, two images each                              -> statements
    karpathy   Karpathy's dataset_coco.json and dataset_flickr30k.json, by split  -> pairs
    classes    a folder with a folder of images for each class (ImageNet's)        -> labelled, classes.json

Faulty entries and those without an image are recorded in `Problems` and skipped. An image is stored with each question.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.errors import DataError
from pipeline.data.building.files import (
    ImportOptions,
    Keys,
    Problems,
    Sample,
    clean_captions,
    entries_of,
    files_below,
    folders_below,
    json_lines,
    json_of,
    number_in,
    pair_sample,
    pass_over,
    read_image,
    read_listed_image,
    sample_with_json,
    suffix_of,
    text_in,
)
from pipeline.data.contents.choices import (
    ANSWERS,
    CLASSES,
    MIN_COUNT,
    Choices,
    answer_scores,
    frequent_answers,
    plain_answer,
)
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.shards.tar import clean_name

TRAINED_WITH = {"train": ("train", "restval")}  # COCO's other training images have a split of their own
SamplesWithChoices = tuple[Iterator[Sample], dict[str, Choices]]  # the lists of choices by file name


# VQA v2 and Visual Genome's questions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    where: str
    key: str
    text: str
    answers: Mapping[str, float]
    id: int
    image_names: Sequence[str]  # possible names of the image below the images' folder


def vqa_samples(file: Path, problems: Problems, options: ImportOptions) -> SamplesWithChoices:
    """Return the questions of a VQA questions file with the answers of the annotation files.

    The list of answers is made from all annotation files in their order, so that all splits built with the same files
    have the same list: the published one is made from train and val, in this order.
    """
    content = json_of(file)
    files = options.annotations
    if not files:  # VQA's own name for them: v2_mscoco_train2014_annotations.json
        name = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
        files = (file.with_name(name),)
        if files[0] == file or not files[0].exists():
            raise DataError(f"{file}: there is no {name} next to it. Pass --annotations FILE, once for each file")
    questions = entries_of(
        file, "questions", _field(file, "VQA questions file", content, "questions"),
        lambda q: (number_in(q, "question_id"), number_in(q, "image_id"), text_in(q, "question")), problems,
        "'questions' (question_id, image_id, question)",
    )  # fmt: skip
    subtype = str(content.get("data_subtype", ""))

    def read_annotation(annotation: Any) -> tuple[int, str, list[str]]:
        people = [text_in(answer, "answer") for answer in annotation["answers"]]
        most_frequent = Counter(people).most_common(1)[0][0] if people else ""
        chosen = annotation.get("multiple_choice_answer") or most_frequent
        return number_in(annotation, "question_id"), text_in({"answer": chosen}, "answer") if chosen else "", people

    scores: dict[int, dict[str, float]] = {}
    chosen: list[str] = []
    question_ids = {question for question, _, _ in questions}
    for path in files:
        annotations = entries_of(
            path, "annotations", _field(path, "VQA annotations file", json_of(path), "annotations"), read_annotation,
            problems, "'annotations' (question_id, answers: ten times 'answer')",
        )  # fmt: skip
        for question_id, most_chosen, people in annotations:
            chosen.append(most_chosen)
            if question_id in question_ids:
                scores[question_id] = answer_scores(people)

    def read_questions() -> Iterator[_Question]:
        for question_id, image, text in questions:
            where = f"{file}, question {question_id}"
            if not scores.get(question_id):
                problems.add(where, f"it has no answers in {', '.join(map(str, files))}")
                continue
            # COCO's names contain the split in 2014 and 2015, and are the number alone since 2017.
            prefixes = (f"COCO_{subtype}_", f"{subtype}/COCO_{subtype}_", "", f"{subtype}/")
            names = [f"{prefix}{image:012d}.jpg" for prefix in prefixes]
            yield _Question(where, f"{subtype}-{question_id}", text, scores[question_id], question_id, names)

    return _with_answers(file, read_questions(), chosen, problems, options)


def visual_genome_samples(file: Path, problems: Problems, options: ImportOptions) -> SamplesWithChoices:
    """Return Visual Genome's questions; the one answer of each has score 1."""
    images = entries_of(
        file, "images", json_of(file), lambda entry: (number_in(entry, "id"), list(entry["qas"])), problems,
        "a list of images with 'id' and 'qas' (qa_id, question, answer)",
    )  # fmt: skip
    questions = entries_of(
        file, "questions", [(image, qa) for image, qas in images for qa in qas],
        lambda qa: (qa[0], number_in(qa[1], "qa_id"), text_in(qa[1], "question"), text_in(qa[1], "answer")),
        problems, "qa_id, question, answer",
    )  # fmt: skip

    def read_questions() -> Iterator[_Question]:
        for image, question_id, text, answer in questions:
            where = f"{file}, question {question_id}"
            if plain := plain_answer(answer):
                names = [f"{folder}{image}.jpg" for folder in ("", "VG_100K/", "VG_100K_2/")]
                yield _Question(where, f"vg-{question_id}", text, {plain: 1.0}, question_id, names)
            else:
                problems.add(where, "its answer is empty")

    return _with_answers(file, read_questions(), [answer for *_, answer in questions], problems, options)


def _with_answers(
    file: Path, questions: Iterable[_Question], answers: Iterable[str], problems: Problems, options: ImportOptions
) -> SamplesWithChoices:
    """Return the questions' samples, and the list of those of `answers` that are frequent."""
    listed = frequent_answers(answers, options.min_count or MIN_COUNT)
    if not listed:
        raise DataError(
            f"{file}: no answer is frequent enough to be listed; pass --min-count below the published 9, or all "
            "annotation files with --annotations"
        )
    choices = Choices(listed)

    def samples() -> Iterator[Sample]:
        key_of = Keys()
        for question in questions:
            if options.listed_only and not choices.numbered(question.answers):
                problems.leave_out(question.where, "none of its answers is listed")
                continue
            image = read_listed_image(options.images or file.parent, question.image_names, question.where, problems)
            if image is not None:
                record = {"question": question.text, "answers": question.answers, "question_id": question.id}
                yield from sample_with_json(key_of(question.key), image, record, question.where, problems)

    return samples(), {ANSWERS: choices}


def _field(file: Path, file_type: str, content: Any, name: str) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise DataError(f"{file} is not a {file_type}. Expected an object with '{name}'")
    return content[name]


# NLVR2, retrieval and classes ----------------------------------------------------------------------------------------


def nlvr2_samples(file: Path, problems: Problems, options: ImportOptions) -> Iterator[Sample]:
    """Yield NLVR2's statements; the images of dev-850-0-0 are dev-850-0-img0.png (left) and dev-850-0-img1.png."""
    key_of = Keys()
    for where, entry in json_lines(file, problems):
        try:
            name, sentence = text_in(entry, "identifier"), text_in(entry, "sentence").strip()
            label = {"true": True, "false": False}[str(entry["label"]).lower()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            expected = "an object with 'identifier', 'sentence' and 'label' True or False"
            problems.add(where, f"expected {expected} ({type(error).__name__}: {error})")
            continue
        folders = ["", f"{name.partition('-')[0]}/"]
        if (directory := entry.get("directory")) is not None:
            folders += [f"{directory}/", f"{folders[1]}{directory}/"]
        pair = name.rpartition("-")[0]
        images = [
            read_listed_image(
                options.images or file.parent, [f"{folder}{pair}-img{side}.png" for folder in folders], where, problems
            )
            for side in (0, 1)
        ]
        if images[0] is not None and images[1] is not None:
            members = {
                f"{side}.{kind}": data for side, image in enumerate(images) for kind, data in (image or {}).items()
            }
            record = {"sentence": sentence, "label": label, "id": name}
            yield from sample_with_json(key_of(name), members, record, where, problems)


def karpathy_samples(file: Path, problems: Problems, options: ImportOptions) -> Iterator[Sample]:
    """Yield the images of one split, or of all, with their sentences; COCO's `train` includes `restval`."""

    def read(entry: Any) -> tuple[str, str, str, list[Any], int]:
        sentences = [sentence["raw"] for sentence in entry["sentences"]]
        number = number_in(entry, "cocoid" if "cocoid" in entry else "imgid")
        return text_in(entry, "filename"), str(entry.get("filepath", "")), text_in(entry, "split"), sentences, number

    images = entries_of(
        file, "images", _field(file, "Karpathy split file", json_of(file), "images"), read, problems,
        "'images' (filename, split, sentences: 'raw', cocoid or imgid)",
    )  # fmt: skip
    splits = TRAINED_WITH.get(options.split or "", (options.split,))
    counts = Counter(split for _, _, split, _, _ in images)
    if options.split is not None and not any(split in counts for split in splits):
        known = ", ".join(f"{split} ({count})" for split, count in counts.items())
        raise DataError(f"{file}: no image is in split '{options.split}'; expected one of {known}")
    key_of = Keys()
    for name, folder, split, sentences, image_id in images:
        where = f"{file}, image {name}"
        if options.split is not None and split not in splits:
            continue
        if not (captions := clean_captions(sentences, where, problems)):
            continue
        names = [name, f"{folder}/{name}"] if folder else [name]
        image = read_listed_image(options.images or file.parent, names, where, problems)
        if image is not None:
            yield from pair_sample(key_of(Path(name).stem), image, captions, image_id, where, problems)


def class_samples(folder: Path, problems: Problems, _options: ImportOptions) -> SamplesWithChoices:
    """Return the images of a folder of class folders, numbered in the order of their names; images may be nested."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with a folder of images for each class")
    _, classes, others = next(folders_below(folder, problems), (folder, [], []))
    if not classes:
        raise DataError(f"{folder}: it has no folder; expected a folder of images for each class")
    for name in others:
        if suffix_of(name) in EXTENSIONS:
            problems.add(str(folder / name), "it is not in a class folder")
        else:
            pass_over(folder / name, problems)

    def samples() -> Iterator[Sample]:
        key_of = Keys()
        for number, name in enumerate(classes):
            path = None
            for path in files_below(folder / name, EXTENSIONS, problems):
                image = read_image(path, str(path), problems)
                if image is not None:
                    key = key_of(str(path.relative_to(folder).with_suffix("")))
                    yield {"__key__": key, **image, "cls": str(number).encode()}
            if path is None:
                reason = f"it is class {number} without an image; if it is not a class, remove it and build again"
                problems.leave_out(str(folder / name), reason)

    return samples(), {CLASSES: Choices(tuple(clean_name(os.fsencode(name)) for name in classes))}
