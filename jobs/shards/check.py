"""`mome shards check`: what training would quarantine or refuse, found out ahead of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from jobs.console import echo
from jobs.output import list_of_findings
from jobs.shards.report import ShardProgress, print_json
from pipeline.config.schema import SourceType
from pipeline.data.shards.check import ShardFinding, ShardReport, check_shards
from pipeline.data.storage import Storage

BROKEN, BAD = 1, 3  # exit statuses
_LISTED = 20  # broken shards named on the screen


def check_folder(url: str, source_type: str, report: Path | None, max_pixels: int, workers: int, as_json: bool) -> int:
    """Check the shards at `url`, print the findings and return the exit status."""
    summary = _Summary()
    with ShardProgress("checking") as progress, ExitStack() as stack:
        lines = stack.enter_context(list_of_findings(report, "--report")) if report else None
        for shard in check_shards(Storage(), url, cast(SourceType, source_type), max_pixels, workers, progress.shard):
            summary.add(shard)
            if lines is not None:
                lines.writelines(_line(found) for found in _findings(shard))
    if as_json:
        print_json(summary.as_json(url, report))
    else:
        _print_summary(summary, url, report)
    return BROKEN if summary.broken else BAD if summary.bad else 0


@dataclass
class _Summary:
    shards: int = 0
    samples: int = 0
    broken: list[ShardFinding] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # of bad samples
    skipped: Counter[str] = field(default_factory=Counter)  # entries that are no sample's, by what they are
    examples: dict[str, ShardFinding] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return self.kinds.total()

    def add(self, report: ShardReport) -> None:
        self.shards += 1
        self.samples += report.samples
        self.skipped.update(report.skipped)
        if report.broken:
            self.broken.append(report.broken)
        for finding in report.bad:
            self.kinds[finding.kind] += 1
            self.examples.setdefault(finding.kind, finding)

    def as_json(self, url: str, report: Path | None) -> dict[str, object]:
        return {
            "url": url,
            "shards": self.shards,
            "num_samples": self.samples,
            "bad_samples": self.bad,
            "kinds": dict(self.kinds.most_common()),
            "broken_shards": {finding.shard: finding.reason for finding in self.broken},
            "report": str(report) if report else None,
            **({"skipped": dict(self.skipped.most_common())} if self.skipped else {}),
        }


def _findings(report: ShardReport) -> Iterator[ShardFinding]:
    yield from report.bad
    if report.broken:
        yield report.broken


def _line(finding: ShardFinding) -> bytes:
    return f"{json.dumps(asdict(finding), ensure_ascii=False)}\n".encode()


def _print_summary(summary: _Summary, url: str, report: Path | None) -> None:
    echo(f"{summary.samples} samples in {summary.shards} shards at {url}")
    echo(f"{len(summary.broken)} broken shards, {summary.bad} bad samples")
    for finding in summary.broken[:_LISTED]:
        echo(f"  {finding.shard}: {finding.reason}")
    if len(summary.broken) > _LISTED:
        echo(f"  … and {len(summary.broken) - _LISTED} more")
    for kind, count in summary.kinds.most_common():
        example = summary.examples[kind]
        echo(f"  {count:>8}  {kind:<50}  {example.key} in {example.shard}")
    for kind, count in summary.skipped.most_common():
        echo(f"  {count:>8}  passed over, no sample's: {kind}")
    if report:
        echo(f"every one of them: {report}")
