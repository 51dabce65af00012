"""A source as training reads it: its shards, and which of their samples are chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.config.paths import file_name_of
from pipeline.config.schema import RunConfig, SourceConfig
from pipeline.data.parallel import Progress
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.manifest import Manifest, check_present, load_manifest
from pipeline.data.shards.selection import Selection, select
from pipeline.data.storage import ObjectInfo, Storage, join


@dataclass(frozen=True, eq=False)
class Source:
    """A folder (or pattern) of indexed shards. Picklable; memory in proportion to shards."""

    url: str
    manifest: Manifest
    selection: Selection | None = None  # None: every sample is read
    seen: Mapping[str, ObjectInfo] | None = None  # what the store said of each shard; None: it is still to be asked

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

    def chosen(self, index: ShardIndex) -> np.ndarray | None:
        """The numbers (int64, ascending) of the samples read of a shard; None: all of them."""
        return None if self.selection is None else self.selection.ordinals(index)


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
