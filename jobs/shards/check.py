"""`mome shards check`: find what training would quarantine or refuse, before training."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import cast

from jobs.console import echo
from jobs.output import list_of_findings
from jobs.shards.report import ShardProgress
from pipeline.config.schema import SourceType
from pipeline.data.shards.check import ShardFinding, check_shards
from pipeline.data.storage import Storage

BROKEN, BAD = 1, 3  # exit statuses
_MAX_PRINTED = 20  # broken shards


def check_folder(url: str, source_type: str, report: Path | None, max_pixels: int, workers: int, as_json: bool) -> int:
    """Check the shards at `url`, print the summary, and return the exit status of `mome shards check`."""
    shards = samples = 0
    broken: list[ShardFinding] = []
    kinds: Counter[str] = Counter()  # of bad samples
    skipped: Counter[str] = Counter()  # entries that belong to no sample, by kind
    examples: dict[str, ShardFinding] = {}
    with (
        ShardProgress("checking") as progress,
        list_of_findings(report, "--report") if report else nullcontext() as lines,
    ):
        for shard in check_shards(Storage(), url, cast(SourceType, source_type), max_pixels, workers, progress.shard):
            shards += 1
            samples += shard.samples
            skipped.update(shard.skipped)
            broken += [shard.broken] if shard.broken else []
            for finding in shard.bad:
                kinds[finding.kind] += 1
                examples.setdefault(finding.kind, finding)
            findings = (*shard.bad, shard.broken) if shard.broken else shard.bad
            if lines is not None:
                lines.writelines(f"{json.dumps(asdict(f), ensure_ascii=False)}\n".encode() for f in findings)
    if as_json:
        summary = {
            "url": url,
            "shards": shards,
            "num_samples": samples,
            "bad_samples": kinds.total(),
            "kinds": dict(kinds.most_common()),
            "broken_shards": {finding.shard: finding.reason for finding in broken},
            "report": str(report) if report else None,
            **({"skipped": dict(skipped.most_common())} if skipped else {}),
        }
        echo(json.dumps(summary, ensure_ascii=False))
    else:
        echo(f"{samples} samples in {shards} shards at {url}")
        echo(f"{len(broken)} broken shards, {kinds.total()} bad samples")
        for finding in broken[:_MAX_PRINTED]:
            echo(f"  {finding.shard}: {finding.reason}")
        if len(broken) > _MAX_PRINTED:
            echo(f"  … and {len(broken) - _MAX_PRINTED} more")
        for reason, count in kinds.most_common():
            echo(f"  {count:>8}  {reason:<50}  {examples[reason].key} in {examples[reason].shard}")
        for entry, count in skipped.most_common():
            echo(f"  {count:>8}  skipped, not part of a sample: {entry}")
        if report:
            echo(f"all findings: {report}")
    return BROKEN if broken else BAD if kinds else 0
