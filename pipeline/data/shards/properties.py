"""What an index says of each sample besides its place: which image, how large, how long its captions, its metadata.

Everything is found without decoding a picture. Sources are filtered, and buckets planned, by these properties.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np

from pipeline.data.contents.images import EXTENSIONS, Measured, measure
from pipeline.data.contents.members import Members, image_id_of, record_of, texts_of
from pipeline.data.quarantine import BadSample, judging

MAX_CHARACTERS = 16  # of a metadata value that is indexed as text: languages and flags, not sentences
MAX_COLUMNS = 500  # fields of one shard that are indexed, the most frequent ones
MAX_VALUES = 255  # distinct texts of one field in one shard; more are names, by which nobody filters
_OWN = ("width", "height", "caption_length")  # measured here, whatever the json says
_UNKNOWN = Measured(0, 0)
T = TypeVar("T")
_PORTS = {"http": 80, "https": 443, "ftp": 21}
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_NAMES = ("key", "url", "caption", "captions", "image_id")  # say which sample it is, not what it is like


@dataclass(frozen=True)
class Properties:
    """Of one sample."""

    image_id: int = 0  # int64; 0: no picture, and no name of one
    width: int = 0  # pixels, of the picture held upright; 0: unknown
    height: int = 0
    caption_length: int = 0  # characters of the longest caption, or of the question or statement; 0: no good one
    url_id: int = 0  # uint64 hash of the json's `url` in its normal form; 0: none
    metadata: Mapping[str, Any] | None = None  # the json's fields; and `animated`, of a picture with further frames


def properties_of(members: Members) -> Properties:
    """What can be told without decoding. Never fails: what a damaged sample does not tell stays 0."""
    picture = _told(_measured, members, _UNKNOWN)
    metadata: Mapping[str, Any] = _told(record_of, members, {})
    url = metadata.get("url")
    return Properties(
        image_id=_image_id(members),
        width=picture.width,
        height=picture.height,
        caption_length=_told(_caption_length, members, 0),
        url_id=text_hash(normal_url(url)) if isinstance(url, str) else 0,
        metadata={name: value for name, value in metadata.items() if name not in _OWN and name not in _NAMES}
        | ({"animated": True} if picture.is_animated else {}),
    )


def text_hash(text: str) -> int:
    """An unsigned 64-bit hash of a text: the first word of what `randomness.hash64` makes of it."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def normal_url(text: str) -> str:
    """One form of all spellings of a URL that RFC 3986 (6.2.2, 6.2.3) has equal; any other text in Unicode's NFC.

    Scheme and host in lower case, no default port, no fragment, '/' for no path, percent encoding of exactly what
    needs it. Case and everything else in path and query stay, for they may matter.
    """
    text = unicodedata.normalize("NFC", text.strip())
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except ValueError:
        return text
    if ":" in host:
        host = f"[{host}]"
    if port is not None and port != _PORTS.get(scheme):
        host = f"{host}:{port}"
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    path, query = (_percent_encoded(part) for part in (parts.path or "/", parts.query))
    return urlunsplit((scheme, user + host, path, query, ""))


def _percent_encoded(part: str) -> str:
    """The part with unreserved characters as they are, and others in one spelling: 'a%7eb%c3%a9' is 'a~b%C3%A9'."""
    decoded = re.sub(
        r"%([0-9A-Fa-f]{2})",
        lambda found: character if (character := chr(int(found[1], 16))) in _UNRESERVED else found[0].upper(),
        part,
    )
    return quote(decoded, safe="%/:?#[]@!$&'()*+,;=~")


def columns_of(rows: Sequence[Mapping[str, Any] | None]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Every field of the samples' metadata as one array, and the names of the fields that cannot be one.

    Numbers and booleans become float64 with NaN where missing; short texts of few distinct values become a str array
    with '' where missing. A field that is neither throughout the shard is only named.
    """
    counts = Counter(name for row in rows if row for name, value in row.items() if value is not None)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    columns: dict[str, np.ndarray] = {}
    others = names[MAX_COLUMNS:]  # a field of every sample's own would take memory by the square of their number
    for name in sorted(names[:MAX_COLUMNS]):
        column = _column([row.get(name) if row else None for row in rows])
        if column is None:
            others.append(name)
        else:
            columns[name] = column
    return columns, tuple(sorted(others))


def _column(values: list[Any]) -> np.ndarray | None:
    given = [value for value in values if value is not None]
    if all(isinstance(value, (int, float)) for value in given):
        try:
            return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
        except OverflowError:  # an integer beyond every float
            return None
    is_short = all(isinstance(value, str) and len(value) <= MAX_CHARACTERS and value.isprintable() for value in given)
    if is_short and len(set(given)) <= MAX_VALUES:
        return np.array([value or "" for value in values], dtype=str)
    return None


def _image_id(members: Members) -> int:
    without_json = {name: data for name, data in members.items() if name != "json"}  # a damaged one unnames no picture
    return _told(image_id_of, members, 0) or _told(image_id_of, without_json, 0)


def _caption_length(members: Members) -> int:
    return max(len(text) for text in texts_of(members))


def _told(ask: Callable[[Members], T], members: Members, otherwise: T) -> T:
    """What a sample tells; `otherwise` where it is too damaged to: who reads it counts it as bad, with the reason."""
    try:
        with judging("members"):
            return ask(members)
    except BadSample:
        return otherwise


def _measured(members: Members) -> Measured:
    data = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    return measure(data) if data is not None else _UNKNOWN
