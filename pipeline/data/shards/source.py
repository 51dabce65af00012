"""A source as training reads it: its shards, and the samples selected by its filters and opt-out list. A filter applies
to a property in the shards' indexes: `width`, `height`, `caption_length`, or a field of the samples' json. An opt-out
list has one id per line: a sample's key, its `image_id` or its `url`, compared in Unicode's NFC, and URLs in the normal
form of RFC 3986. Memory holds counts of samples and hashes of ids.
"""

import hashlib
import itertools
import json
import logging
import unicodedata
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from pipeline.config.errors import ConfigError, DataError, StorageError
from pipeline.config.schema import FilterConfig, SourceConfig
from pipeline.data.randomness import hash64_array
from pipeline.data.shards.index import MEASURED, ShardIndex, normal_url, text_hash
from pipeline.data.shards.manifest import Manifest, check_present, load_index, load_manifest
from pipeline.data.storage import NotFound, ObjectInfo, Progress, Storage, in_parallel, join

log = logging.getLogger(__name__)

_VERSION = 2  # of the saved counts; version 1 compared opt-out lists byte by byte
_BLANK = "\ufeff \t\r\n"  # around an id
_HashTable = tuple[np.ndarray, np.ndarray]  # (n,) hashes in ascending order, and the opt-out entry (int64) of each


@dataclass(frozen=True, eq=False)
class OptOut:
    """The ids of an opt-out list, as hashes of the forms in which an index may have them."""

    words: _HashTable  # uint64 hashes of keys and URLs
    image_ids: _HashTable  # int64, as in indexes
    lines: np.ndarray  # (entries,) int64: the first line of each entry
    digest: str  # SHA-256 of the list

    def entries_of(self, index: ShardIndex) -> np.ndarray:
        """Return the entries (3, N) int64 that list each sample by key, URL and image id; -1 for none."""
        keys = np.array([text_hash(unicodedata.normalize("NFC", key)) for key in index.keys], dtype=np.uint64)
        rows = np.full((3, len(index)), -1)
        tables = (self.words, keys), (self.words, index.url_id), (self.image_ids, index.image_id)
        for row, ((hashes, entries), values) in zip(rows, tables, strict=True):
            if len(hashes):
                places = np.minimum(np.searchsorted(hashes, values), len(hashes) - 1)
                row[:] = np.where(hashes[places] == values, entries[places], -1)
        rows[1:][np.stack([index.url_id == 0, index.image_id == 0])] = -1  # unknown
        return rows


@dataclass(eq=False)
class Source:
    """Folder (or pattern) of indexed shards, and the samples selected from it. Picklable; its memory is proportional to
    the number of shards.
    """

    url: str
    manifest: Manifest
    filters: Mapping[str, FilterConfig] = field(default_factory=dict)
    opt_out: OptOut | None = None
    objects: Mapping[str, ObjectInfo] | None = None  # the store's info on each shard; None: not yet requested
    counts: np.ndarray = field(init=False)  # (shards,) int64: the selected samples of each; 0 is allowed
    digest: str = field(init=False)  # SHA-256 (hex) of the shards' contents and the selection

    def __post_init__(self) -> None:
        """Select every sample; `open_source` replaces both values by those of the selection."""
        self.counts = np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)
        self.digest = self.manifest.digest

    def selected(self, index: ShardIndex, shard: str = "a shard") -> np.ndarray:
        """Return the numbers (int64, ascending) of a shard's samples that pass all filters and are not opted out."""
        mask = np.ones(len(index), dtype=bool)
        for name, condition in self.filters.items():
            is_measured, fault = name in MEASURED, f"filters.{name}: it is"
            if name in index.other_fields and not is_measured:
                raise ConfigError(f"{fault} neither a number nor a short text in all of {shard}; use another")
            values = getattr(index, name) if is_measured else index.columns.get(name)
            if values is None:
                mask &= condition.keep_missing
                continue
            passes = np.ones(len(index), dtype=bool)
            if values.dtype.kind == "U":
                if not (condition.min is condition.max is None):
                    raise ConfigError(f"{fault} a text in {shard}; give any_of or none_of, not min or max")
                is_missing = values == ""
                if condition.any_of is not None:
                    passes &= np.isin(values, condition.any_of)
                if condition.none_of is not None:
                    passes &= ~np.isin(values, condition.none_of)
            else:
                if not (condition.any_of is condition.none_of is None):
                    remedy = "give min or max, not any_of or none_of"
                    raise ConfigError(f"{fault} a number in {shard} (true is 1); {remedy}")
                is_missing = values == 0 if is_measured else np.isnan(values)
                if condition.min is not None:
                    passes &= values >= condition.min
                if condition.max is not None:
                    passes &= values <= condition.max
            mask &= np.where(is_missing, condition.keep_missing, passes)
        if self.opt_out is not None:
            mask &= (self.opt_out.entries_of(index) < 0).all(axis=0)
        return np.flatnonzero(mask)


