"""`mome fingerprint`: the hash of what a stage's steps read, for audits and bug reports (contract C1)."""

from __future__ import annotations

import tempfile
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.load import with_absolute_paths
from pipeline.config.schema import RunConfig, parse_steps
from pipeline.data.loading.loader import fingerprint
from pipeline.data.storage import Storage
from pipeline.training.prepare import apart, prepare


def fingerprint_of(
    config: RunConfig, stage: str | None, steps: str, world_size: int, workers: int, threads: int
) -> dict[str, Any]:
    """Read the batches of steps A:B as `world_size` ranks of so many loader processes and threads would.

    Nothing is written into the run's folder. Raises ConfigError for a wrong range, and where `mome train` would.
    """
    try:
        first, last = parse_steps(steps)
    except ValueError as error:
        raise ConfigError(f"--steps {steps}: {error}") from None
    loader = config.data.loader.model_copy(update={"num_workers": workers, "threads": threads})
    config = with_absolute_paths(config)
    config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})
    chosen = config.stage_named(stage)
    storage = Storage(config.storage)
    with tempfile.TemporaryDirectory(prefix="mome-fingerprint-") as folder:
        scratch = apart(config, storage, folder, config.name)
        tokenizer = prepare(scratch, storage)
        found = fingerprint(scratch, chosen, storage, tokenizer, range(first, last), world_size)
    return {"fingerprint": found, "steps": [first, last], "stage": chosen.name}
