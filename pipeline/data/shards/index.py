"""Index of one shard, `<shard>.index.npz`: its samples' location, and properties that are known without decoding."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import logging
import re
import string
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
from isal import isal_zlib

from pipeline.data.contents.images import ImageSize, measure
from pipeline.data.contents.members import image_bytes, image_id_of, record_of, texts_of
from pipeline.data.contents.regions import read_array
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.tar import BLOCK, Tar, TarSample

log = logging.getLogger(__name__)

SIDECAR = ".index.npz"
TRUSTED = "etag:"  # prefix of the digest of a shard that was not read
VERSION = 2
_FACTS_BYTES = 2**20  # maximum size of the arrays that describe the tar
_MAX_RATIO = 4  # maximum size of an array relative to the tar; reached by the columns of a tar of tiny samples
_ARRAYS = {
    "first": np.int64, "extension": np.int32, "offset": np.int64, "size": np.int64, "crc": np.uint32,
    "image_id": np.int64, "width": np.int32, "height": np.int32, "caption_length": np.int32, "url_id": np.uint64,
    "duplicate": np.bool_,
}  # fmt: skip
MAX_CHARACTERS = 16  # of a metadata value that is indexed as text: languages and flags, not sentences
MAX_COLUMNS = 500  # indexed fields of one shard, the most frequent ones
MAX_VALUES = 255  # distinct texts of an indexed field; with more, the field is a name and useless as a filter
MEASURED = ("width", "height", "caption_length")  # of every sample, whatever its json says; 0 if unknown
_IDENTIFIERS = ("key", "url", "caption", "captions", "image_id")  # identify the sample rather than describe it
_PORTS = {"http": 80, "https": 443, "ftp": 21}
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")


@dataclass(frozen=True)
class ShardRecord:
    """A whole shard, as its sidecar describes it, and its entry in the manifest."""

    name: str
    samples: int
    bytes: int
    digest: str  # SHA-256 of the tar, hex; 'etag:<etag>:<bytes>' if its count is another tool's
    etag: str | None = None  # the store's tag when it was indexed; not in the manifest's digest, because copies differ

    @property
    def is_trusted(self) -> bool:
        """True if another tool counted the shard; its index is made on first use."""
        return self.digest.startswith(TRUSTED)


@dataclass(frozen=True)
class ShardIndex:
    """Location and properties of a shard's samples. N samples, M members; sample i owns members first[i]:first[i+1]."""

    keys: tuple[str, ...]  # N
    first: np.ndarray  # (N+1,) int64
    extension: np.ndarray  # (M,) int32 into `extensions`
    offset: np.ndarray  # (M,) int64, of the member's data in the tar
    size: np.ndarray  # (M,) int64
    crc: np.ndarray  # (N,) uint32 CRC-32 of the sample's concatenated members (ISA-L's is ten times as fast as zlib's)
    image_id: np.ndarray  # (N,) int64, equal for samples with the same image; 0: neither an image nor its name
    width: np.ndarray  # (N,) int32 pixels in upright orientation; 0: unknown
    height: np.ndarray  # (N,) int32
    caption_length: np.ndarray  # (N,) int32 characters of the longest caption; 0: no valid caption
    url_id: np.ndarray  # (N,) uint64 hash of the json's `url`; 0: none
    duplicate: np.ndarray  # (N,) bool: an earlier sample of the shard has the same key
    extensions: tuple[str, ...]
    columns: Mapping[str, np.ndarray]  # the json's fields, (N,) each: float64 with NaN, or str with ''
    other_fields: tuple[str, ...]  # the json's fields that are not a column: long texts, lists, mixed types
    bytes: int  # of the tar
    digest: str  # SHA-256 of the tar, hex
    etag: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> Iterator[tuple[str, int, int]]:
        """Yield (extension, offset, size) of each member of a sample, in the tar's order."""
        for member in range(self.first[sample], self.first[sample + 1]):
            yield self.extensions[self.extension[member]], int(self.offset[member]), int(self.size[member])

    def byte_range(self, sample: int, stop: int | None = None) -> tuple[int, int]:
        """Return the bytes [start, stop) of the tar with the data of a sample, or of those before `stop`."""
        members = slice(self.first[sample], self.first[sample + 1 if stop is None else stop])
        ends = self.offset[members] + self.size[members]
        return int(self.offset[members].min()), int(ends.max())

    def to_bytes(self) -> builtins.bytes:
        """Return the content of the sidecar."""
        facts = {"version": VERSION, "samples": len(self), "bytes": self.bytes, "digest": self.digest}
        numbers = {name: column for name, column in self.columns.items() if column.dtype == np.float64}
        texts = {name: np.unique(c, return_inverse=True) for name, c in self.columns.items() if name not in numbers}
        names = {name: getattr(self, name) for name in ("keys", "extensions", "other_fields")}
        names |= {"numbers": list(numbers), "texts": {name: values.tolist() for name, (values, _) in texts.items()}}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            facts=np.frombuffer(json.dumps(facts | {"etag": self.etag}).encode(), dtype=np.uint8),
            names=np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
            numbers=np.array(list(numbers.values()), dtype=np.float64).reshape(len(numbers), len(self)),
            texts=np.array([codes for _, codes in texts.values()], dtype=np.uint8).reshape(len(texts), len(self)),
            **{name: getattr(self, name) for name in _ARRAYS},
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: builtins.bytes) -> ShardIndex:
        """Parse an untrusted sidecar. Raise ValueError unless its arrays fit one another, the tar and this version."""
        with open_sidecar(data) as (npz, facts):
            limit = _FACTS_BYTES + _MAX_RATIO * facts.bytes
            names = json.loads(read_array(npz, "names", "u", limit).tobytes())
            keys, extensions, samples = names["keys"], names["extensions"], facts.samples
            columns = dict(zip(names["numbers"], read_array(npz, "numbers", "f", limit), strict=True))
            for (name, values), codes in zip(names["texts"].items(), read_array(npz, "texts", "u", limit), strict=True):
                columns[name] = np.array(values, dtype=str)[codes]
            for text in (*keys, *extensions):
                text.encode()  # raises unless it is a text without lone surrogates
            if len(keys) != samples:
                raise ValueError(f"{len(keys)} keys for {samples} samples")
            arrays = {name: read_array(npz, name, np.dtype(dtype).kind, limit) for name, dtype in _ARRAYS.items()}
            first, extension, offset, size = (arrays[name] for name in ("first", "extension", "offset", "size"))
            lengths = {"first": samples + 1} | dict.fromkeys(("extension", "size", "offset"), len(offset))
            for name, array in arrays.items():
                if array.dtype != _ARRAYS[name] or array.shape != (lengths.get(name, samples),):
                    raise ValueError(f"{name} is an array of {array.dtype} of shape {array.shape}")
            is_whole = first[0] == 0 and first[-1] == len(offset) and (np.diff(first) > 0).all()
            is_named = not len(offset) or 0 <= extension.min() <= extension.max() < len(extensions)
            is_inside = (offset >= 0) & (size >= 0) & (size <= facts.bytes - offset)
            if not (is_whole and is_named and is_inside.all()):
                raise ValueError("its members are outside the tar")
            return ShardIndex(
                keys=tuple(keys), extensions=tuple(extensions), columns=columns,
                other_fields=tuple(names["other_fields"]), bytes=facts.bytes, digest=facts.digest, etag=facts.etag,
                **arrays,
            )  # fmt: skip


