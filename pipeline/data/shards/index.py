"""The index of one shard: where its samples lie, and what is known of each without decoding it.

It is kept beside the tar as `<shard>.index.npz`, the sidecar.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import re
import string
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
from isal import isal_zlib

from pipeline.data.contents.images import EXTENSIONS, Measured, measure
from pipeline.data.contents.members import Members, image_id_of, record_of, texts_of
from pipeline.data.contents.npz import Npz
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.tar import BLOCK, Tar, TarSample, clean_name

SIDECAR = ".index.npz"
VERSION = 2
_MAX_FACTS = 2**20  # bytes
_MAX_RATIO = 4  # of an array's bytes to the tar's; what the columns of a tar of tiny samples come to
_ARRAYS = {
    "first": np.int64,
    "extension": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "crc": np.uint32,
    "image_id": np.int64,
    "width": np.int32,
    "height": np.int32,
    "caption_length": np.int32,
    "url_id": np.uint64,
    "duplicate": np.bool_,
}


@dataclass(frozen=True)
class ShardFacts:
    """What a sidecar says of its tar as a whole."""

    samples: int
    bytes: int  # of the tar
    digest: str  # SHA-256 of the tar, hex
    etag: str | None  # the store's tag of the tar when it was indexed


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's samples lie. N samples, M members; sample i owns members first[i] … first[i+1]-1."""

    keys: tuple[str, ...]  # N
    first: np.ndarray  # (N+1,) int64
    extension: np.ndarray  # (M,) int32 into `extensions`
    offset: np.ndarray  # (M,) int64, of the member's data in the tar
    size: np.ndarray  # (M,) int64
    crc: np.ndarray  # (N,) uint32 of the sample's members' data, end to end
    image_id: np.ndarray  # (N,) int64, equal for samples that show the same image; 0: neither picture nor name
    width: np.ndarray  # (N,) int32 pixels, held upright; 0: unknown
    height: np.ndarray  # (N,) int32
    caption_length: np.ndarray  # (N,) int32 characters of the longest caption; 0: no good caption
    url_id: np.ndarray  # (N,) uint64 hash of the json's `url`; 0: none
    duplicate: np.ndarray  # (N,) bool: an earlier sample of the shard has the same key
    extensions: tuple[str, ...]
    columns: Mapping[str, np.ndarray]  # the json's fields, (N,) each: float64 with NaN, or str with ''
    other_fields: tuple[str, ...]  # the json's fields that are no column here: texts, lists, numbers beside texts
    bytes: int  # of the tar
    digest: str  # SHA-256 of the tar, hex
    etag: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> Iterator[tuple[str, int, int]]:
        """(extension, offset, size) of each member of one sample, in the tar's order."""
        for member in range(self.first[sample], self.first[sample + 1]):
            yield self.extensions[self.extension[member]], int(self.offset[member]), int(self.size[member])

    def first_offset(self, sample: int) -> int:
        """The offset in the tar of the sample's first member's data."""
        return int(self.offset[self.first[sample]])

    def byte_range(self, sample: int, stop: int | None = None) -> tuple[int, int]:
        """The bytes [start, stop) of the tar that hold the data of a sample, or of all up to sample `stop`.

        The data of a hard link lies with the file it names, so that members need not follow each other.
        """
        members = slice(self.first[sample], self.first[sample + 1 if stop is None else stop])
        ends = self.offset[members] + self.size[members]
        return int(self.offset[members].min()), int(ends.max())

    @property
    def facts(self) -> ShardFacts:
        return ShardFacts(len(self), self.bytes, self.digest, self.etag)

    def to_bytes(self) -> builtins.bytes:
        """The sidecar's content."""
        facts = {"samples": len(self), "bytes": self.bytes, "digest": self.digest, "etag": self.etag}
        numbers = {name: column for name, column in self.columns.items() if column.dtype == np.float64}
        texts = {
            name: np.unique(self.columns[name], return_inverse=True) for name in self.columns if name not in numbers
        }
        names = {
            "keys": self.keys,
            "extensions": self.extensions,
            "other_fields": self.other_fields,
            "numbers": list(numbers),
            "texts": {name: values.tolist() for name, (values, _) in texts.items()},
        }
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            facts=_packed({"version": VERSION} | facts),
            names=_packed(names),
            numbers=np.array(list(numbers.values()), dtype=np.float64).reshape(len(numbers), len(self)),
            texts=np.array([codes for _, codes in texts.values()], dtype=np.uint8).reshape(len(texts), len(self)),
            **{name: getattr(self, name) for name in _ARRAYS},
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: builtins.bytes) -> ShardIndex:
        """Raises ValueError when the data is no sidecar of this version."""
        with _Sidecar(data) as found:
            facts, names = found.facts(), found.json("names")
            numbers, texts = found.array("numbers", "f"), found.array("texts", "u")
            columns = dict(zip(names["numbers"], numbers, strict=True))
            for (name, values), codes in zip(names["texts"].items(), texts, strict=True):
                columns[name] = np.array(values, dtype=str)[codes]
            index = ShardIndex(
                keys=tuple(_clean_key(key) for key in names["keys"]),
                extensions=tuple(names["extensions"]),
                columns=columns,
                other_fields=tuple(names["other_fields"]),
                bytes=facts.bytes,
                digest=facts.digest,
                etag=facts.etag,
                **{name: found.array(name, np.dtype(kind).kind) for name, kind in _ARRAYS.items()},
            )
            _check_arrays(index, facts.samples)
            return index


def _clean_key(key: str) -> str:
    """A key as `tar.clean_name` has it: earlier versions kept bytes that are not UTF-8 as lone surrogates."""
    return key if key.isascii() else clean_name(key.encode("utf-8", "surrogateescape"))


