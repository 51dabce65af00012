"""Output of the shards commands: the progress bar, the facts of a manifest, and one JSON object for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.console import echo
from pipeline.data.shards.manifest import Manifest

T = TypeVar("T")


class ShardProgress(Progress):
    """Progress bar on standard error: samples read, then shards done. Shown on a terminal only."""

    def __init__(self, action: str) -> None:
        text = TextColumn("{task.description}")
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=Console(stderr=True), transient=True)
        self._action, self._bar = action, self.add_task("starting", total=None)

    def count(self, samples: Iterator[T]) -> Iterator[T]:
        """Yield the samples and show their number."""
        for number, sample in enumerate(samples, 1):
            self.update(self._bar, description="reading samples", completed=number)
            yield sample

    def shard(self, done: int, total: int, name: str) -> None:
        """Show a finished shard; `total` is 0 while it is unknown."""
        if total:
            self.update(self._bar, description=f"{self._action} {name}", completed=done, total=total)


def manifest_facts(manifest: Manifest, url: str) -> dict[str, Any]:
    """Return a manifest's totals as a JSON object."""
    return {
        "url": url,
        "shards": len(manifest.shards),
        "num_samples": manifest.num_samples,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "manifest": manifest.digest,
    }


def report_manifest(manifest: Manifest, url: str, as_json: bool, more: dict[str, Any]) -> None:
    """Print a manifest's totals and the command's own facts."""
    facts = manifest_facts(manifest, url) | more
    if as_json:
        echo(json.dumps(facts, ensure_ascii=False))
        return

    def counted(count: int, noun: str) -> str:
        return f"{count:,} {noun}" + ("" if count == 1 else "s")

    left_out = f", {facts['left_out']} left out" if facts.get("left_out") else ""
    totals = f"{counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
    echo(f"{totals} at {url}{left_out}")
    if "images" in facts:
        parts = [counted(facts[f"{noun}s"], noun) for noun in ("image", "caption") if facts[f"{noun}s"]]
        notes = [
            (facts["without_caption"], "image", "without a caption"),
            (facts["animated"], "animated image", "(first frame)"),
        ]
        suffix = "".join(f"; {counted(count, noun)} {note}" for count, noun, note in notes if count)
        echo(", ".join([*parts, f"{facts['bytes'] / 1e6:,.1f} MB"]) + suffix)
    if trusted := facts.get("trusted"):
        echo(f"{trusted} of the shards were counted by another tool and are read on first use")
    echo(f"inspect them: mome shards show {url} --sheet sheet.png")
