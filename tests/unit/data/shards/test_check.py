"""Agreement of `shards check`, the index and training on every damaged sample (contract C7)."""

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import DataConfig, SourceType
from pipeline.data.contents.choices import Choices
from pipeline.data.contents.members import texts_of
from pipeline.data.contents.regions import RegionRecord
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.reading.samples import iter_captions
from pipeline.data.shards.check import check_shards
from pipeline.data.shards.manifest import load_index, load_manifest
from pipeline.data.storage import Storage
from tests.support.bad_shards import read_epoch
from tests.support.encoded_images import encoded
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import Members, write_indexed

CLASSES, ANSWERS, NUMBERS, BATCH = 4, ("yes", "no"), 3, 8  # as in `read_epoch`
USES: tuple[SourceType, ...] = ("pairs", "text", "labelled", "regions", "questions", "statements")
DEEP = b'{"caption": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"

# Members of samples with captions, and whether check and training accept them.
CAPTIONS: dict[tuple[str, bool], tuple[bytes, ...]] = {
    ("json", False): (
        b'{"caption": "nice \\ud83d"}', b'{"captions": ["fine", "nice \\udE00 day"]}',  # lone surrogates
        b'{"caption": "\\ude00\\ud83d"}',  # in the wrong order
        b'{"caption": "fine", "title": "\\ud83d"}', b'{"caption": "fine", "\\ud83d": 1}',
        b'{"caption": "fine", "image_id": "\\ud83d"}', b'{"caption": "nice \xed\xa0\xbd"}',  # encoded as UTF-8
        DEEP, b'{"caption": "fine", "x": ' + DEEP + b"}", b'{"caption": "fine", "x": ' + b"9" * 5000 + b"}",
        '{"caption": "fine"}'.encode("utf-16"), '{"captions": ["fine", "\u0301"]}'.encode(),  # without a letter
    ),
    ("json", True): (
        b'{"caption": "nice \\ud83d\\ude00"}', b'{"caption": "nice \\\\ud83d"}',  # an escaped backslash
        b'\xef\xbb\xbf{"caption": "fine"}', b'{"caption": "fine", "image_id": [1, {"a": null}]}',
        b'{"caption": "fine", "x": NaN, "y": 1e400, "z": ' + b"9" * 400 + b"}",
        b'{"caption": "fine", "image_id": NaN}', b'{"caption": "fine", "image_id": 1e400}',
    ),
    ("txt", False): (
        "a thing".encode("utf-16"), "Tür".encode("latin-1"), "\u200b\u200d \ufeff".encode(), b"\0\x01\x02",
        "\ufffd\ufffd".encode(),
    ),
    ("txt", True): (b"\xef\xbb\xbffine", b"?!", "\U0001f600".encode()),
}  # fmt: skip


def regions(number: int, boxes: list[list[int]]) -> bytes:
    """Return regions of an image of 10 x 10."""
    features, classes = np.full((len(boxes), NUMBERS), number, dtype=np.float32), np.arange(len(boxes))
    return RegionRecord(features, np.array(boxes, np.float32).reshape(-1, 4), (10, 10), classes).to_bytes()


_CLASSES = (b"9" * 5000, b"9" * 19, b"-1", b"+1", b"1.0", b"", "\u0661".encode(), b"1_0", b"nan", b"4")
_SCORES = (b"Infinity", b"NaN", b"1" + b"0" * 400, b'"1"', b"null", b"true", b"-1", b"[[]]")
_LABELS = (b"NaN", b"1e400", b"2", b"[]", b"{}", b'"true"', b"null", b"9" * 400)
OTHERS: dict[SourceType, list[Members]] = {
    "labelled": [{"cls": text} for text in _CLASSES],
    "questions": [
        *({"json": b'{"question": "what?", "answers": {"yes": %s}}' % score} for score in _SCORES),
        {"json": b'{"question": "what \\ud83d?", "answers": {"yes": 1}}'},
        {"json": b'{"question": "what?", "answers": {"\\ud83d": 1}}'},
        {"json": '{"question": "\u200b", "answers": {"yes": 1}}'.encode()},
    ],
    "statements": [
        *({"json": b'{"sentence": "so", "label": %s}' % label} for label in _LABELS),
        {"json": b'{"sentence": "so \\ud83d", "label": true}'},
    ],
    "regions": [
        *({"npz": data} for data in (b"", b"PK\x03\x04", b"no zip", regions(0, [[0, 0, 90, 10]]), regions(0, [])))
    ],
}


