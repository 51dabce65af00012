"""`mome bench loader`: what a sample costs, in CPU time, by our loader and by those people run instead.

Every contender reads the same shards in a process of its own, in turn, over several rounds, so that whatever else
the machine does falls on all of them. Figures are medians over rounds; `spread` holds the lowest and the highest.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from jobs.bench.contender import Job
from jobs.bench.parts import CORE
from jobs.bench.peers import PEERS
from jobs.bench.photos import write_photos
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.urls import is_local
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage

PACKAGES = ("webdataset", "ray", "pillow", "torch", "simplejpeg", "opencv-python-headless", "tokenizers")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1") | {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}
VOCABULARY_SIZE = 8192
TOLD_LINES = 12  # of a failed contender's output
KEYS = ("samples_per_core_second", "cpu_seconds_per_1000")

Measurement = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what data: indexed `shards`, or `photos` (folders), or pictures drawn for it."""

    shards: str | None = None
    photos: tuple[Path, ...] = ()
    vocabulary: str | None = None
    samples: int = 2048
    workers: int = 1
    threads: int = 1  # with one of one thread, every contender works on one core
    batch: int = 64
    rand_augment: bool = True  # measured on and off; False: off alone
    rounds: int = 3
    peers: tuple[str, ...] = tuple(PEERS)
    uint8_peers: bool = True  # measure peers a second time without their float32 conversion
    seed: int = 0


