"""Killed processes: of a data stream (C1) and a run (C4), readers that share a node cache, and `mome embed`.

MOME_KILLS=100 python -m pytest tests/faults/test_killed_processes.py
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest

from pipeline.config.schema import RunConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.reading import cache as module
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.samples import iter_samples
from pipeline.data.storage import Storage
from pipeline.evaluation.embedding import DONE
from tests.support import data_stream
from tests.support.cache_reader import SIZE, fill, held_bytes, open_checked, read_files, start_reader
from tests.support.data_stream import caption_tokenizer, copy_shards, record, stream_config, whole_lines
from tests.support.finished_run import untrained_weights
from tests.support.journals import assert_tracked_once
from tests.support.train_process import ROOT, SECONDS, STAGES, TrainProcess, is_rank, run_module, wait_until

KILLS = int(os.environ.get("MOME_KILLS", "3"))


class Stream:
    """The process of a data stream and its record."""

    def __init__(self, config: RunConfig, folder: Path):
        self.record, self._files = folder / "record", (folder / "config.json", folder / "vocab.txt")
        self._files[0].write_text(config.model_dump_json(), encoding="utf-8")
        self._files[1].write_bytes(caption_tokenizer().vocabulary_file)
        self.process: psutil.Popen | None = None

    @property
    def steps(self) -> int:
        return len(whole_lines(self.record))

    def start(self, world: int, last: int = 1_000_000) -> None:
        arguments = map(str, [data_stream.__file__, *self._files, world, self.steps, last, self.record])
        self.process = psutil.Popen([sys.executable, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})

    def kill(self) -> None:
        """Send SIGKILL to the process; its loader processes must notice and end."""
        orphans = self.process.children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(orphans, timeout=20)
        assert not alive, f"loader processes outlived their rank: {alive}"


def shared_memory() -> set[str]:
    """Return the shared-memory files that no living process has mapped, so that other test processes' do not count."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped |= {line.rpartition("/")[2] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")} - mapped


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_killed_stream_equals_uninterrupted_stream(s3, make_pairs, tmp_path: Path):
    folder, cache = make_pairs("pairs", [17, 9, 24, 11, 30, 9]), tmp_path / "cache"
    loading = {"loader": {"num_workers": 2, "threads_per_worker": 2}, "cache": {"folder": str(cache)}}
    run = Stream(stream_config(copy_shards(folder, s3), s3.config, **loading), tmp_path)
    draw, before, killed = random.Random(11), shared_memory(), Counter()
    while killed.total() < KILLS:
        if run.process is None or run.process.poll() is not None:
            assert run.process is None or killed["rank"], "the stream ended by itself"
            run.start(draw.randint(1, 4))
        reached = run.steps
        if draw.random() < 0.8:  # else it may be killed while it starts
            wait_until(lambda: run.steps > reached or run.process.poll() is not None, "a batch", pause=0.02)  # noqa: B023
        time.sleep(draw.uniform(0, 0.8))
        assert run.process.poll() is None, "the stream ended by itself"
        if draw.random() < 0.7:
            run.kill()
            killed["rank"] += 1
        else:  # of a loader process; the stream must continue
            if victims := run.process.children(recursive=True):
                draw.choice(victims).kill()
            killed["loader process"] += 1
    if run.process.poll() is None:
        run.kill()
    total = run.steps + 5
    run.start(draw.randint(1, 4), total)
    assert run.process.wait(timeout=SECONDS) == 0
    print(f"{dict(killed)} kills over {total} steps")

    record(stream_config(folder), caption_tokenizer(), 1, range(total), tmp_path / "uninterrupted")
    assert whole_lines(run.record) == whole_lines(tmp_path / "uninterrupted")
    read = Counter(word for line in whole_lines(run.record) for word in line.split()[2:])
    assert set(read.values()) == {1}, "a sample was read twice in one epoch"
    epochs = Counter(int(word.partition(":")[0]) for word in read)
    assert all(epochs[epoch] == 100 for epoch in range(max(epochs) - 1)), "a sample was left out of an epoch"
    assert shared_memory() <= before, "shared memory was left behind"
    assert not [file for file in cache.rglob("*") if file.name.endswith(".part")]


