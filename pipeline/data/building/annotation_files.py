"""Importers of the published annotation files of fine-tuning data sets.

    vqa        VQA v2: a questions file, and annotations of ten people each       -> questions, answers.json
    vg_qa      Visual Genome's question_answers.json, one answer each             -> questions, answers.json
    nlvr2      NLVR2's lines of JSON, two images each                              -> statements
    karpathy   Karpathy's dataset_coco.json and dataset_flickr30k.json, by split  -> pairs
    coco       COCO's captions: `images`, `annotations`                            -> pairs
    classes    a folder with a folder of images for each class (ImageNet's)        -> labelled, classes.json

Faulty entries and those without an image are recorded in `Problems` and skipped. An image is stored with each question.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.errors import DataError
from pipeline.data.building import inputs
from pipeline.data.building.inputs import Import, Sample, Unusable
from pipeline.data.contents import choices
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.shards.tar import clean_name

TRAINED_WITH = {"train": ("train", "restval")}  # COCO's other training images have a split of their own


class Question(NamedTuple):
    """A question, the scores of its answers, and the possible names of its image."""

    id: int
    text: str
    answers: Mapping[str, float]
    image_names: list[str]


def vqa_samples(job: Import) -> Iterator[Sample]:
    """Return the questions of a VQA questions file with the answers of the annotation files.

    The list of answers is made from all annotation files in their order, so that all splits built with the same files
    have the same list: the published one is made from train and val, in this order.
    """
    file, files = job.source, job.options.annotations
    content = inputs.json_of(file, "VQA questions file", "questions")
    if not files:  # VQA's own name for them: v2_mscoco_train2014_annotations.json
        name = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
        files = (file.with_name(name),)
        if files[0] == file or not files[0].exists():
            raise DataError(f"{file}: there is no {name} next to it. Pass --annotations FILE, once for each file")
    form = "'questions' (question_id, image_id, question)"
    read_question = inputs.fields(question_id=int, image_id=int, question=str)
    questions = inputs.entries_of(file, "questions", content["questions"], read_question, job.problems, form)
    id_of, answer_of = inputs.fields(question_id=int), inputs.fields(answer=str)

    def read_annotation(entry: Any) -> tuple[int, str, list[str]]:
        people = [text for answer in entry["answers"] for text in answer_of(answer)]
        most_frequent = Counter(people).most_common(1)[0][0] if people else ""
        chosen = entry.get("multiple_choice_answer") or most_frequent
        return *id_of(entry), *(answer_of({"answer": chosen}) if chosen else [""]), people

    scores: dict[int, dict[str, float]] = {}
    chosen: list[str] = []
    question_ids = {question for question, _, _ in questions}
    for path in files:
        annotations = inputs.json_of(path, "VQA annotations file", "annotations")["annotations"]
        form = "'annotations' (question_id, answers: ten times 'answer')"
        entries = inputs.entries_of(path, "annotations", annotations, read_annotation, job.problems, form)
        chosen += [answer for _, answer, _ in entries]
        scores |= {number: choices.answer_scores(people) for number, _, people in entries if number in question_ids}
    # COCO's names contain the split in 2014 and 2015, and are the number alone since 2017.
    subtype = str(content.get("data_subtype", ""))
    prefixes = (f"COCO_{subtype}_", f"{subtype}/COCO_{subtype}_", "", f"{subtype}/")
    with_answers = (
        Question(number, text, scores.get(number, {}), [f"{prefix}{image:012d}.jpg" for prefix in prefixes])
        for number, image, text in questions
    )
    return _with_answers(job, with_answers, chosen, subtype, f"it has no answers in {', '.join(map(str, files))}")


def visual_genome_samples(job: Import) -> Iterator[Sample]:
    """Return Visual Genome's questions; the one answer of each has score 1."""
    file, content = job.source, inputs.json_of(job.source)
    form = "a list of images with 'id' and 'qas' (qa_id, question, answer)"
    images = inputs.entries_of(file, "images", content, inputs.fields(id=int, qas=list), job.problems, form)
    entries = []
    for image, qas in images:
        for entry in qas:
            if isinstance(entry, dict):  # others are reported below
                entry["image"] = image
            entries.append(entry)
    read_question = inputs.fields(image=int, qa_id=int, question=str, answer=str)
    questions = inputs.entries_of(file, "questions", entries, read_question, job.problems, "qa_id, question, answer")
    folders = ("", "VG_100K/", "VG_100K_2/")
    with_answers = (
        Question(number, text, {plain: 1.0} if plain else {}, [f"{folder}{image}.jpg" for folder in folders])
        for image, number, text, answer in questions
        for plain in [choices.plain_answer(answer)]
    )
    return _with_answers(job, with_answers, [answer for *_, answer in questions], "vg", "its answer is empty")


def _with_answers(
    job: Import, questions: Iterable[Question], answers: list[str], prefix: str, unanswered: str
) -> Iterator[Sample]:
    """Return the questions' samples, and list those of `answers` that are frequent."""
    listed = choices.frequent_answers(answers, job.options.min_count or choices.MIN_COUNT)
    if not listed:
        raise DataError(
            f"{job.source}: no answer is frequent enough to be listed; pass --min-count below the published 9, or all "
            "annotation files with --annotations"
        )
    job.choices[choices.ANSWERS], known = Choices(listed), frozenset(listed)

    def samples() -> Iterator[Sample]:
        for question in questions:
            where = f"{job.source}, question {question.id}"
            with job.problems.skipping(where):
                if not question.answers:
                    raise Unusable(unanswered)
                if job.options.listed_only and known.isdisjoint(question.answers):
                    job.problems.leave_out(where, "none of its answers is listed")
                    continue
                record = {"question": question.text, "answers": question.answers, "question_id": question.id}
                yield job.sample(f"{prefix}-{question.id}", job.image(*question.image_names), record)

    return samples()