def bench_loader(settings: Settings, progress: Progress = lambda told: None) -> dict[str, Any]:
    """Measure everything. Raises ConfigError for settings that cannot be, RunFailed when a contender fails."""
    if unknown := set(settings.peers) - set(PEERS):
        raise ConfigError(f"--peer {', '.join(sorted(unknown))}: unknown; known: {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory(prefix="mome-bench-") as folder:
        job = _prepare(settings, Path(folder), progress)
        runs = dict(_runs(settings, job))
        measured: dict[str, list[Measurement]] = {label: [] for label in runs}
        for number in range(settings.rounds):
            for label in _rotated(list(runs), number):
                progress(f"round {number + 1} of {settings.rounds}: {label}")
                measured[label].append(run_job(runs[label], Path(folder)))
        return _summary(settings, job, measured)


def run_job(job: Job, folder: Path) -> Measurement:
    """Measure one contender in a fresh interpreter pinned to one thread per worker."""
    asked, answer = folder / "job.json", folder / "result.json"
    asked.write_text(json.dumps(asdict(job)))
    answer.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.bench.contender", str(asked), str(answer)],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        told, _ = process.communicate()
    finally:
        if process.poll() is None:  # this command is being stopped: what the contender started ends with it
            process.send_signal(signal.SIGINT)
            process.wait()
    if process.returncode or not answer.exists():
        last = "\n".join(told.strip().splitlines()[-TOLD_LINES:])
        raise RunFailed(f"{job.contender} ended with status {process.returncode} and no measurement:\n{last}")
    return json.loads(answer.read_text())


def _prepare(settings: Settings, folder: Path, progress: Progress) -> Job:
    """The shards and the vocabulary on this machine, as the job of our loader with RandAugment."""
    storage, shards = Storage(), settings.shards
    workers = max(1, settings.workers) * settings.threads
    if shards is None:
        progress("writing shards")
        shards = str(folder / "shards")
        write_photos(storage, settings.photos, shards, settings.samples, at_least=workers)
    if not is_local(shards):
        raise ConfigError(f"--shards {shards}: the peers read local files only (webdataset has no reader for s3://)")
    found = len(load_manifest(storage, shards).shards)
    if found < workers:
        raise ConfigError(f"{shards} has {found} shards; peers give each of {workers} workers one. Use fewer workers")
    vocabulary = settings.vocabulary
    if vocabulary is None:
        progress("training a vocabulary")
        vocabulary = str(folder / "vocabulary.txt")
        Tokenizer.train(iter_captions(storage, shards), VOCABULARY_SIZE).save(storage, vocabulary)
    return Job(
        contender="mome",
        shards=shards,
        vocabulary=vocabulary,
        samples=settings.samples,
        batch=settings.batch,
        workers=settings.workers,
        threads=settings.threads,
        seed=settings.seed,
        operations=2 if settings.rand_augment else 0,
        normalise=True,
    )


def _runs(settings: Settings, job: Job) -> Iterator[tuple[str, Job]]:
    """Every measurement of a round by its label: `contender`, `contender/off`, `contender/uint8`."""
    for operations in dict.fromkeys((job.operations, 0)):
        mark = "" if operations == job.operations else "/off"
        for contender in ("mome", "parts", *settings.peers):
            yield contender + mark, replace(job, contender=contender, operations=operations)
    for contender in settings.peers if settings.uint8_peers else ():
        yield f"{contender}/uint8", replace(job, contender=contender, normalise=False)
    yield "wait", replace(job, contender="wait")


def _rotated(labels: list[str], by: int) -> list[str]:
    by %= len(labels)
    return labels[by:] + labels[:by]


def _summary(settings: Settings, job: Job, measured: dict[str, list[Measurement]]) -> dict[str, Any]:
    contenders = ("mome", *settings.peers)
    result = _table({name: measured[name] for name in contenders})
    result |= _against_parts(measured["mome"], measured["parts"])
    if settings.rand_augment:
        off = _table({name: measured[f"{name}/off"] for name in contenders})
        result["without_rand_augment"] = off | _against_parts(measured["mome/off"], measured["parts/off"])
    if settings.uint8_peers and settings.peers:
        result["uint8_peers"] = _table({name: measured[f"{name}/uint8"] for name in settings.peers})
    if "ray_data" in settings.peers:
        daemons = [1000 * run["cpu"]["daemons"] / run["samples"] for run in measured["ray_data"]]
        result["ray_daemons_cpu_seconds_per_1000"] = median(daemons)  # not in ray_data's figures above
    for key in ("wait_share", "next_share"):
        result[key] = median(run[key] for run in measured["wait"])
    result["settings"] = _told_settings(settings, job) | {
        "outputs": {name: measured[name][0]["output"] for name in contenders}
    }
    return result


def _table(measured: dict[str, list[Measurement]]) -> dict[str, Any]:
    """The figures of some contenders, and how many times ours is faster where it is among them."""
    cost = {name: [1000 * run["cpu"]["work"] / run["samples"] for run in runs] for name, runs in measured.items()}
    rate = {name: [1000 / seconds for seconds in costs] for name, costs in cost.items()}
    table: dict[str, Any] = {
        "samples_per_core_second": {name: median(rates) for name, rates in rate.items()},
        "cpu_seconds_per_1000": {name: median(costs) for name, costs in cost.items()},
        "spread": {name: [min(rates), max(rates)] for name, rates in rate.items()},
        "samples_per_second": {
            name: median(run["samples"] / run["seconds"] for run in runs) for name, runs in measured.items()
        },
    }
    if ours := rate.get("mome"):
        peers = {name: rates for name, rates in rate.items() if name != "mome"}
        table["times_faster"] = {
            name: median(our / their for our, their in zip(ours, rates, strict=True)) for name, rates in peers.items()
        }
    return table


def _against_parts(ours: list[Measurement], parts: list[Measurement]) -> dict[str, Any]:
    """Milliseconds of a sample by part; our cost over the sum of decode, crop, augment and tokenise (1 is perfect)."""
    milliseconds = {name: median(run["parts"][name] for run in parts) for name in parts[0]["parts"]}
    costs = [1000 * run["cpu"]["work"] / run["samples"] for run in ours]
    sums = [sum(run["parts"][name] for name in CORE) for run in parts]
    totals = [sum(run["parts"].values()) for run in parts]
    return {
        "parts": milliseconds,
        "overhead_over_parts": median(cost / total for cost, total in zip(costs, sums, strict=True)),
        "overhead_over_all_parts": median(cost / total for cost, total in zip(costs, totals, strict=True)),
        "decode_limit": median(run["decode_limit"] for run in parts),
    }


def _told_settings(settings: Settings, job: Job) -> dict[str, Any]:
    data = settings.shards or ", ".join(str(folder) for folder in settings.photos) or "drawn 640x480 JPEGs"
    return {
        "data": data,
        "samples": settings.samples,
        "batch": settings.batch,
        "rounds": settings.rounds,
        "workers": settings.workers,
        "threads": settings.threads,
        "peer_processes": job.work.workers,
        "crop_scale": list(job.config.data.augment.crop_scale),
        "image_size": job.config.model.image_size,
        "rand_augment": [job.operations, job.config.data.augment.magnitude] if settings.rand_augment else None,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load": os.getloadavg()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