@pytest.mark.parametrize("processes", [1, 3])
def test_cache_is_consistent_after_random_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int):
    """Other processes keep reading, and the whole budget can be used after the last kill."""
    monkeypatch.setattr(module, "PIECE", 2_000)
    store, chance = fill(tmp_path / "store", 12), random.Random(processes)
    cache = NodeCache(tmp_path / "cache", 8 * SIZE)
    running = [start_reader(cache, store, seed) for seed in range(processes)]
    for kill in range(8):
        wait_until(lambda: list(cache.folder.glob("*.part")), "a download", pause=0.0)
        time.sleep(chance.uniform(0, 0.1) if kill % 2 else 0.0)
        victim = running.pop(0)
        assert victim.poll() is None, "a process that was not killed has ended"
        victim.kill()
        victim.wait()
        assert held_bytes(cache) <= cache.max_bytes
        if processes == 1:
            read_files(following := NodeCache(tmp_path / "cache", 8 * SIZE), store, kill, 5)
            assert not list(following.folder.glob("*.part")), "a killed process's download stayed"
        running.append(start_reader(cache, store, 100 + kill))
    time.sleep(0.5)
    for process in running:
        assert process.poll() is None
        process.kill()
        process.wait()
    last = NodeCache(tmp_path / "cache", 8 * SIZE)
    shards = [open_checked(last, store, f"{number}") for number in range(8)]
    assert held_bytes(last) == 8 * SIZE
    assert {path.name for path in last.folder.iterdir()} == {"lock", *(shard.path.name for shard in shards)}


SHARDS = 60


@pytest.mark.slow
def test_killed_embedding_resumes_to_equal_files(tmp_path: Path) -> None:
    config, checkpoint = untrained_weights(tmp_path)
    samples = iter_samples(Storage(), config.sources["scenes"].shards)
    shards, one, other = str(tmp_path / "shards"), tmp_path / "whole", tmp_path / "killed"
    write_shards(Storage(), ({"__key__": sample.key, **sample.members} for sample in samples), shards, 1)
    command = ["jobs.cli", "embed", shards, "--checkpoint", checkpoint, "--json", "--out"]
    for kill_after in (5, 20):  # records
        process = subprocess.Popen([sys.executable, "-m", *command, str(other)], cwd=ROOT, stderr=subprocess.DEVNULL)
        while len(list((other / DONE).glob("*.json"))) < kill_after and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        records = list((other / DONE).glob("*.json"))
        assert kill_after <= len(records) < SHARDS, "killed in the middle"
    before = {record: (other / f"{record.stem}.parquet").stat().st_mtime_ns for record in records}
    results = []
    for out in (one, other):
        done = run_module(*command, str(out))
        assert done.returncode == 0, done.stderr
        assert "shards finished, of" in done.stderr
        results.append(json.loads(done.stdout))
    times = {record: (other / f"{record.stem}.parquet").stat().st_mtime_ns for record in records}
    assert times == before, "what was finished is not written again"
    assert [result["already_done"] for result in results] == [0, len(records)]
    assert results[0]["shards"] == SHARDS
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names, "nothing is left over"
    files = [name for name in names if name.endswith(".parquet")]
    assert len(files) == SHARDS
    assert all(parquet.read_table(other / name) == parquet.read_table(one / name) for name in files)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rank_killed_in_every_stage_changes_no_loss(tmp_path: Path) -> None:
    whole = TrainProcess(tmp_path, "whole", 12).start().finish()
    killed, kills = TrainProcess(tmp_path, "killed", 12).start(), 0
    while kills < len(STAGES) and killed.running():
        if kills * 12 + 6 <= killed.step() < (kills + 1) * 12:
            children = psutil.Process(killed.process.pid).children(recursive=True)
            if ranks := [child for child in children if is_rank(child)]:
                ranks[kills % len(ranks)].kill()
                kills += 1
        time.sleep(0.02)
    killed.finish()
    assert kills == len(STAGES)
    assert len(whole.losses()) == len(STAGES) * 12
    assert killed.losses() == whole.losses()
    assert killed.restart_causes() == ["failed"] * kills
    assert_tracked_once(killed, tmp_path, attempts=kills + 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_process_killed_twice_is_one_mlflow_run(tmp_path: Path) -> None:
    run = TrainProcess(tmp_path, "killed", 8)
    for step in (5, 12):
        run.start("pipeline.training").wait_for(lambda: run.step() >= step, f"step {step}")  # noqa: B023
        run.kill()
    run.start("pipeline.training").finish()
    assert_tracked_once(run, tmp_path, attempts=3)
