"""`mome doctor`: checks of this machine and of the services that a run uses, each with a remedy if it fails.

The checks change nothing, except that DeepSpeed's operators are built if necessary, and that a small object is written
to the run's output and deleted. `mome train --preflight` checks the ranks and stages of a run with the same functions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs.doctor import machine, services
from jobs.doctor.machine import Diagnosis, skipped
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local, local_path
from pipeline.tracking.locations import journal_folder


def run_checks(config: RunConfig | None) -> Iterator[Diagnosis]:
    """Run all checks in the order of their dependencies."""
    import torch

    yield machine.packages()
    gpus = machine.driver()
    yield machine.accelerator(config, gpus)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield machine.collective("NCCL", count)
    yield machine.collective("gloo")
    yield machine.operators()
    yield machine.shared_memory(machine.shared_memory_of(config, count))
    yield machine.disk("temporary disk", Path(tempfile.gettempdir()))  # mostly Ray's
    if config is not None:
        name = "output disk" if is_local(config.output) else "journal disk"
        folder = local_path(config.output) if is_local(config.output) else journal_folder(config.folder)
        yield machine.disk(name, folder)
        if config.data.cache.folder is not None:
            yield machine.disk("cache disk", local_path(config.data.cache.folder))
    yield machine.open_files()
    yield machine.locked_memory()
    yield machine.rendezvous()
    yield services.ray_cluster(config)
    yield services.ray_token(config)
    if config is None:
        yield skipped("storage", "give --config to check a run's output and sources")
    else:
        storage = services.impatient_storage(config)
        yield services.output(config, storage)
        yield from services.sources(config, storage)
    yield services.mlflow(config)
    store = os.environ.get("AWS_ENDPOINT_URL")
    yield services.clock(services.servers(config) if config else [store] if store else [])


def as_text(results: list[Diagnosis]) -> str:
    """Format one line per check, followed by the remedy of a failed one."""
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        lines.append(f"{result.status:<9}  {result.name:<{width}}  {result.detail}")
        if result.remedy:
            lines.append(f"{'':<9}  {'':<{width}}  → {result.remedy}")
    return "\n".join(lines)
