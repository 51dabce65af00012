"""`mome fingerprint`: the hash of what a stage's steps read, for audits and bug reports (contract C1)."""

from __future__ import annotations

from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.loading.fingerprint import fingerprint
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare


def fingerprint_of(
    config: RunConfig, stage: str | None, steps: str, world_size: int, workers: int, threads: int
) -> dict[str, Any]:
    """Reads the batches of steps A:B as `world_size` ranks of so many loader processes and threads would.

    Raises ConfigError for a wrong range.
    """
    first, separator, last = steps.partition(":")
    if not (separator and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--steps {steps}: expected A:B with A below B, such as 0:10")
    loader = config.data.loader.model_copy(update={"workers": workers, "threads": threads})
    config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})
    storage = Storage(config.storage)
    tokenizer = prepare(config, storage)
    chosen = config.stage_named(stage)
    found = fingerprint(config, chosen, storage, tokenizer, range(int(first), int(last)), world_size)
    return {"fingerprint": found, "steps": [int(first), int(last)], "stage": chosen.name}
