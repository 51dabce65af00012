"""`mome doctor`: what of this machine, and of what a run speaks to, works here, what does not, and how to mend it.

Each check is a function that returns a `Finding`; none changes anything, except that DeepSpeed's operators are built
where they are not, and that a small object is written to the run's output and deleted.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.doctor import compute, machine, services
from jobs.doctor.finding import Finding, not_asked
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local, local_path
from pipeline.tracking.locations import journal_folder


def examine(config: RunConfig | None, say: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Every check, in the order of what depends on what. `say` is told what is being looked at."""
    findings = []
    for finding in _findings(config):
        findings.append(finding)
        say(finding.name)
    return findings


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {"works": healthy(findings), "findings": [vars(finding) for finding in findings]}


def as_text(findings: list[Finding]) -> str:
    """A line for each, and below one that fails how to mend it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<9}  {finding.name:<{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':<9}  {'':<{width}}  → {finding.mend}")
    return "\n".join(lines)


def healthy(findings: list[Finding]) -> bool:
    return not any(finding.status == "fails" for finding in findings)


def _findings(config: RunConfig | None) -> Iterator[Finding]:
    import torch

    yield machine.packages(machine.requirements())
    seen = compute.driver()
    yield compute.accelerator(config, seen)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield compute.nccl(count)
    yield compute.gloo()
    yield compute.operators()
    yield machine.shared_memory(machine.shared_memory_of(config, count))
    yield from _disks(config)
    yield machine.open_files()
    yield machine.locked_memory()
    yield machine.rendezvous()
    yield services.ray_cluster(config)
    yield services.ray_token(config)
    if config is None:
        yield not_asked("storage", "--config says which output and sources")
    else:
        storage = services.patient(config)
        yield services.output(config, storage)
        yield from services.sources(config, storage)
    yield services.mlflow(config)
    store = os.environ.get("AWS_ENDPOINT_URL")
    yield services.clock(services.servers(config) if config else [store] if store else [])


def _disks(config: RunConfig | None) -> Iterator[Finding]:
    """Where a run writes on this machine: temporary files, Ray's above all, its output or journal, its cache."""
    yield machine.disk("temporary disk", Path(tempfile.gettempdir()))
    if config is None:
        return
    name = "output disk" if is_local(config.output) else "journal disk"
    yield machine.disk(name, local_path(config.output) if is_local(config.output) else journal_folder(config.folder))
    if config.data.cache.folder is not None:
        yield machine.disk("cache disk", local_path(config.data.cache.folder))