def nlvr2_samples(job: Import) -> Iterator[Sample]:
    """Yield NLVR2's statements; the images of dev-850-0-0 are dev-850-0-img0.png (left) and dev-850-0-img1.png."""
    form = "an object with 'identifier', 'sentence' and 'label' True or False"
    read_statement = inputs.fields(identifier=str, sentence=str)
    for where, entry in inputs.json_lines(job.source, job.problems):
        with job.problems.skipping(where):
            with inputs.expecting(form):
                name, sentence = read_statement(entry)
                label = {"true": True, "false": False}[str(entry["label"]).lower()]
                pair, directory = name.rpartition("-")[0], entry.get("directory")
            split = name.partition("-")[0]
            folders = ["", f"{split}/", *([] if directory is None else [f"{directory}/", f"{split}/{directory}/"])]
            members: inputs.Files = {}
            for side in (0, 1):
                image = job.image(*(f"{folder}{pair}-img{side}.png" for folder in folders))
                members |= {f"{side}.{extension}": data for extension, data in image.items()}
            yield job.sample(name, members, {"sentence": sentence.strip(), "label": label, "id": name})


def karpathy_samples(job: Import) -> Iterator[Sample]:
    """Yield the images of one split, or of all, with their sentences; COCO's `train` includes `restval`."""
    file, chosen = job.source, job.options.split

    def read(entry: Any) -> tuple[str, str, int, str, list[Any]]:
        sentences = [sentence["raw"] for sentence in entry["sentences"]]
        values = inputs.fields(filename=str, split=str, **{"cocoid" if "cocoid" in entry else "imgid": int})(entry)
        return *values, str(entry.get("filepath", "")), sentences

    listed = inputs.json_of(file, "Karpathy split file", "images")["images"]
    form = "'images' (filename, split, sentences: 'raw', cocoid or imgid)"
    images = inputs.entries_of(file, "images", listed, read, job.problems, form)
    counts = Counter(split for _, split, *_ in images)
    splits = set(counts) if chosen is None else set(TRAINED_WITH.get(chosen, (chosen,)))
    if chosen is not None and splits.isdisjoint(counts):
        known = ", ".join(f"{split} ({count})" for split, count in counts.items())
        raise DataError(f"{file}: no image is in split '{chosen}'; expected one of {known}")
    for name, split, image_id, folder, sentences in images:
        where = f"{file}, image {name}"
        if split in splits:
            with job.problems.skipping(where):
                captions = inputs.clean_captions(sentences, where, job.problems)
                image = job.image(*([name, f"{folder}/{name}"] if folder else [name]))
                yield job.pair(Path(name).stem, image, captions, image_id)


def coco_samples(job: Import) -> Iterator[Sample]:
    """Yield the images of a COCO caption file with their captions."""
    file, problems = job.source, job.problems
    form = "'images' (id, file_name) and 'annotations' (image_id, caption)"
    content = inputs.json_of(file, "COCO caption file", "images", "annotations")
    read_image, read_caption = inputs.fields(id=int, file_name=str), inputs.fields(image_id=int, caption=str)
    listed = inputs.entries_of(file, "images", content["images"], read_image, problems, form)
    annotations = inputs.entries_of(file, "annotations", content["annotations"], read_caption, problems, form)
    names: dict[int, str] = {}
    for image_id, name in listed:
        if image_id in names:
            problems.add(f"{file}, image {image_id}", f"its id occurs twice; {name} is skipped")
        else:
            names[image_id] = name
    captions: dict[int, list[str]] = {}
    for image_id, caption in annotations:
        if image_id not in names:
            problems.leave_out(f"{file}, caption of image {image_id}", "no image of this id is listed")
        captions.setdefault(image_id, []).append(caption)
    for image_id, name in names.items():
        where = f"{file}, image {image_id}"
        with problems.skipping(where):
            texts = inputs.clean_captions(captions.get(image_id, []), where, problems)
            yield job.pair(os.path.splitext(name)[0], job.image(name), texts, image_id)


def class_samples(job: Import) -> Iterator[Sample]:
    """Return the images of a folder of class folders, numbered in the order of their names; images may be nested."""
    folder, problems = job.source, job.problems
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with a folder of images for each class")
    _, classes, others = next(inputs.folders_below(folder, problems), (folder, [], []))
    if not classes:
        raise DataError(f"{folder}: it has no folder; expected a folder of images for each class")
    for name in others:
        if inputs.suffix_of(name) in EXTENSIONS:
            problems.add(str(folder / name), "it is not in a class folder")
        else:
            problems.pass_over(folder / name)
    job.choices[choices.CLASSES] = Choices(tuple(clean_name(os.fsencode(name)) for name in classes))

    def samples() -> Iterator[Sample]:
        for number, name in enumerate(classes):
            path = None
            for path in inputs.files_below(folder / name, EXTENSIONS, problems):
                with problems.skipping(str(path)):
                    image = inputs.encoded_image(inputs.read_file(path), str(path))
                    key = job.key_of(str(path.relative_to(folder).with_suffix("")))
                    yield {"__key__": key, **image, "cls": str(number).encode()}
            if path is None:
                reason = f"it is class {number} without an image; if it is not a class, remove it and build again"
                problems.leave_out(str(folder / name), reason)

    return samples()