def sample(source_type: SourceType, number: int) -> Members:
    """Return a good sample of a source type."""
    noise = (np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8) for seed in (number, number + 1))
    shown, other = (encoded(pixels, ("JPEG", "PNG", "WEBP")[seed % 3]) for seed, pixels in enumerate(noise, number))
    if source_type == "labelled":
        return {"jpg": shown, "cls": b"%d" % (number % CLASSES)}
    if source_type == "questions":
        record: dict[str, Any] = {"question": f"what is {number}?", "answers": {"yes": 1.0}, "question_id": number}
        return {"jpg": shown, "json": json.dumps(record).encode()}
    if source_type == "statements":
        record = {"sentence": f"it is {number}", "label": number % 2 == 0, "id": str(number)}
        return {"0.jpg": shown, "1.jpg": other, "json": json.dumps(record).encode()}
    text = {"json": json.dumps({"captions": [f"a thing {number}", "another way"], "url": f"u/{number}"}).encode()}
    if source_type == "regions":
        return text | {"npz": regions(number, [[0, 0, 5, 5], [1, 1, 9, 9]])}
    return text | ({"jpg": shown} if source_type == "pairs" else {})


def judge(folder: Path, source_type: SourceType, damaged: dict[str, Members]) -> set[tuple[str, str, str]]:
    """Return the bad samples that both check and training find in a shard of damaged and good samples."""
    samples = damaged | {f"good{number}": sample(source_type, number) for number in range(2 * len(damaged) + BATCH)}
    samples |= {f"more{number}": sample(source_type, number) for number in range(-len(samples) % BATCH)}
    keys = sorted(samples, key=lambda key: random.Random(key).random())
    write_indexed(folder, {key: samples[key] for key in keys})
    (folder / "answers.json").write_bytes(Choices(ANSWERS).to_bytes())
    (folder / "classes.json").write_bytes(Choices(tuple("abcd")).to_bytes())
    (report,) = check_shards(Storage(), str(folder), source_type, DataConfig().max_pixels, workers=1)
    assert report.broken is None
    findings = {(bad.key, bad.stage, bad.reason) for bad in report.bad}
    quarantined = read_epoch(folder, len(samples), source_type)
    assert findings == {(bad["key"], bad["stage"], bad["reason"]) for bad in quarantined}
    assert {key for key, *_ in findings} <= damaged.keys()
    (record,) = load_manifest(Storage(), str(folder)).shards
    index = load_index(Storage(), str(folder), record)
    for key, indexed in zip(keys, index.caption_length, strict=True):  # damaged samples are indexed by what is known
        length = 0
        with suppress(BadSample), judging("members"):
            length = max(map(len, texts_of(samples[key])))
        assert indexed == length
    for text in iter_captions(Storage(), str(folder)):
        text.encode()
    return findings


def variants(source_type: SourceType) -> dict[str, Members]:
    """Return samples that are bad, by keys with 'poison', and unusual ones that are good."""
    changes = [(False, change) for change in OTHERS.get(source_type, [])]
    samples = {"poison": {"json": sample(source_type, 0)["json"]}} if source_type == "regions" else {}  # without any
    if source_type in ("pairs", "text", "regions"):
        changes += [(is_good, {name: data}) for (name, is_good), contents in CAPTIONS.items() for data in contents]
    for number, (is_good, change) in enumerate(changes):
        whole = sample(source_type, number)
        if "txt" in change:
            del whole["json"]
        samples[f"{'fine' if is_good else 'poison'}{number}"] = whole | change
    return samples


@pytest.mark.parametrize("source_type", USES)
def test_check_and_training_agree_on_damaged_samples(source_type: SourceType, tmp_path: Path) -> None:
    damaged = variants(source_type)
    bad = judge(tmp_path / "foreseen", source_type, damaged)
    assert {key for key, *_ in bad} == {key for key in damaged if key.startswith("poison")}
    assert not any("Error" in reason for _, _, reason in bad), "a fault that was foreseen has words of its own"
    rng, damaged = random.Random(source_type), {}
    for number in range(fuzz_rounds(60)):
        members = sample(source_type, number)
        hurt = rng.choice([name for name in members if name not in ("jpg", "0.jpg", "1.jpg")] * 3 + list(members))
        damaged[f"hurt{number}"] = members | {hurt: mutate(members[hurt], rng)}
    assert judge(tmp_path / "mutated", source_type, damaged)
