"""How much of the captions a run's vocabulary cannot spell: measured once, when it is fixed, and kept with the run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pipeline.config.errors import StorageError
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage, join

log = logging.getLogger(__name__)

COVERAGE = "vocabulary.json"
CAPTIONS = 1000  # of each folder of shards
ALERT = 0.01  # share of [UNK] among the tokens


@dataclass(frozen=True)
class Coverage:
    """The share of [UNK] among the tokens of each folder's first captions."""

    vocabulary: str  # its digest
    unknown: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.unknown.values(), default=0.0)

    @property
    def alert(self) -> str | None:
        """What to tell of a vocabulary that does not fit; None for one that does."""
        if self.worst <= ALERT:
            return None
        folder = max(self.unknown, key=lambda url: self.unknown[url])
        return (
            f"{self.worst:.1%} of the tokens of {folder}'s captions are [UNK]: the vocabulary cannot spell them. Give "
            "tokenizer.vocabulary of their language, or train one: leave it out, and raise tokenizer.size"
        )


def measure_coverage(storage: Storage, folder: str, tokenizer: Tokenizer, urls: Iterable[str]) -> Coverage:
    """Measure a run's vocabulary on the captions at `urls`, unless that was done, and keep it in the run's folder."""
    if (known := load_coverage(storage, folder)) is not None and known.vocabulary == tokenizer.digest:
        return known
    unknown = {}
    for url in urls:
        captions = list(itertools.islice(iter_captions(storage, url), CAPTIONS))
        unknown[url] = round(tokenizer.unknown_share(captions), 6)
        log.info("%s: %.2f %% of the tokens of %d captions are [UNK]", url, 100 * unknown[url], len(captions))
    found = Coverage(tokenizer.digest, unknown)
    if found.alert is not None:
        log.warning("%s", found.alert)
    storage.write(join(folder, COVERAGE), json.dumps(asdict(found), indent=1).encode())
    return found


def load_coverage(storage: Storage, folder: str) -> Coverage | None:
    """What `measure_coverage` kept; None where it cannot be read, as in runs begun by an earlier version."""
    try:
        return Coverage(**json.loads(storage.read(join(folder, COVERAGE))))
    except (StorageError, ValueError, TypeError):
        return None
