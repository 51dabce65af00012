"""Parsing of a sample's members: its images, captions, question, statement, class and image id.

- pairs: an image (`images.FORMATS`: jpg, png, webp, …) with `json` ({"captions": […]} or {"caption": "…"}, and an
  optional "image_id") or `txt`, as written by img2dataset. A `txt` is one caption, however many lines it has.
- questions: an image with json {"question": "…", "answers": {"text": score in 0 … 1}, "question_id": …}.
- statements: two images, `0.jpg` and `1.jpg` or `left.jpg` and `right.jpg` (or another format), with json
  {"sentence": "…", "label": true, "id": "…"}.

Other members are ignored and never unpickled. Text leaves this module as valid Unicode with a visible character.
Anything else is a BadSample, and so is a missing member.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers.normalizers import BertNormalizer

from pipeline.config.schema import SourceType
from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64

Members = Mapping[str, bytes]  # extension without its dot -> content
REGIONS = "npz"  # the extension of a detector's regions (see `contents.regions`)
# Loading one of these runs its author's code. Nothing here loads them, but other readers of the same shards would.
EXECUTABLE = frozenset({"pickle", "pkl", "pth", "pt", "pyd", "pyc", "joblib", "dill"})
BOTH = (("0.", "left."), ("1.", "right."))  # prefixes of a statement's first and second image
MAX_DIGITS = 18  # of a class number: any such number fits an int64
MAX_ANSWERS = 10  # different answers to a question: VQA asks ten people
_normalizer = BertNormalizer(lowercase=True)


class Annotation(NamedTuple):
    text: str = ""  # the question or statement
    answers: Mapping[str, float] = {}  # to the question, at least one: plain answer -> 0 … 1
    label: int = 0  # the class, or whether the statement is true
    id: str = ""  # '' if the sample has none


def check_members(members: Members, is_duplicate: bool) -> None:
    """Raise BadSample for a key that occurs twice in its shard, and for a member that executes code when loaded."""
    if is_duplicate:
        raise BadSample("members", "its key occurs twice in the shard")
    if unsafe := sorted(name for name in members if name.rpartition(".")[2] in EXECUTABLE):
        raise BadSample("members", f"member .{unsafe[0]} executes code when it is loaded; pack such shards without it")


def image_bytes(members: Members, prefixes: tuple[str, ...] = ("",)) -> bytes:
    """Return the encoded image, whose member is an image's extension with one of the prefixes."""
    for name in (f"{prefix}{extension}" for prefix in prefixes for extension in EXTENSIONS):
        if name in members:
            return members[name]
    expected = " or ".join(f"{prefix}jpg" for prefix in prefixes)
    raise BadSample(
        "members",
        f"no image {expected} (or {', '.join(EXTENSIONS[1:])}); it has {', '.join(sorted(members)) or 'none'}",
    )


def captions_of(members: Members) -> list[str]:
    """Return all captions of a pair, or the text of a text sample."""
    record = record_of(members)
    if (captions := record.get("captions")) is None:
        if (caption := record.get("caption")) is None:
            if "txt" not in members:
                expected = "json with 'captions' or 'caption', or txt"
                raise BadSample("members", f"no caption ({expected}); it has {', '.join(sorted(members)) or 'none'}")
            try:
                caption = members["txt"].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadSample("caption", f"its txt is not UTF-8: {error.reason} at byte {error.start}") from error
        captions = [caption]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("caption", "the captions are not a list of strings")
    if not captions:
        raise BadSample("caption", "the list of captions is empty")
    captions = [caption.strip() for caption in captions]
    for number, caption in enumerate(captions, 1):
        if not is_visible(caption):
            reason = "has no visible character" if caption else "is empty"
            raise BadSample("caption", f"caption {number} of {len(captions)} {reason}")
    return captions


def is_visible(text: str) -> bool:
    """Return whether every vocabulary gives at least one token for a text: BERT drops controls and lone accents."""
    return text[:1].isalnum() or bool(_normalizer.normalize_str(text).strip())


def annotation_of(members: Members, source_type: SourceType, classes: int | None = None) -> Annotation:
    """Return a question with its answers, a statement with its label, or the class, from webdataset's `cls` member and
    below `classes` if given.
    """
    if source_type == "labelled":
        if "cls" not in members:
            raise BadSample("label", f"no class (member cls, a number); it has {', '.join(sorted(members)) or 'none'}")
        number = members["cls"].strip()
        if not number.isdigit() or len(number) > MAX_DIGITS:
            raise BadSample("label", f"its cls {number[:20]!r} is not a class number")
        if classes is not None and int(number) >= classes:
            raise BadSample("label", f"its class is {int(number)}; expected 0 to {classes - 1}")
        return Annotation(label=int(number))
    record, is_question = record_of(members), source_type == "questions"
    answers, label = record.get("answers"), record.get("label")
    if not is_question:
        answers = {}
        if label not in (True, False):  # 1 and 0 equal them
            raise BadSample("label", f"the label {label!r:.40} is neither true nor false")
    elif not isinstance(answers, dict) or not answers:
        raise BadSample("answers", 'no answers (json with "answers": {"text": score})')
    elif len(answers) > MAX_ANSWERS:
        raise BadSample("answers", f"{len(answers)} answers; expected at most {MAX_ANSWERS}")
    for score in answers.values():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise BadSample("answers", f"the score {score!r:.40} is not a number in 0 … 1")
    name, id_name = ("question", "question_id") if is_question else ("sentence", "id")
    text = record.get(name)
    if not isinstance(text, str) or not is_visible(text := text.strip()):
        raise BadSample("caption", f"no {name} (json with '{name}': a text)")
    return Annotation(text, answers, 0 if is_question else int(bool(label)), str(record.get(id_name, "")))


def texts_of(members: Members) -> list[str]:
    """Return the text of a sample of any type: its captions, question or statement."""
    try:
        return captions_of(members)
    except BadSample:
        record = record_of(members)
        if texts := [record[key] for key in ("question", "sentence") if isinstance(record.get(key), str)]:
            return texts
        raise


def image_id_of(members: Members) -> int:
    """Return a hash (int64) of the sample's `image_id`, else of its image's bytes, else of its regions."""
    named = record_of(members).get("image_id")
    if isinstance(named, float) and not math.isfinite(named):
        raise BadSample("members", f"its image_id {named} is not a finite number")
    if named is not None:
        return hash64("image_id", unicodedata.normalize("NFC", str(named)), signed=True)
    has_image = not members.keys().isdisjoint(EXTENSIONS)
    shown = members[REGIONS] if REGIONS in members and not has_image else image_bytes(members)
    return int.from_bytes(hashlib.blake2b(shown, digest_size=8).digest(), "little", signed=True)


def record_of(members: Members) -> dict[str, Any]:
    """Return the sample's json, which must be an object; an empty one without the member."""
    data = members.get("json", b"{}")
    try:
        record = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data or b"\\uD" in data:  # surrogates occur only as escapes: UTF-8 has none
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # such a text can be neither tokenized nor logged
        half = error.object[error.start]
        raise BadSample("caption", f"its json contains {half!r}, a lone surrogate (a truncated text?)") from error
    except UnicodeDecodeError as error:
        raise BadSample("caption", f"its json is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("members", f"its json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise BadSample("members", f"its json is not an object but a {type(record).__name__}")
    return record