@contextmanager
def open_sidecar(data: bytes, name: str = "") -> Iterator[tuple[zipfile.ZipFile, ShardRecord]]:
    """Open a sidecar and parse its description of the shard. Every error in the block becomes a ValueError."""
    try:
        if not data.startswith(b"PK\x03\x04"):
            raise ValueError("no zip archive")
        npz = zipfile.ZipFile(io.BytesIO(data))
        facts = json.loads(read_array(npz, "facts", "u", _FACTS_BYTES).tobytes())
        if facts["version"] != VERSION:
            raise ValueError(f"version {facts['version']}, expected {VERSION}")
        record = ShardRecord(name, facts["samples"], facts["bytes"], facts["digest"], facts["etag"])
        if not 0 <= record.samples * BLOCK <= record.bytes:
            raise ValueError(f"{record.samples} samples in a tar of {record.bytes} bytes")
        yield npz, record
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"not a valid index: {error}") from error


def index_tar(tar: Tar, etag: str | None, visit: Callable[[TarSample], object] | None = None) -> ShardIndex:
    """Index a tar; `visit` its samples, or warn of skipped entries. Damaged parts stay unknown. Raises DataError."""
    keys: list[str] = []
    extensions: list[str] = []  # of each member
    records: list[Mapping[str, Any]] = []
    lists: dict[str, list[int]] = {name: [] for name in _ARRAYS} | {"first": [0]}
    for sample in tar.samples():
        if visit:
            visit(sample)
        image, record, image_id, length = ImageSize(0, 0), dict[str, Any](), 0, 0
        members = sample.contents
        with suppress(BadSample), judging("members"):
            image = measure(image_bytes(members))
        with suppress(BadSample), judging("members"):
            record = record_of(members)
        with suppress(BadSample), judging("members"):
            length = max(map(len, texts_of(members)))
        for contents in (members, {name: data for name, data in members.items() if name != "json"}):
            with suppress(BadSample), judging("members"):  # the json may be damaged
                image_id = image_id or image_id_of(contents)
        url = record.get("url")
        described = {name: value for name, value in record.items() if name not in (*MEASURED, *_IDENTIFIERS)}
        records.append(described | ({"animated": True} if image.is_animated else {}))
        keys.append(sample.key)
        extensions += members
        numbers = {
            "crc": isal_zlib.crc32(b"".join(members.values())), "image_id": image_id, "caption_length": length,
            "url_id": text_hash(normal_url(url)) if isinstance(url, str) else 0, "duplicate": sample.is_duplicate,
            "width": image.width, "height": image.height, "first": len(extensions),
        }  # fmt: skip
        for name, number in numbers.items():
            lists[name].append(number)
        lists["offset"] += sample.offsets
        lists["size"] += map(len, members.values())
    if not visit and (summary := tar.skipped_summary()):
        log.warning("%s: skipped entries that belong to no sample: %s", tar.name, summary)
    names = sorted(set(extensions))
    codes = {extension: number for number, extension in enumerate(names)}
    lists["extension"] = [codes[extension] for extension in extensions]
    # Fields of numbers and booleans become columns of float64, those of short texts with few values columns of str.
    counts = Counter(name for record in records for name, value in record.items() if value is not None)
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_COLUMNS]
    columns: dict[str, np.ndarray] = {}
    for name in sorted(frequent):  # with a field per sample, memory would grow with the samples' square
        values = [record.get(name) for record in records]
        present = [value for value in values if value is not None]
        if all(isinstance(value, (int, float)) for value in present):
            with suppress(OverflowError):  # an integer beyond the range of floats
                columns[name] = np.array([np.nan if value is None else float(value) for value in values])
        elif all(isinstance(v, str) and len(v) <= MAX_CHARACTERS and v.isprintable() for v in present):
            texts = np.array([value or "" for value in values], dtype=str)
            columns |= {name: texts} if len(set(present)) <= MAX_VALUES else {}
    return ShardIndex(
        keys=tuple(keys), extensions=tuple(names), columns=columns, other_fields=tuple(sorted(counts.keys() - columns)),
        bytes=tar.position, digest=tar.digest.hexdigest(), etag=etag,
        **{name: np.array(lists[name], dtype=dtype) for name, dtype in _ARRAYS.items()},
    )  # fmt: skip


def text_hash(text: str) -> int:
    """Return an unsigned 64-bit hash of a text: the first word of `randomness.hash64`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def normal_url(text: str) -> str:
    """Return the normal form of a URL (RFC 3986, sections 6.2.2 and 6.2.3); any other text in Unicode's NFC."""
    text = unicodedata.normalize("NFC", text.strip())
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except ValueError:
        return text
    host = f"[{host}]" if ":" in host else host
    host += f":{port}" if port not in (None, _PORTS.get(scheme)) else ""
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    encoded = []
    for part in (parts.path or "/", parts.query):  # 'a%7eb%c3%a9' becomes 'a~b%C3%A9'
        decoded = re.sub(
            r"%([0-9A-Fa-f]{2})",
            lambda match: character if (character := chr(int(match[1], 16))) in _UNRESERVED else match[0].upper(),
            part,
        )
        encoded.append(quote(decoded, safe="%/:?#[]@!$&'()*+,;=~"))
    return urlunsplit((scheme, user + host, *encoded, ""))
