"""`mome embed` killed repeatedly with SIGKILL: the same command then writes what one undisturbed call writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from pipeline.data.building.importers import write_shards
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from pipeline.evaluation.embedding import DONE
from tests.support.finished_run import untrained_weights
from tests.support.train_process import ROOT, SECONDS

SHARDS = 60
AFTER = (5, 20)  # number of records after which each process is killed


class Embedding:
    """A `mome embed` process."""

    def __init__(self, shards: str, checkpoint: str, out: Path):
        command = [sys.executable, "-m", "jobs.cli", "embed", shards, "--checkpoint", checkpoint, "--out", str(out)]
        self._out = out
        self.process = subprocess.Popen(
            [*command, "--json"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def records(self) -> int:
        return len(list((self._out / DONE).glob("*.json")))

    def kill_at(self, records: int) -> int:
        """Send SIGKILL once `records` shards are done; return the number done in the end."""
        deadline = time.monotonic() + SECONDS
        while self.records() < records and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        return self.records()

    def result(self) -> dict[str, Any]:
        out, log = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, log
        assert "shards finished, of" in log
        return json.loads(out)


@pytest.mark.slow
def test_killed_embedding_resumes_to_equal_files(tmp_path: Path) -> None:
    config, checkpoint = untrained_weights(tmp_path)
    samples = (
        {"__key__": sample.key, **sample.members} for sample in iter_samples(Storage(), config.sources["scenes"].shards)
    )
    shards = str(tmp_path / "shards")
    write_shards(Storage(), samples, shards, 1)
    whole = Embedding(shards, checkpoint, tmp_path / "whole").result()
    done = 0
    for records in AFTER:
        done = Embedding(shards, checkpoint, tmp_path / "killed").kill_at(records)
        assert records <= done < SHARDS, "killed in the middle"
    resumed = Embedding(shards, checkpoint, tmp_path / "killed").result()
    assert (whole["shards"], whole["already_done"], resumed["already_done"]) == (SHARDS, 0, done)
    files = sorted(file.name for file in (tmp_path / "whole").glob("*.parquet"))
    assert len(files) == SHARDS
    whole_names, killed_names = (
        sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("whole", "killed")
    )
    assert killed_names == whole_names, "nothing is left over"
    for name in files:
        assert parquet.read_table(tmp_path / "killed" / name) == parquet.read_table(tmp_path / "whole" / name)
