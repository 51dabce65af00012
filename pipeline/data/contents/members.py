"""What a sample's members mean: its picture, its captions, and the name of the image it shows.

A pair is a picture (`images.FORMATS`: jpg, png, webp, …) with `json` ({"captions": […]} or {"caption": "…"}, and
perhaps "image_id") or `txt`; img2dataset's output is read as it is. Other members are never looked at, least of all
unpickled.

A `txt` is one caption, however many lines it has: most tools break long captions. Several captions of a picture are a
json's "captions".

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
REGIONS = "npz"  # the extension of a detector's regions (see `regions`)
# Loading one of these runs code that the shard's author wrote. Nothing here would load them; whoever reads the same
# shards with another reader does, so a sample that carries one is refused rather than read past.
EXECUTABLE = frozenset({"pickle", "pkl", "pth", "pt", "pyd", "pyc", "joblib", "dill"})
MAX_DIGITS = 18  # of a class: fewer than an int64 has
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_normalizer = BertNormalizer(lowercase=True)


def check_members(members: Members, is_duplicate: bool) -> None:
    """Raises BadSample for a key that the shard has twice, and for a member that executes code when it is loaded."""
    if is_duplicate:
        raise BadSample("members", "its key stands twice in the shard")
    if unsafe := sorted(name for name in members if name.rpartition(".")[2] in EXECUTABLE):
        raise BadSample("members", f"member .{unsafe[0]} executes code when it is loaded; pack such shards without it")


def image_bytes(members: Members) -> bytes:
    """The encoded picture. Raises BadSample when there is none."""
    for extension in EXTENSIONS:
        if extension in members:
            return members[extension]
    raise BadSample("members", f"no picture ({', '.join(EXTENSIONS)}); it has {names_of(members)}")


def captions_of(members: Members) -> list[str]:
    """All captions of a pair, or the one text of a text sample. Raises BadSample when one is missing or empty."""
    record = record_of(members)
    captions = record.get("captions")
    if captions is None and (caption := record.get("caption")) is not None:
        captions = [caption]
    if captions is None and "txt" in members:
        captions = [_text("txt", members["txt"])]
    if captions is None:
        told = names_of(members)
        raise BadSample("members", f"no caption (json with 'captions' or 'caption', or txt); it has {told}")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("caption", "the captions are no list of strings")
    captions = [caption.strip() for caption in captions]
    if not captions:
        raise BadSample("caption", "the list of captions is empty")
    for number, caption in enumerate(captions, 1):
        if not is_visible(caption):
            fault = "has no visible character" if caption else "is empty"
            raise BadSample("caption", f"caption {number} of {len(captions)} {fault}")
    return captions


def is_visible(text: str) -> bool:
    """Whether a text is left with a token, be it [UNK], by every vocabulary: BERT drops controls and lone accents."""
    return text[:1].isalnum() or bool(_normalizer.normalize_str(text).strip())


def class_of(members: Members, classes: int | None = None) -> int:
    """The number of a picture's class, from webdataset's `cls` member.

    Raises BadSample when there is none, or it is not below `classes`.
    """
    if "cls" not in members:
        raise BadSample("label", f"no class (member cls, a number); it has {names_of(members)}")
    text = members["cls"].strip()
    if not text.isdigit() or len(text) > MAX_DIGITS:
        raise BadSample("label", f"its cls {text[:20]!r} is no number of a class")
    if classes is not None and int(text) >= classes:
        raise BadSample("label", f"its class is {int(text)}, and there are {classes}, from 0")
    return int(text)


def texts_of(members: Members) -> list[str]:
    """Whatever text a sample has, of any use: its captions, else its question or statement. Raises BadSample."""
    try:
        return captions_of(members)
    except BadSample:
        record = record_of(members)
        if said := [record[key] for key in ("question", "sentence") if isinstance(record.get(key), str)]:
            return said
        raise


def image_id_of(members: Members) -> int:
    """Equal (int64) for samples that show the same image: by their `image_id`, else by the picture's bytes.

    Regions stand for a picture that is not there. Raises BadSample when there is none of the three.
    """
    named = record_of(members).get("image_id")
    if isinstance(named, float) and not math.isfinite(named):
        raise BadSample("members", f"its image_id {named} is no number that names an image")
    if named is not None:
        return signed(hash64("image_id", unicodedata.normalize("NFC", str(named))))
    has_picture = not members.keys().isdisjoint(EXTENSIONS)
    shown = members[REGIONS] if REGIONS in members and not has_picture else image_bytes(members)
    digest = hashlib.blake2b(shown, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def record_of(members: Members) -> dict[str, Any]:
    """The sample's json; empty without one.

    Raises BadSample when it is no object, nests too deeply, or holds half a character: a lone surrogate, as a text
    has whose end was cut off inside an emoji, cannot be encoded, so neither tokenized nor logged.
    """
    if "json" not in members:
        return {}
    data = members["json"]
    try:
        record = json.loads(_text("json", data))
    except (ValueError, RecursionError) as error:
        raise BadSample("members", f"its json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise BadSample("members", f"its json is no object but a {type(record).__name__}")
    if b"\\ud" in data or b"\\uD" in data:  # only an escape can bring a surrogate: UTF-8 has none
        _check_encodable(record)
    return record


def _check_encodable(record: dict[str, Any]) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadSample("caption", f"its json holds {half!r}, half a character (a text that was cut off?)") from error
    except RecursionError as error:
        raise BadSample("members", f"its json cannot be read: {error}") from error


def _text(name: str, data: bytes) -> str:
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption", f"its {name} is not UTF-8: {error.reason} at byte {error.start}") from error


def names_of(members: Members) -> str:
    """What a sample has, for a message."""
    return ", ".join(sorted(members)) or "none"