def open_source(
    storage: Storage, config: SourceConfig, run_folder: str | None = None, progress: Progress | None = None
) -> Source:
    """Open a source whose shards are indexed (`manifest.ensure_indexed`). The counts of selected samples are those that
    the run saved for the same selection, else computed from every index and saved. Raises DataError as `load_manifest`,
    or if no sample is left, and ConfigError for a property that no shard has or that cannot be compared in that way.
    """
    manifest = load_manifest(storage, config.shards)
    objects = check_present(storage, config.shards, manifest)
    opt_out = None if config.opt_out is None else read_opt_out(storage, config.opt_out)
    source = Source(config.shards, manifest, config.filters, opt_out, objects)
    if not config.filters and opt_out is None:
        return source
    filters = {name: config.filters[name].model_dump(mode="json") for name in sorted(config.filters)}
    parts = json.dumps([manifest.digest, filters, opt_out.digest if opt_out else None], sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()
    saved = None if run_folder is None else join(run_folder, "selections", f"{key}.json")
    counts = None
    if saved is not None and not config.opt_out_must_match:
        with suppress(NotFound, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            content = json.loads(storage.read(saved))
            if content["version"] == _VERSION:
                counts = np.array(content["counts"], dtype=np.int64)
    if counts is None:
        counts = _count(storage, source, config, progress)
        if saved is not None:
            try:
                storage.write(saved, json.dumps({"version": _VERSION, "counts": counts.tolist()}).encode())
            except StorageError as error:  # a cache, which a report of a run in a read-only folder does not need
                log.warning("%s: the counts of selected samples could not be saved: %s", saved, error)
    if not counts.sum():
        remedy = "Widen the filters, or inspect the samples with mome shards show"
        fault = f"filters and opt-out list leave none of its {manifest.num_samples} samples"
        raise DataError(f"{config.shards}: {fault}. {remedy}")
    selection = hashlib.sha256(json.dumps([key, counts.tolist()]).encode()).hexdigest()
    source.counts, source.digest = counts, hashlib.sha256(f"{manifest.digest} {selection}".encode()).hexdigest()
    return source


def read_opt_out(storage: Storage, url: str) -> OptOut:
    """Read the ids of a text file, one per line; empty lines are ignored. Raise DataError if it is missing."""
    digest, number = hashlib.sha256(), 0
    plain, lines = list[int](), list[int]()  # of each entry, the hash of its normal form and its line
    words, owners = list[int](), list[int]()  # hashes of the forms of an entry, and its position in `plain`
    try:
        with storage.open(url) as stream:
            for number, line in enumerate(stream, 1):
                digest.update(line)
                if b"\0" in line:
                    raise ValueError("UTF-16 without a byte order mark")
                if name := line.decode().strip(_BLANK):
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
    # The value of hash64("image_id", id), by which `members.image_id_of` identifies images, for all entries at once.
    image_ids = hash64_array(text_hash("image_id"), hashes).astype(np.int64)
    by_word, by_image = (np.unique(values, return_index=True) for values in (hashes, image_ids))
    return OptOut(
        words=(by_word[0], owner[by_word[1]]), image_ids=(by_image[0], owner[by_image[1]]),
        lines=np.array(lines, dtype=np.int64)[first], digest=digest.hexdigest(),
    )  # fmt: skip


def _count(storage: Storage, source: Source, config: SourceConfig, progress: Progress | None) -> np.ndarray:
    """Count the selected samples of each shard, and report opt-out entries without a sample (DataError if it must)."""
    records = {record.name: record for record in source.manifest.shards}
    opt_out = source.opt_out

    def count(name: str) -> tuple[int, Collection[str], np.ndarray]:
        index = load_index(storage, source.url, records[name])
        entries = np.zeros(0, dtype=np.int64) if opt_out is None else np.unique(opt_out.entries_of(index))
        return len(source.selected(index, name)), index.columns.keys(), entries[entries >= 0]

    counts: dict[str, int] = {}
    known = set(MEASURED)
    is_matched = np.zeros(0 if opt_out is None else len(opt_out.lines), dtype=bool)
    for name, (num_selected, properties, entries) in in_parallel(count, records, source.url):
        counts[name] = num_selected
        known |= set(properties)
        is_matched[entries] = True
        if progress:
            progress(len(counts), len(records), name)
    if unknown := sorted(source.filters.keys() - known):
        names = ", ".join(sorted(known))
        raise ConfigError(f"filters of {source.url}: no sample has '{unknown[0]}'; its shards have {names}")
    if opt_out is not None and config.opt_out is not None:
        fraction = f"{is_matched.sum()} of its {len(is_matched)} entries"
        message = f"{config.opt_out}: {fraction} list a sample of {source.url}"
        if is_matched.all():
            log.info("%s", message)
        else:
            line = int(opt_out.lines[~is_matched].min())
            with storage.open(config.opt_out) as stream:
                text = next(itertools.islice(stream, line - 1, None)).decode().strip(_BLANK)
            message += f"; the first that lists none is line {line}, {text[:200]!r}"
            if config.opt_out_must_match:
                raise DataError(f"{message}. Correct the entry, or unset opt_out_must_match of the source")
            log.warning("%s", message)
    return np.array([counts[name] for name in records], dtype=np.int64)
