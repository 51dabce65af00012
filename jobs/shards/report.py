"""What the commands on shards tell: a line of progress, the facts of a manifest, one JSON object for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.console import echo
from pipeline.data.shards.manifest import Manifest

T = TypeVar("T")


class ShardProgress:
    """A line on standard error: samples read, then shards done. Silent where nobody looks on."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> ShardProgress:
        said = TextColumn("{task.description}")
        columns = (SpinnerColumn(), said, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def count(self, samples: Iterator[T]) -> Iterator[T]:
        for number, sample in enumerate(samples, 1):
            self._bar.update(self._task, description="reading samples", completed=number)
            yield sample

    def shard(self, done: int, total: int, name: str) -> None:
        """`total` is 0 while shards are written, whose number nobody knows yet."""
        if total:
            self._bar.update(self._task, description=f"{self._doing} {name}", completed=done, total=total)


def manifest_facts(manifest: Manifest, url: str) -> dict[str, Any]:
    return {
        "url": url,
        "shards": len(manifest.shards),
        "num_samples": manifest.num_samples,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "manifest": manifest.digest,
    }


def report_manifest(manifest: Manifest, url: str, as_json: bool, more: dict[str, Any]) -> None:
    facts = manifest_facts(manifest, url) | more
    if as_json:
        print_json(facts)
        return
    left_out = f", {facts['left_out']} left out" if facts.get("left_out") else ""
    echo(f"{_counted(manifest.num_samples, 'sample')} in {_counted(len(manifest.shards), 'shard')} at {url}{left_out}")
    if "images" in facts:
        size = f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB"
        counts = [(facts["images"], "image"), (facts["captions"], "caption")]
        contents = ", ".join([*(_counted(count, noun) for count, noun in counts if count), size])
        notes = [
            (facts["without_caption"], "image", "without a caption"),
            (facts["animated"], "animated image", "(first frame)"),
        ]
        told = "".join(f"; {_counted(count, noun)} {note}" for count, noun, note in notes if count)
        echo(f"{contents}{told}")
    if trusted := facts.get("trusted"):
        echo(f"{trusted} of the shards were counted by another tool; each is read when it is first needed")
    echo(f"look at them: mome shards show {url} --sheet sheet.png")


def _counted(count: Any, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def print_json(facts: dict[str, object]) -> None:
    echo(json.dumps(facts, ensure_ascii=False))