def sidecar_facts(data: bytes) -> ShardFacts:
    """What a sidecar says of its tar, without reading the rest. Raises ValueError as `ShardIndex.from_bytes` does."""
    with _Sidecar(data) as found:
        return found.facts()


def index_tar(data: bytes, name: str, etag: str | None = None) -> ShardIndex:
    """Indexes a tar's bytes; see `index_walk`."""
    return index_walk(Tar(io.BytesIO(data), name, len(data), lambda start, stop: data[start:stop]), etag)


def index_walk(tar: Tar, etag: str | None) -> ShardIndex:
    """Indexes a tar by walking its headers. Raises DataError, with its name, for anything but a whole, plain tar."""
    builder = IndexBuilder()
    for sample in tar.samples():
        builder.add(sample)
    return builder.finish(tar, etag)


def checksum(contents: Iterable[builtins.bytes]) -> int:
    """CRC-32 of a sample's members, end to end: zlib's number, which ISA-L finds in a tenth of the time."""
    crc = 0
    for data in contents:
        crc = isal_zlib.crc32(data, crc)
    return crc


class IndexBuilder:
    """Collects the index of a tar while it is walked."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._first = [0]
        self._members: list[tuple[str, int, int]] = []
        self._crcs: list[int] = []
        self._duplicates: list[bool] = []
        self._properties: list[Properties] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, sample: TarSample) -> None:
        self._members.extend((extension, offset, len(data)) for extension, offset, data in sample.members)
        self._keys.append(sample.key)
        self._first.append(len(self._members))
        self._crcs.append(checksum(data for _, _, data in sample.members))
        self._duplicates.append(sample.is_duplicate)
        self._properties.append(properties_of(sample.contents))

    def finish(self, tar: Tar, etag: str | None) -> ShardIndex:
        """The index, once the walk of `tar` has ended."""
        extensions = sorted({extension for extension, _, _ in self._members})
        code = {extension: number for number, extension in enumerate(extensions)}
        columns, other_fields = columns_of([properties.metadata for properties in self._properties])
        lists: dict[str, list[Any]] = {
            "first": self._first,
            "extension": [code[extension] for extension, _, _ in self._members],
            "offset": [offset for _, offset, _ in self._members],
            "size": [size for _, _, size in self._members],
            "crc": self._crcs,
            "duplicate": self._duplicates,
        }
        for name in ("image_id", "width", "height", "caption_length", "url_id"):
            lists[name] = [getattr(properties, name) for properties in self._properties]
        return ShardIndex(
            keys=tuple(self._keys),
            extensions=tuple(extensions),
            columns=columns,
            other_fields=other_fields,
            bytes=tar.position,
            digest=tar.digest.hexdigest(),
            etag=etag,
            **{name: np.array(values, dtype=_ARRAYS[name]) for name, values in lists.items()},
        )


class _Sidecar:
    """An opened sidecar; whatever is wrong with one becomes a ValueError."""

    def __init__(self, data: bytes):
        self._data = data
        self._max_bytes = _MAX_FACTS

    def __enter__(self) -> _Sidecar:
        if not self._data.startswith(b"PK\x03\x04"):
            raise ValueError("not an index: no zip archive")
        try:
            self._file = Npz(self._data)
        except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"not an index: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (MemoryError, _OtherVersion)):
            raise ValueError(f"not an index: {error}") from error

    def facts(self) -> ShardFacts:
        """Its tar's facts; no array is read that is out of proportion to the tar."""
        if "facts" not in self._file:
            raise _OtherVersion("an index of an earlier version")
        found = self.json("facts")
        if found["version"] != VERSION:
            raise _OtherVersion(f"index version {found['version']}, expected {VERSION}")
        facts = ShardFacts(found["samples"], found["bytes"], found["digest"], found["etag"])
        if not 0 <= facts.samples * BLOCK <= facts.bytes:
            raise ValueError(f"{facts.samples} samples in a tar of {facts.bytes} bytes")
        self._max_bytes = _MAX_FACTS + _MAX_RATIO * facts.bytes
        return facts

    def json(self, name: str) -> dict[str, Any]:
        found = json.loads(self.array(name, "u").tobytes())
        if not isinstance(found, dict):
            raise ValueError(f"{name} is no object")
        return found

    def array(self, name: str, kinds: str) -> np.ndarray:
        return self._file.read(name, kinds, self._max_bytes)


class _OtherVersion(ValueError):
    """A sidecar that a newer or an older version of this program wrote."""


def _check_arrays(index: ShardIndex, samples: int) -> None:
    """Raises ValueError for arrays that do not fit each other or the tar: of a sidecar, anyone may have written it."""
    members = len(index.offset)
    lengths = {"first": samples + 1, "extension": members, "size": members}
    for name, kind in _ARRAYS.items():
        array = getattr(index, name)
        if array.dtype != kind or array.shape != (lengths.get(name, members if name == "offset" else samples),):
            raise ValueError(f"{name} is an array of {array.dtype} of shape {array.shape}")
    if len(index.keys) != samples or not all(isinstance(text, str) for text in (*index.keys, *index.extensions)):
        raise ValueError(f"{len(index.keys)} keys for {samples} samples")
    is_whole = index.first[0] == 0 and index.first[-1] == members and (np.diff(index.first) > 0).all()
    named = not members or 0 <= index.extension.min() <= index.extension.max() < len(index.extensions)
    inside = (index.offset >= 0) & (index.size >= 0) & (index.size <= index.bytes - index.offset)
    if not (is_whole and named and inside.all()):
        raise ValueError("its members lie outside the tar")


def _packed(content: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


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
