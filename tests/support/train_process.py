"""A tiny version of the demo's three stages run by `mome train` in a process, and what its journal records."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline.config.background import in_background
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join
from pipeline.tracking.journal import Journal
from tests.support.journals import all_records

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vision", "language", "vision_language")
SECONDS = 900

Losses = dict[tuple[int, int], float]


def overrides(folder: Path | str, name: str, steps: int) -> list[str]:
    """Return overrides that place everything below `folder`, a path or URL; runs of one folder share its data."""
    keys = [f"stages.{stage}.{key}" for stage in STAGES for key in (f"steps={steps}", "global_batch_size=16")]
    keys += ["model.width=32", "model.layers=2", "model.heads=2"]
    keys += ["checkpoint.every=4", "tracking.metrics_every=1", f"output={folder}", f"name={name}"]
    keys += ["sources.scenes.synthetic.scenes=300", "sources.unseen.synthetic.scenes=20"]
    keys += [f"sources.{source}.shards={folder}/scenes" for source in ("scenes", "pictures", "sentences")]
    keys += [f"sources.unseen.shards={folder}/unseen", "cluster.max_failures=5", "evaluation.source=null"]
    return keys


class TrainProcess:
    """One run: its process, while there is one, and its journal."""

    def __init__(
        self, folder: Path, name: str, steps: int, *more: str, output: str | None = None,
        environment: Mapping[str, str] | None = None, storage: StorageConfig = StorageConfig(),
    ) -> None:  # fmt: skip
        """Store the command. `output`: URL of a bucket instead of `folder`, which the test reads through `storage`."""
        self.folder, self.name = folder, name
        self.url, self.storage = join(output or str(folder), name), Storage(storage)
        self.arguments = [str(ROOT / "configs" / "demo.yaml"), *overrides(output or folder, name, steps), *more]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOME_CACHE": str(folder), **(environment or {})}
        self.log = folder / f"{name}.log"
        self.journal = folder / name / "journal"
        if output is not None:
            self.journal = folder / hashlib.sha256(self.url.encode()).hexdigest()[:16] / "journal"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> TrainProcess:
        """Start `mome train`, or another module's command."""
        with self.log.open("ab") as log:
            words = [sys.executable, "-m", *(command or ("jobs.cli", "train")), *self.arguments]
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=self.environment)
        return self

    def start_alone(self) -> TrainProcess:
        """Start the run in one process, without Ray."""
        return self.start("pipeline.training")

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self) -> TrainProcess:
        """Wait for the end of the run, and assert that it is a success."""
        assert self.process is not None
        try:
            assert self.process.wait(timeout=SECONDS) == 0, self.log_text()[-3000:]
        finally:
            self.kill()
        return self

    def kill(self) -> None:
        """Send SIGKILL to the driver alone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def ranks(self) -> list[psutil.Process]:
        """Return the training workers of a Ray cluster that the driver started itself."""
        assert self.process is not None
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if is_rank(child)]

    def sessions(self) -> int:
        """Return the number of processes that have recorded this run."""
        return len(Journal(self.journal).sessions())

    def losses(self) -> Losses:
        """Return (stage, step) -> loss, exactly as the journal has it."""
        records = [r for r in all_records(Journal(self.journal)) if "train/loss" in r.get("values", {})]
        losses = {(record["stage"], record["step"]): record["values"]["train/loss"] for record in records}
        assert len(losses) == len(records), "a step was journaled twice"
        return losses

    def step(self) -> int:
        """Return the number of steps over all stages."""
        return max((step for _, step in self.losses()), default=-1)

    def checkpoints(self) -> list[str]:
        """Return the URLs of committed checkpoints, the newest last."""
        folder = join(self.url, "checkpoints")
        urls = [join(folder, name.rstrip("/")) for name in self.storage.list(folder)]
        return sorted(url for url in urls if self.storage.exists(join(url, "COMMIT.json")))

    def saved_steps(self) -> list[int]:
        """Return the global steps of committed checkpoints, the newest last."""
        return [int(url.rpartition("/step-")[2].partition(".")[0]) for url in self.checkpoints()]

    def restart_causes(self) -> list[str]:
        """Return the causes of the run's restarts, in order."""
        folder = join(self.url, "restarts")
        names = sorted(self.storage.list(folder))
        return [json.loads(self.storage.read(join(folder, name)))["cause"] for name in names]


@contextmanager
def paced(run: TrainProcess, ranks: Callable[[], list[psutil.Process]], seconds_a_step: float = 1.0) -> Iterator[None]:
    """Stop the ranks (SIGSTOP) for a while after each step, so that a fault meets a tiny run before its end."""
    over = threading.Event()

    def pace() -> None:
        reached, resting = run.step(), 0.0
        while not over.wait(0.05):
            if run.step() > reached:
                send_signal(ranks(), signal.SIGSTOP)
                resting = time.monotonic() + seconds_a_step
                reached = run.step()
            elif resting and time.monotonic() > resting:
                send_signal(ranks(), signal.SIGCONT)
                resting = 0.0
        send_signal(ranks(), signal.SIGCONT)

    done = in_background(pace, "pace")
    try:
        yield
    finally:
        over.set()
        done.result()


def send_signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def assert_same_losses(losses: Losses, expected: Losses, tolerance: float = 1e-5) -> None:
    """Assert that both have the same steps, with losses that are equal to a relative `tolerance`."""
    assert losses.keys() == expected.keys()
    worst = max(abs(losses[place] - expected[place]) / abs(expected[place]) for place in expected)
    assert worst <= tolerance, f"a loss differs by {worst:.1e}"
