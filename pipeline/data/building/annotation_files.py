"""Importers of the published annotation files of fine-tuning data sets.

    vqa        VQA v2: a questions file, and annotations of ten people each       -> questions, answers.json
    vg_qa      Visual Genome's question_answers.json, one answer each             -> questions, answers.json
    vg_regions Visual Genome's region_descriptions.json, many phrases an image     -> pairs
    nlvr2      NLVR2's lines of JSON, two images each                              -> statements
    karpathy   Karpathy's dataset_coco.json and dataset_flickr30k.json, by split  -> pairs
    coco       COCO's captions: `images`, `annotations`                            -> pairs
    classes    a folder with a folder of images for each class (ImageNet's)        -> labelled, classes.json

Faulty entries and those without an image are recorded in `Problems` and skipped. An image is stored with each question.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.errors import DataError
from pipeline.data.building import inputs
from pipeline.data.building.inputs import Import, Sample, Unusable
from pipeline.data.contents import choices
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.shards.tar import clean_name

VG_FOLDERS = ("", "VG_100K/", "VG_100K_2/")  # of images.zip and images2.zip
TRAINED_WITH = {"train": ("train", "restval")}  # COCO's other training images have a split of their own


Question = tuple[int, str, Mapping[str, float], list[str]]  # its id, text, scored answers, and possible image names


def vqa_samples(job: Import) -> Iterator[Sample]:
    """Yield VQA's questions with their answers. Those listed are of all annotation files (published: train, val)."""
    file, files = job.source, job.options.annotations
    content = inputs.json_of(file, "VQA questions file", "questions")
    if not files:  # VQA's own name for them: v2_mscoco_train2014_annotations.json
        name = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
        files = (file.with_name(name),)
        if files[0] == file or not files[0].exists():
            raise DataError(f"{file}: there is no {name} next to it. Pass --annotations FILE, once for each file")
    form = "'questions' (question_id, image_id, question)"
    read_question = partial(inputs.fields, question_id=int, image_id=int, question=str)
    questions = inputs.entries_of(file, "questions", content["questions"], read_question, job.problems, form)

    def read_annotation(entry: Any) -> tuple[int, str, list[str]]:
        people = [text for answer in entry["answers"] for text in inputs.fields(answer, answer=str)]
        most_frequent = Counter(people).most_common(1)[0][0] if people else ""
        chosen = entry.get("multiple_choice_answer") or most_frequent
        if chosen:
            inputs.fields({"answer": chosen}, answer=str)
        return *inputs.fields(entry, question_id=int), chosen, people

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
        (number, text, scores.get(number, {}), [f"{prefix}{image:012d}.jpg" for prefix in prefixes])
        for number, image, text in questions
    )
    yield from _with_answers(job, with_answers, chosen, subtype, f"it has no answers in {', '.join(map(str, files))}")


def visual_genome_samples(job: Import) -> Iterator[Sample]:
    """Yield Visual Genome's questions; the one answer of each has score 1."""
    form = "a list of images with 'id' and 'qas' (qa_id, question, answer)"
    read = partial(inputs.fields, id=int, qas=list)
    images = inputs.entries_of(job.source, "images", inputs.json_of(job.source), read, job.problems, form)
    entries = [{**qa, "image": image} if isinstance(qa, dict) else qa for image, qas in images for qa in qas]
    read = partial(inputs.fields, image=int, qa_id=int, question=str, answer=str)
    questions = inputs.entries_of(job.source, "questions", entries, read, job.problems, "qa_id, question, answer")
    with_answers = (
        (number, text, {plain: 1.0} if plain else {}, [f"{folder}{image}.jpg" for folder in VG_FOLDERS])
        for image, number, text, answer in questions
        for plain in [choices.plain_answer(answer)]
    )
    answers = [answer for *_, answer in questions]
    yield from _with_answers(job, with_answers, answers, "vg", "its answer is empty")


def visual_genome_captions(job: Import) -> Iterator[Sample]:
    """Yield Visual Genome's images with the phrases of all their regions as captions."""

    def read(entry: Any) -> tuple[int, list[Any]]:
        regions = inputs.fields(entry, regions=list)[0]  # the file has `id`, its documentation `image_id`
        return *inputs.fields({"id": entry.get("id", entry.get("image_id"))}, id=int), [r["phrase"] for r in regions]

    form = "a list of images with 'id' and 'regions' (phrase)"
    for number, phrases in inputs.entries_of(
        job.source, "images", inputs.json_of(job.source), read, job.problems, form
    ):
        where = f"{job.source}, image {number}"
        with job.problems.skipping(where):
            captions = inputs.clean_captions(phrases, where, job.problems)
            image = inputs.encoded_image(job.find(*(f"{folder}{number}.jpg" for folder in VG_FOLDERS)))
            yield job.pair(f"vg-{number}", image, captions)


