"""Loader processes: the same examples as threads, restarts, and the lifetime of shared memory."""

from __future__ import annotations

import gc
import os
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import DataError, RunFailed
from pipeline.config.schema import RunConfig
from pipeline.data.loading import backends
from pipeline.data.loading.loader import Loader
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import data_config, hash_of, open_loader, take, with_loader

STEPS = 12


def run_config(folder: str) -> RunConfig:
    index_shards(Storage(), folder)
    data = {"streams": 4, "loader": {"num_workers": 2, "threads_per_worker": 2}}
    return data_config({"pairs": folder}, data=data, stage={"steps": STEPS, "global_batch_size": 8})


@pytest.fixture
def config(make_pairs) -> RunConfig:
    return run_config(make_pairs("pairs", [11, 13]))


def children() -> list[int]:
    """Return the ids of the live loader processes of this process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (status.parent / "cmdline").read_bytes()
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"pipeline.data.loading.backends" in command and fields[1] == str(os.getpid()) and fields[0] != "Z":
            found.append(int(status.parent.name))
    return sorted(found)


def test_processes_build_the_same_examples_as_threads(config):
    readers = ((0, 1), (1, 1), (3, 1), (2, 3))
    assert len({hash_of(config, range(1, 6), world, num_workers=workers) for workers, world in readers}) == 1


def test_batch_memory_is_reused_after_its_last_reference(config):
    with open_loader(config) as loader:
        stream = loader.batches(0)
        first = next(stream)
        memory = loader._open[0]  # type: ignore[attr-defined]
        pixels = first.image.clone()
        slots = len(memory._free)
        for _ in range(2 * STEPS):
            next(stream)
        assert torch.equal(first.image, pixels), "a slot was filled again while its batch was in use"
        kept = first.image[3]
        del first
        gc.collect()
        assert torch.equal(kept, pixels[3])
        del kept
        gc.collect()
        assert len(memory._free) == slots + 1
    kept, expected = take(config, STEPS), take(with_loader(config, num_workers=0), STEPS)
    for batch, other in zip(kept, expected, strict=True):  # kept beyond their loader
        assert torch.equal(batch.image, other.image)
        assert torch.equal(batch.masked_text, other.masked_text)


def test_killed_process_is_restarted_without_effect_on_data(config):
    uninterrupted = take(with_loader(config, num_workers=0), STEPS)
    with open_loader(config) as loader:
        batches = loader.batches(0)
        for step, expected in enumerate(uninterrupted):
            assert torch.equal(next(batches).image, expected.image)
            if step in (2, 6):
                os.kill(children()[step % 3 // 2], signal.SIGKILL)
        assert len(children()) == 2


def test_repeated_process_deaths_end_the_run(config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "MAX_RESTARTS", 1)

    def kill_and_go_on(loader: Loader) -> None:
        for _ in loader.batches(0):
            for child in children():
                os.kill(child, signal.SIGKILL)

    with (
        open_loader(config) as loader,
        pytest.raises(RunFailed, match=r"died 2 times in a short while, the last time by SIGKILL.*memory"),
    ):
        kill_and_go_on(loader)
    assert children() == []


def test_close_leaves_no_process_or_descriptor(config):
    before = len(os.listdir("/proc/self/fd"))
    with open_loader(config) as loader:
        stream = loader.batches(0)
        next(stream)
        assert len(children()) == 2
    del loader, stream
    gc.collect()
    assert children() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_process_errors_are_raised_with_their_type(config):
    for shard in Path(config.sources["pairs"].shards).glob("*.tar"):
        spoiled = bytearray(shard.read_bytes())
        for offset in range(512, len(spoiled) - 1024, 64):
            spoiled[offset] ^= 1
        times = shard.stat()
        shard.write_bytes(spoiled)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with open_loader(config) as loader, pytest.raises(DataError, match=r"the shard was changed"):
        next(loader.batches(0))
    assert children() == []


def test_bad_samples_are_reported_across_processes(make_pairs, make_pair):
    planted = {(0, n): make_pair(n) | {"jpg": b"\xff\xd8 no image"} for n in (2, 9, 17)}
    with open_loader(run_config(make_pairs("spoiled", [24], planted))) as loader:
        list(islice(loader.batches(0), 3))
        assert loader.counts()["bad/pairs"] == 3
        keys = sorted(record["key"] for record in loader.quarantined())
    assert keys == ["spoiled00002", "spoiled00009", "spoiled00017"]
