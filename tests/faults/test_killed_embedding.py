"""`mome embed` killed repeatedly with SIGKILL: the same command then writes what one undisturbed call writes."""

import json
import os
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


def embed(shards: str, checkpoint: str, out: Path, kill_after: int | None = None) -> dict[str, Any] | int:
    """Run `mome embed`; return its result, or the number of shards done by a process killed after so many."""
    command = [sys.executable, "-m", "jobs.cli", "embed", shards, "--checkpoint", checkpoint, "--out", str(out)]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    process = subprocess.Popen([*command, "--json"], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    if kill_after is None:
        printed, log = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, log
        assert "shards finished, of" in log
        return json.loads(printed)
    deadline = time.monotonic() + SECONDS
    while len(list((out / DONE).glob("*.json"))) < kill_after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    return len(list((out / DONE).glob("*.json")))


@pytest.mark.slow
def test_killed_embedding_resumes_to_equal_files(tmp_path: Path) -> None:
    config, checkpoint = untrained_weights(tmp_path)
    samples = iter_samples(Storage(), config.sources["scenes"].shards)
    shards, one, other = str(tmp_path / "shards"), tmp_path / "whole", tmp_path / "killed"
    write_shards(Storage(), ({"__key__": sample.key, **sample.members} for sample in samples), shards, 1)
    whole, done = embed(shards, checkpoint, one), 0
    for records in AFTER:
        done = embed(shards, checkpoint, other, records)
        assert records <= done < SHARDS, "killed in the middle"
    finished = [next(other.glob(f"{record.stem}.parquet")) for record in (other / DONE).glob("*.json")]
    before = {file: file.stat().st_mtime_ns for file in finished}
    resumed = embed(shards, checkpoint, other)
    assert {file: file.stat().st_mtime_ns for file in finished} == before, "what was finished is not written again"
    assert (whole["shards"], whole["already_done"], resumed["already_done"]) == (SHARDS, 0, done)
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names, "nothing is left over"
    files = [name for name in names if name.endswith(".parquet")]
    assert len(files) == SHARDS
    assert all(parquet.read_table(other / name) == parquet.read_table(one / name) for name in files)
