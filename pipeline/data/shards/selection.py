"""Which samples of a source are read: those that its filters admit and that nobody opted out of.

A filter is about one property in the shards' indexes: `width`, `height`, `caption_length`, or a field of the samples'
json (`pipeline.data.shards.properties`). An opt-out list is a text file with one id a line: a sample's key, its
`image_id` or its `url`, each exactly as the shard has it. What is held is the number of chosen samples of each shard
and the hashes of the listed ids; which samples those are is read from a shard's index when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import FilterConfig, SourceConfig
from pipeline.data.parallel import Progress, in_parallel
from pipeline.data.randomness import hash64_array
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.manifest import Manifest, load_index
from pipeline.data.shards.properties import text_hash
from pipeline.data.storage import NotFound, Storage

MEASURED = ("width", "height", "caption_length")  # of every sample; 0 in an index where unknown


@dataclass(frozen=True, eq=False)
class OptOut:
    """The ids of a list as sorted hashes: `words` of keys and URLs, `image_ids` as indexes have them."""

    words: np.ndarray  # (n,) uint64
    image_ids: np.ndarray  # (n,) int64
    digest: str  # SHA-256 of the list

    def holds(self, index: ShardIndex) -> np.ndarray:
        """(N,) bool: the samples of a shard that are listed."""
        keys = np.array([text_hash(key) for key in index.keys], dtype=np.uint64)
        has_url, has_image = index.url_id != 0, index.image_id != 0
        listed = _among(self.words, keys)
        return (
            listed | (has_url & _among(self.words, index.url_id)) | (has_image & _among(self.image_ids, index.image_id))
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen samples of every shard of a source. Picklable."""

    filters: Mapping[str, FilterConfig]
    opt_out: OptOut | None
    counts: np.ndarray  # (shards,) int64
    digest: str  # SHA-256 of filters, list and counts

    def ordinals(self, index: ShardIndex) -> np.ndarray:
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
    counts = _saved_counts(storage, saved, question) if saved is not None else None
    if counts is None:
        counts = _count(storage, source, manifest, opt_out, progress)
        if saved is not None:
            storage.write(saved, json.dumps({"question": question, "counts": counts.tolist()}).encode())
    if not counts.sum():
        raise DataError(
            f"{source.shards}: none of its {manifest.num_samples} samples is left by its filters and opt-out list. "
            "Widen the filters, or look at the samples with mome shards show"
        )
    return Selection(source.filters, opt_out, counts, _digest(question, counts.tolist()))


def read_opt_out(storage: Storage, url: str) -> OptOut:
    """The ids of a text file, one a line; empty lines count for nothing. Raises DataError when it is missing."""
    digest, words = hashlib.sha256(), []
    try:
        with storage.open(url) as stream:
            for line in stream:
                digest.update(line)
                if name := line.decode("utf-8").strip("\ufeff \t\r\n"):
                    words.append(text_hash(name))
    except NotFound as error:
        raise DataError(f"{url}: the opt-out list is missing. Put it there, or correct sources.*.opt_out") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: line {len(words) + 1} of the opt-out list is not UTF-8. Write it again") from error
    found = np.unique(np.array(words, dtype=np.uint64))
    # What hash64("image_id", id) gives, as `members.image_id_of` names images; hashed at once.
    image_ids = hash64_array(text_hash("image_id"), found).astype(np.int64)
    return OptOut(found, np.sort(image_ids), digest.hexdigest())


def _count(
    storage: Storage, source: SourceConfig, manifest: Manifest, opt_out: OptOut | None, progress: Progress | None
) -> np.ndarray:
    records = {record.name: record for record in manifest.shards}

    def count(name: str) -> tuple[int, Set[str]]:
        index = load_index(storage, source.shards, records[name])
        return int(_admitted(index, source.filters, opt_out, name).sum()), index.columns.keys()

    counts: dict[str, int] = {}
    known = set(MEASURED)
    for name, (chosen, properties) in in_parallel(count, records, source.shards):
        counts[name] = chosen
        known |= properties
        if progress:
            progress(len(counts), len(records), name)
    if unknown := sorted(source.filters.keys() - known):
        raise ConfigError(
            f"filters of {source.shards}: no sample has '{unknown[0]}'; its shards have {', '.join(sorted(known))}"
        )
    return np.array([counts[name] for name in records], dtype=np.int64)


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


def _among(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which values are in an ascending array, without copying it."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(ordered, values)
    return ordered[np.minimum(places, len(ordered) - 1)] == values


def _saved_counts(storage: Storage, url: str, question: str) -> np.ndarray | None:
    try:
        found = json.loads(storage.read(url))
        return np.array(found["counts"], dtype=np.int64) if found["question"] == question else None
    except (NotFound, ValueError, KeyError, TypeError):
        return None


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
