"""Parsing of a sample's members: its image, captions, class and image id.

A pair is an image (`images.FORMATS`: jpg, png, webp, …) with `json` ({"captions": […]} or {"caption": "…"}, and
an optional "image_id") or `txt`; the output of img2dataset is read unchanged. Other members are ignored and never
unpickled.

A `txt` is one caption, however many lines it has: most tools wrap long captions. Several captions of an image are
stored in the "captions" of a json.

Text leaves this module as clean Unicode: UTF-8 with or without a byte order mark, no lone surrogates, and at least one
visible character. Anything else is a BadSample.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from tokenizers.normalizers import BertNormalizer

from pipeline.data.contents.images import EXTENSIONS
from pipeline.data.quarantine import BadSample
from pipeline.data.randomness import hash64, signed

Members = Mapping[str, bytes]  # extension without its dot -> content
REGIONS = "npz"  # the extension of a detector's regions (see `contents.regions`)
# Loading one of these runs code that the shard's author wrote. Nothing here loads them, but other readers of the same
# shards would: a sample that contains one is refused rather than skipped over.
EXECUTABLE = frozenset({"pickle", "pkl", "pth", "pt", "pyd", "pyc", "joblib", "dill"})
MAX_DIGITS = 18  # of a class number: any such number fits an int64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_normalizer = BertNormalizer(lowercase=True)


def check_members(members: Members, is_duplicate: bool) -> None:
    """Raise BadSample for a key that occurs twice in its shard, and for a member that executes code when loaded."""
    if is_duplicate:
        raise BadSample("members", "its key occurs twice in the shard")
    if unsafe := sorted(name for name in members if name.rpartition(".")[2] in EXECUTABLE):
        raise BadSample("members", f"member .{unsafe[0]} executes code when it is loaded; pack such shards without it")


def image_bytes(members: Members) -> bytes:
    """Return the encoded image. Raises BadSample when there is none."""
    for extension in EXTENSIONS:
        if extension in members:
            return members[extension]
    raise BadSample("members", f"no image ({', '.join(EXTENSIONS)}); it has {names_of(members)}")


def captions_of(members: Members) -> list[str]:
    """Return all captions of a pair, or the text of a text sample. Raises BadSample when one is missing or empty."""
    record = record_of(members)
    captions = record.get("captions")
    if captions is None and (caption := record.get("caption")) is not None:
        captions = [caption]
    if captions is None and "txt" in members:
        captions = [_text("txt", members["txt"])]
    if captions is None:
        expected = "json with 'captions' or 'caption', or txt"
        raise BadSample("members", f"no caption ({expected}); it has {names_of(members)}")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("caption", "the captions are not a list of strings")
    captions = [caption.strip() for caption in captions]
    if not captions:
        raise BadSample("caption", "the list of captions is empty")
    for number, caption in enumerate(captions, 1):
        if not is_visible(caption):
            reason = "has no visible character" if caption else "is empty"
            raise BadSample("caption", f"caption {number} of {len(captions)} {reason}")
    return captions


def is_visible(text: str) -> bool:
    """Return whether every vocabulary gives at least one token for a text: BERT drops controls and lone accents."""
    return text[:1].isalnum() or bool(_normalizer.normalize_str(text).strip())


def class_of(members: Members, classes: int | None = None) -> int:
    """Return the number of an image's class, from webdataset's `cls` member.

    Raises BadSample when there is none, or it is not below `classes`.
    """
    if "cls" not in members:
        raise BadSample("label", f"no class (member cls, a number); it has {names_of(members)}")
    text = members["cls"].strip()
    if not text.isdigit() or len(text) > MAX_DIGITS:
        raise BadSample("label", f"its cls {text[:20]!r} is not a class number")
    if classes is not None and int(text) >= classes:
        raise BadSample("label", f"its class is {int(text)}; expected 0 to {classes - 1}")
    return int(text)


def texts_of(members: Members) -> list[str]:
    """Return the text of a sample of any type: its captions, question or statement. Raises BadSample without any."""
    try:
        return captions_of(members)
    except BadSample:
        record = record_of(members)
        if texts := [record[key] for key in ("question", "sentence") if isinstance(record.get(key), str)]:
            return texts
        raise


def image_id_of(members: Members) -> int:
    """Return a hash (int64) that is equal for samples of one image: of `image_id`, else of the image's bytes.

    Samples without an image are identified by their regions. Raises BadSample when there is none of the three.
    """
    named = record_of(members).get("image_id")
    if isinstance(named, float) and not math.isfinite(named):
        raise BadSample("members", f"its image_id {named} is not a finite number")
    if named is not None:
        return signed(hash64("image_id", unicodedata.normalize("NFC", str(named))))
    has_image = not members.keys().isdisjoint(EXTENSIONS)
    shown = members[REGIONS] if REGIONS in members and not has_image else image_bytes(members)
    digest = hashlib.blake2b(shown, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def record_of(members: Members) -> dict[str, Any]:
    """Return the sample's json; an empty object without one.

    Raises BadSample when it is not an object, is nested too deeply, or contains a lone surrogate: a text cut inside an
    emoji cannot be encoded, and so neither tokenized nor logged.
    """
    if "json" not in members:
        return {}
    data = members["json"]
    try:
        record = json.loads(_text("json", data))
    except (ValueError, RecursionError) as error:
        raise BadSample("members", f"its json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise BadSample("members", f"its json is not an object but a {type(record).__name__}")
    if b"\\ud" in data or b"\\uD" in data:  # surrogates occur only as escapes: UTF-8 has none
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadSample("caption", f"its json contains {half!r}, a lone surrogate (a truncated text?)") from error
        except RecursionError as error:
            raise BadSample("members", f"its json cannot be read: {error}") from error
    return record


def _text(name: str, data: bytes) -> str:
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption", f"its {name} is not UTF-8: {error.reason} at byte {error.start}") from error


def names_of(members: Members) -> str:
    """Return the names of a sample's members, for a message."""
    return ", ".join(sorted(members)) or "none"
