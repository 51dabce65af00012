"""`mome embed` killed repeatedly with SIGKILL: the same command then writes what one undisturbed call writes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

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


def start_embedding(shards: str, checkpoint: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", "embed", shards, "--checkpoint", checkpoint, "--out", str(out)]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen([*command, "--json"], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_killed_embedding_resumes_to_equal_files(tmp_path: Path) -> None:
    config, checkpoint = untrained_weights(tmp_path)
    samples = iter_samples(Storage(), config.sources["scenes"].shards)
    shards, one, other = str(tmp_path / "shards"), tmp_path / "whole", tmp_path / "killed"
    write_shards(Storage(), ({"__key__": sample.key, **sample.members} for sample in samples), shards, 1)
    for kill_after in AFTER:
        process, deadline = start_embedding(shards, checkpoint, other), time.monotonic() + SECONDS
        while len(list((other / DONE).glob("*.json"))) < kill_after and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.communicate()
        records = list((other / DONE).glob("*.json"))
        assert kill_after <= len(records) < SHARDS, "killed in the middle"
    before = {record: (other / f"{record.stem}.parquet").stat().st_mtime_ns for record in records}
    results = []
    for out in (one, other):
        printed, log = (process := start_embedding(shards, checkpoint, out)).communicate(timeout=SECONDS)
        assert process.returncode == 0, log
        assert "shards finished, of" in log
        results.append(json.loads(printed))
    times = {record: (other / f"{record.stem}.parquet").stat().st_mtime_ns for record in records}
    assert times == before, "what was finished is not written again"
    whole, resumed, done = *results, len(records)
    assert (whole["shards"], whole["already_done"], resumed["already_done"]) == (SHARDS, 0, done)
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names, "nothing is left over"
    files = [name for name in names if name.endswith(".parquet")]
    assert len(files) == SHARDS
    assert all(parquet.read_table(other / name) == parquet.read_table(one / name) for name in files)
