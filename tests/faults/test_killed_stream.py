"""A data stream killed at random moments and restarted on random world sizes equals the uninterrupted one (C1, C4).

MOME_KILLS=100 python -m pytest tests/faults/test_killed_stream.py
"""

import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.config.schema import RunConfig
from tests.support import data_stream
from tests.support.data_stream import caption_tokenizer, copy_shards, record, stream_config, whole_lines

KILLS = int(os.environ.get("MOME_KILLS", "3"))
WORLDS = (1, 2, 3, 4)
SECONDS = 120.0


class Run:
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
    run = Run(stream_config(copy_shards(folder, s3), s3.config, **loading), tmp_path)
    draw, before, killed = random.Random(11), shared_memory(), Counter()
    while killed.total() < KILLS:
        if run.process is None or run.process.poll() is not None:
            assert run.process is None or killed["rank"], "the stream ended by itself"
            run.start(draw.choice(WORLDS))
        reached = run.steps
        if draw.random() < 0.8:  # else it may be killed while it starts
            end = time.monotonic() + SECONDS
            while run.steps == reached and run.process.poll() is None:
                assert time.monotonic() < end, f"waited {SECONDS} s for a batch"
                time.sleep(0.02)
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
    run.start(draw.choice(WORLDS), total)
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