def _with_answers(
    job: Import, questions: Iterable[Question], answers: list[str], prefix: str, unanswered: str
) -> Iterator[Sample]:
    """List those of `answers` that are frequent, in order of first appearance, and yield the questions' samples."""
    min_count = job.options.min_count or choices.MIN_COUNT
    listed = tuple(answer for answer, count in choices.count_answers(answers).items() if count >= min_count)
    if not listed:
        remedy = "pass --min-count below the published 9, or all annotation files with --annotations"
        raise DataError(f"{job.source}: no answer is frequent enough to be listed; {remedy}")
    job.choices[choices.ANSWERS], known = choices.Choices(listed), frozenset(listed)
    for number, text, scored, image_names in questions:
        where = f"{job.source}, question {number}"
        with job.problems.skipping(where):
            if not scored:
                raise Unusable(unanswered)
            if job.options.listed_only and known.isdisjoint(scored):
                job.problems.add(where, "none of its answers is listed", is_fault=False)
                continue
            record = {"question": text, "answers": scored, "question_id": number}
            yield job.sample(f"{prefix}-{number}", inputs.encoded_image(job.find(*image_names)), record)


def nlvr2_samples(job: Import) -> Iterator[Sample]:
    """Yield NLVR2's statements; the images of dev-850-0-0 are dev-850-0-img0.png (left) and dev-850-0-img1.png."""
    lines = ((where, (where, entry)) for where, entry in inputs.json_lines(job.source, job.problems))

    def read(line: tuple[str, Any]) -> tuple[Any, ...]:
        return line[0], *inputs.fields(line[1], identifier=str, sentence=str, label=bool, directory=object)

    form = "an object with 'identifier', 'sentence' and 'label' True or False"
    statements = inputs.entries_of(job.source, "lines", lines, read, job.problems, form)
    for where, name, sentence, label, directory in statements:
        with job.problems.skipping(where):
            pair, split = name.rpartition("-")[0], name.partition("-")[0]
            folders = ["", f"{split}/", *([] if directory is None else [f"{directory}/", f"{split}/{directory}/"])]
            members: inputs.Files = {}
            for side in (0, 1):
                image = inputs.encoded_image(job.find(*(f"{folder}{pair}-img{side}.png" for folder in folders)))
                members |= {f"{side}.{extension}": data for extension, data in image.items()}
            yield job.sample(name, members, {"sentence": sentence.strip(), "label": label, "id": name})


def karpathy_samples(job: Import) -> Iterator[Sample]:
    """Yield the images of one split, or of all, with their sentences; COCO's `train` includes `restval`."""
    file, chosen = job.source, job.options.split
    listed = inputs.json_of(file, "Karpathy split file", "images")["images"]
    form = "'images' (filename, split, sentences: 'raw', cocoid or imgid)"
    images = inputs.entries_of(file, "images", listed, lambda entry: (
        *inputs.fields(entry, filename=str, split=str, **{"cocoid" if "cocoid" in entry else "imgid": int}),
        str(entry.get("filepath", "")), [sentence["raw"] for sentence in entry["sentences"]],
    ), job.problems, form)  # fmt: skip
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
                image = inputs.encoded_image(job.find(*([name, f"{folder}/{name}"] if folder else [name])))
                yield job.pair(Path(name).stem, image, captions, image_id)


def coco_samples(job: Import) -> Iterator[Sample]:
    """Yield the images of a COCO caption file with their captions."""
    file, problems = job.source, job.problems
    form = "'images' (id, file_name) and 'annotations' (image_id, caption)"
    content = inputs.json_of(file, "COCO caption file", "images", "annotations")
    read_image = partial(inputs.fields, id=int, file_name=str)
    read_caption = partial(inputs.fields, image_id=int, caption=str)
    images = inputs.entries_of(file, "images", content["images"], read_image, problems, form)
    annotations = inputs.entries_of(file, "annotations", content["annotations"], read_caption, problems, form)
    names: dict[int, str] = {}
    for image_id, name in images:
        if image_id in names:
            problems.add(f"{file}, image {image_id}", f"its id occurs twice; {name} is skipped")
        names.setdefault(image_id, name)
    captions = defaultdict[int, list[str]](list)
    for image_id, caption in annotations:
        if image_id not in names:
            problems.add(f"{file}, caption of image {image_id}", "no image of this id is listed", is_fault=False)
        captions[image_id].append(caption)
    for image_id, name in names.items():
        where = f"{file}, image {image_id}"
        with problems.skipping(where):
            texts = inputs.clean_captions(captions[image_id], where, problems)
            yield job.pair(os.path.splitext(name)[0], inputs.encoded_image(job.find(name)), texts, image_id)


def class_samples(job: Import) -> Iterator[Sample]:
    """Yield the images of a folder of class folders, numbered in the order of their names; images may be nested."""
    folder, problems = job.source, job.problems
    _, classes, others = next(inputs.folders_below(folder, problems), (folder, [], []))
    if not classes:
        raise DataError(f"{folder}: it has no folder; expected a folder of images for each class")
    for name in others:
        if inputs.suffix_of(name) in EXTENSIONS:
            problems.add(str(folder / name), "it is not in a class folder")
        else:
            problems.pass_over(folder / name)
    job.choices[choices.CLASSES] = choices.Choices(tuple(clean_name(os.fsencode(name)) for name in classes))
    for number, name in enumerate(classes):
        path = None
        for path in inputs.files_below(folder / name, EXTENSIONS, problems):
            with problems.skipping(str(path)):
                members = {**inputs.encoded_image(path), "cls": str(number).encode()}
                yield job.sample(str(path.relative_to(folder).with_suffix("")), members)
        if path is None:
            reason = f"it is class {number} without an image; if it is not a class, remove it and build again"
            problems.add(str(folder / name), reason, is_fault=False)
