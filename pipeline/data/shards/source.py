"""Which samples of a source are read: those that its filters admit and that nobody opted out of.

A filter is about one property in the shards' indexes: `width`, `height`, `caption_length`, or a field of the samples'
json (`pipeline.data.shards.index`). An opt-out list is a text file with one id a line: a sample's key, its
`image_id` or its `url`. Both sides are compared in Unicode's form NFC, and URLs as RFC 3986 has them equal (the case of
scheme and host, default ports, percent encoding). How many entries matched is told, with the first that did not. What
is held is the number of chosen samples of each shard and the hashes of the listed ids; which samples those are is read
from a shard's index when it is asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import unicodedata
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import FilterConfig, RunConfig, SourceConfig
from pipeline.config.urls import file_name_of
from pipeline.data.parallel import Progress, in_parallel
from pipeline.data.randomness import hash64_array
from pipeline.data.shards.index import ShardIndex, normal_url, text_hash
from pipeline.data.shards.manifest import Manifest, check_present, load_index, load_manifest
from pipeline.data.storage import NotFound, ObjectInfo, Storage, join

log = logging.getLogger(__name__)

_VERSION = 2  # of the saved counts; those of 1 were of lists compared byte by byte
MEASURED = ("width", "height", "caption_length")  # of every sample; 0 in an index where unknown


@dataclass(frozen=True, eq=False)
class OptOut:
    """The ids of a list as hashes of the forms in which an index may have them."""

    words: _Hashes  # uint64, of keys and URLs
    image_ids: _Hashes  # int64, as indexes have them
    lines: np.ndarray  # (entries,) int64: the line on which each entry first stands
    digest: str  # SHA-256 of the list

    def holds(self, index: ShardIndex) -> np.ndarray:
        """(N,) bool: the samples of a shard that are listed."""
        return np.any(self._entries(index) >= 0, axis=0)

    def matched(self, index: ShardIndex) -> np.ndarray:
        """The entries (int64) that list a sample of a shard."""
        found = np.unique(self._entries(index))
        return found[found >= 0]

    def _entries(self, index: ShardIndex) -> np.ndarray:
        """(3, N) int64: the entries that a sample's key, URL and image id are listed by, -1 for none."""
        keys = np.array([text_hash(unicodedata.normalize("NFC", key)) for key in index.keys], dtype=np.uint64)
        urls = np.where(index.url_id != 0, self.words.entries_of(index.url_id), -1)
        images = np.where(index.image_id != 0, self.image_ids.entries_of(index.image_id), -1)
        return np.stack([self.words.entries_of(keys), urls, images])


@dataclass(frozen=True, eq=False)
class _Hashes:
    """Hashes in ascending order, and the entry that each stands for: (n,) both."""

    hashes: np.ndarray
    entries: np.ndarray  # int64

    @staticmethod
    def of(hashes: np.ndarray, entries: np.ndarray) -> _Hashes:
        ordered, places = np.unique(hashes, return_index=True)
        return _Hashes(ordered, entries[places])

    def entries_of(self, values: np.ndarray) -> np.ndarray:
        """The entry of each value, -1 for a value that is none of the hashes: int64, without copying these."""
        if not len(self.hashes):
            return np.full(len(values), -1)
        places = np.minimum(np.searchsorted(self.hashes, values), len(self.hashes) - 1)
        return np.where(self.hashes[places] == values, self.entries[places], -1)


