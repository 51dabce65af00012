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
from typing import Any

import psutil

from pipeline.config.background import in_background
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join
from pipeline.tracking.journal import Journal
from tests.support.journals import all_records

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vision", "language", "vision_language")
SECONDS = 900


class TrainProcess:
    """One run: its process, while there is one, and its journal. Runs of one folder share its data."""

    def __init__(
        self, folder: Path, name: str, steps: int, *more: str, output: str | None = None,
        environment: Mapping[str, str] | None = None, storage: StorageConfig = StorageConfig(),
    ) -> None:  # fmt: skip
        """Store the command. `output`: URL of a bucket instead of `folder`, which the test reads through `storage`."""
        self.folder, self.name, output = folder, name, output or str(folder)
        self.url, self.storage = join(output, name), Storage(storage)
        keys = [f"stages.{stage}.{key}" for stage in STAGES for key in (f"steps={steps}", "global_batch_size=16")]
        keys += ["model.init_std=0.02", "model.width=32", "model.layers=2", "model.heads=2"]
        keys += ["checkpoint.every=4", "tracking.metrics_every=1", f"output={output}", f"name={name}"]
        keys += ["sources.scenes.synthetic.scenes=300", "sources.unseen.synthetic.scenes=20"]
        keys += [f"sources.{source}.shards={output}/scenes" for source in ("scenes", "pictures", "sentences")]
        keys += [f"sources.unseen.shards={output}/unseen", "cluster.max_failures=5", "evaluation.source=null"]
        self.arguments = [str(ROOT / "configs" / "demo.yaml"), *keys, *more]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOME_CACHE": str(folder), **(environment or {})}
        self.log = folder / f"{name}.log"
        is_local = output == str(folder)
        self.journal = folder / (name if is_local else hashlib.sha256(self.url.encode()).hexdigest()[:16]) / "journal"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> TrainProcess:
        """Start `mome train`, or another command: `pipeline.training` is one process without Ray."""
        with self.log.open("ab") as log:
            words = [sys.executable, "-m", *(command or ("jobs.cli", "train")), *self.arguments]
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=self.environment)
        return self

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until a condition is true or the run has ended."""
        wait_until(lambda: condition() or not self.running(), what)

    def status(self) -> int:
        """Wait for the end of the run and return its exit status."""
        assert self.process is not None
        return self.process.wait(timeout=SECONDS)

    def finish(self) -> TrainProcess:
        """Wait for the end of the run, and assert that it is a success."""
        try:
            assert self.status() == 0, self.log_text()[-3000:]
        finally:
            self.kill()
        return self

    def kill(self) -> None:
        """Send SIGKILL to the driver alone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def losses(self) -> dict[tuple[int, int], float]:
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
        files = [join(self.url, "restarts", name) for name in sorted(self.storage.list(join(self.url, "restarts")))]
        return [json.loads(self.storage.read(file))["cause"] for file in files]


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


def run_module(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` from the checkout until its end, without Ray's variables of this process."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    options: Any = {"env": {**known, "OMP_NUM_THREADS": "1", **environment}, "timeout": SECONDS, "check": False}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, **options)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = SECONDS, pause: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(pause)


def send_signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