@dataclass(frozen=True)
class _Matched:
    """How an opt-out list fits the shards."""

    entries: int
    matched: int
    line: int = 0  # of the first entry that lists no sample; 0: there is none
    text: str = ""  # that entry


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen samples of every shard of a source. Picklable."""

    filters: Mapping[str, FilterConfig]
    opt_out: OptOut | None
    counts: np.ndarray  # (shards,) int64
    digest: str  # SHA-256 of filters, list and counts

    def sample_numbers(self, index: ShardIndex) -> np.ndarray:
        """The numbers (int64, ascending) of the chosen samples of a shard."""
        return np.flatnonzero(_admitted(index, self.filters, self.opt_out))


def select(
    storage: Storage,
    source: SourceConfig,
    manifest: Manifest,
    saved: str | None = None,
    progress: Progress | None = None,
) -> Selection | None:
    """The selection that a source's `filters` and `opt_out` ask for; None when they ask for nothing.

    Reads the index of every shard, in parallel, unless the URL `saved` holds the counts of the same question; they
    are written there otherwise. Raises ConfigError for a property that no shard has or that cannot be compared so,
    DataError when nothing is left to read.
    """
    if not source.filters and source.opt_out is None:
        return None
    opt_out = None if source.opt_out is None else read_opt_out(storage, source.opt_out)
    filters = {name: source.filters[name].model_dump(mode="json") for name in sorted(source.filters)}
    question = _digest(manifest.digest, filters, opt_out.digest if opt_out else None)
    has_saved = saved is not None and not source.opt_out_must_match
    counts = _saved_counts(storage, saved, question) if saved is not None and has_saved else None
    if counts is None:
        counts, matched = _count(storage, source, manifest, opt_out, progress)
        if matched is not None:
            _tell_matched(source, matched)
        if saved is not None:
            content = {"version": _VERSION, "question": question, "counts": counts.tolist()}
            storage.write(saved, json.dumps(content).encode())
    if not counts.sum():
        raise DataError(
            f"{source.shards}: none of its {manifest.num_samples} samples is left by its filters and opt-out list. "
            "Widen the filters, or look at the samples with mome shards show"
        )
    return Selection(source.filters, opt_out, counts, _digest(question, counts.tolist()))


def read_opt_out(storage: Storage, url: str) -> OptOut:
    """The ids of a text file, one a line; empty lines count for nothing. Raises DataError when it is missing."""
    digest = hashlib.sha256()
    plain: list[int] = []  # the hash of each entry in its normal form
    lines: list[int] = []  # the number of its line
    words: list[int] = []  # the hash of each form that an index may have of an entry
    owners: list[int] = []  # the place of that entry in `plain`
    number = 0
    try:
        with storage.open(url) as stream:
            for number, line in enumerate(stream, 1):
                digest.update(line)
                if name := _entry(line):
                    forms = {name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")), normal_url(name)}
                    words += [text_hash(form) for form in forms]
                    owners += [len(plain)] * len(forms)
                    plain.append(text_hash(normal_url(name)))
                    lines.append(number)
    except NotFound as error:
        raise DataError(f"{url}: the opt-out list is missing. Put it there, or correct sources.*.opt_out") from error
    except ValueError as error:
        raise DataError(f"{url}: line {number} of the opt-out list is not UTF-8. Write it again") from error
    _, first, entry = np.unique(np.array(plain, dtype=np.uint64), return_index=True, return_inverse=True)
    owner = entry[np.array(owners, dtype=np.int64)]
    hashes = np.array(words, dtype=np.uint64)
    # What hash64("image_id", id) gives, as `members.image_id_of` names images; hashed at once.
    image_ids = hash64_array(text_hash("image_id"), hashes).astype(np.int64)
    return OptOut(
        words=_Hashes.of(hashes, owner),
        image_ids=_Hashes.of(image_ids, owner),
        lines=np.array(lines, dtype=np.int64)[first],
        digest=digest.hexdigest(),
    )


def _entry(line: bytes) -> str:
    """The id on a line. Raises ValueError for what is not UTF-8; NULs are UTF-16's, without a byte order mark."""
    if b"\0" in line:
        raise ValueError("it holds NUL characters")
    return line.decode("utf-8").strip("\ufeff \t\r\n")


def _count(
    storage: Storage, source: SourceConfig, manifest: Manifest, opt_out: OptOut | None, progress: Progress | None
) -> tuple[np.ndarray, _Matched | None]:
    records = {record.name: record for record in manifest.shards}

    def count(name: str) -> tuple[int, Set[str], np.ndarray]:
        index = load_index(storage, source.shards, records[name])
        listed = np.zeros(0, dtype=np.int64) if opt_out is None else opt_out.matched(index)
        return int(_admitted(index, source.filters, opt_out, name).sum()), index.columns.keys(), listed

    counts: dict[str, int] = {}
    known = set(MEASURED)
    is_matched = np.zeros(0 if opt_out is None else len(opt_out.lines), dtype=bool)
    for name, (chosen, properties, listed) in in_parallel(count, records, source.shards):
        counts[name] = chosen
        known |= properties
        is_matched[listed] = True
        if progress:
            progress(len(counts), len(records), name)
    if unknown := sorted(source.filters.keys() - known):
        raise ConfigError(
            f"filters of {source.shards}: no sample has '{unknown[0]}'; its shards have {', '.join(sorted(known))}"
        )
    found = np.array([counts[name] for name in records], dtype=np.int64)
    if opt_out is None or source.opt_out is None:
        return found, None
    matched = _Matched(len(is_matched), int(is_matched.sum()))
    if is_matched.all():
        return found, matched
    line = int(opt_out.lines[~is_matched].min())
    with storage.open(source.opt_out) as stream:
        text = _entry(next(itertools.islice(stream, line - 1, None)))
    return found, replace(matched, line=line, text=text)


def _tell_matched(source: SourceConfig, matched: _Matched) -> None:
    """Raises DataError when every entry must list a sample, and one does not."""
    told = f"{source.opt_out}: {matched.matched} of its {matched.entries} entries list a sample of {source.shards}"
    if not matched.line:
        log.info("%s", told)
        return
    told += f"; the first that lists none is line {matched.line}, {matched.text[:200]!r}"
    if source.opt_out_must_match:
        raise DataError(f"{told}. Correct the entry, or unset opt_out_must_match of the source")
    log.warning("%s", told)


def _admitted(
    index: ShardIndex, filters: Mapping[str, FilterConfig], opt_out: OptOut | None, shard: str = "a shard"
) -> np.ndarray:
    admitted = np.ones(len(index), dtype=bool)
    for name, condition in filters.items():
        admitted &= _fulfils(index, name, condition, shard)
    return admitted if opt_out is None else admitted & ~opt_out.holds(index)


def _fulfils(index: ShardIndex, name: str, condition: FilterConfig, shard: str) -> np.ndarray:
    if name in index.other_fields and name not in MEASURED:
        raise ConfigError(f"filters.{name}: it is neither a number nor a short text throughout {shard}; choose another")
    values = getattr(index, name) if name in MEASURED else index.columns.get(name)
    if values is None:
        return np.full(len(index), condition.keep_missing)
    is_text = values.dtype.kind == "U"
    if is_text and (condition.min is not None or condition.max is not None):
        raise ConfigError(f"filters.{name}: it is a text in {shard}; give any_of or none_of, not min or max")
    if not is_text and (condition.any_of is not None or condition.none_of is not None):
        raise ConfigError(
            f"filters.{name}: it is a number in {shard} (true is 1); give min or max, not any_of or none_of"
        )
    fulfilled = np.ones(len(index), dtype=bool)
    if condition.min is not None:
        fulfilled &= values >= condition.min
    if condition.max is not None:
        fulfilled &= values <= condition.max
    if condition.any_of is not None:
        fulfilled &= np.isin(values, condition.any_of)
    if condition.none_of is not None:
        fulfilled &= ~np.isin(values, condition.none_of)
    return np.where(_is_missing(values, name), condition.keep_missing, fulfilled)


def _is_missing(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind == "U":
        return values == ""
    return values == 0 if name in MEASURED else np.isnan(values)


def _saved_counts(storage: Storage, url: str, question: str) -> np.ndarray | None:
    try:
        found = json.loads(storage.read(url))
        is_answer = found["version"] == _VERSION and found["question"] == question
        return np.array(found["counts"], dtype=np.int64) if is_answer else None
    except (NotFound, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """A folder (or pattern) of indexed shards. Picklable; memory in proportion to shards."""

    url: str
    manifest: Manifest
    selection: Selection | None = None  # None: every sample is read
    objects: Mapping[str, ObjectInfo] | None = None  # what the store said of each shard; None: it is still to be asked

    @property
    def counts(self) -> np.ndarray:
        """(shards,) int64: the samples read of each shard, in the manifest's order; 0 is fine."""
        if self.selection is not None:
            return self.selection.counts
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is read: the shards' contents, and the choice among them."""
        if self.selection is None:
            return self.manifest.digest
        return hashlib.sha256(f"{self.manifest.digest} {self.selection.digest}".encode()).hexdigest()

    def selected(self, index: ShardIndex) -> np.ndarray | None:
        """The numbers (int64, ascending) of the samples read of a shard; None: all of them."""
        return None if self.selection is None else self.selection.sample_numbers(index)


def open_source(
    storage: Storage, config: SourceConfig, saved: str | None = None, progress: Progress | None = None
) -> Source:
    """The source of a config, whose shards must be indexed already (`manifest.ensure_indexed`).

    With filters or an opt-out list every index is read, once: `saved` is the URL where the counts are kept for those
    who ask again. Raises DataError for a missing or cut shard, by name, and as `load_manifest` and `select` do.
    """
    manifest = load_manifest(storage, config.shards)
    seen = check_present(storage, config.shards, manifest)
    return Source(config.shards, manifest, select(storage, config, manifest, saved, progress), seen)


def selection_url(config: RunConfig, name: str) -> str:
    """Where a run keeps what a source's filters left, for its ranks."""
    return join(config.folder, "selections", file_name_of(f"{name}.json"))
