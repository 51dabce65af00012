"""Loader processes: the same examples as threads, restarts, and the lifetime of shared memory."""

import gc
import os
import signal
from contextlib import suppress
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.config.errors import DataError, RunFailed
from pipeline.config.schema import RunConfig
from pipeline.data.loading import backends
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import data_config, open_loader, take, with_loader

STEPS = 12


def run_config(folder: str) -> RunConfig:
    index_shards(Storage(), folder)
    data = {"streams": 4, "loader": {"num_workers": 2, "threads_per_worker": 2}}
    return data_config({"pairs": folder}, data=data, stage={"steps": STEPS, "global_batch_size": 8})


@pytest.fixture
def config(make_pairs) -> RunConfig:
    return run_config(make_pairs("pairs", [11, 13]))


def children() -> list[psutil.Process]:
    """Return the live loader processes of this process, by id."""
    loaders = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it ended just now
            words = child.cmdline() if child.status() != psutil.STATUS_ZOMBIE else []
            loaders += [child] if any("data.loading.backends" in word for word in words) else []
    return sorted(loaders, key=lambda child: child.pid)


def test_batch_memory_is_reused_after_its_last_reference(config):
    with open_loader(config) as loader:
        stream = loader.batches(0)
        first = next(stream)
        free = loader._open[0]._free
        pixels, num_free = first.image.clone(), len(free)
        for _ in range(2 * STEPS):
            next(stream)
        assert torch.equal(first.image, pixels), "a slot was filled again while its batch was in use"
        kept = first.image[3]
        del first
        gc.collect()
        assert torch.equal(kept, pixels[3])
        del kept
        gc.collect()
        assert len(free) == num_free + 1
    kept, expected = take(config, STEPS), take(with_loader(config, num_workers=0), STEPS)
    for batch, other in zip(kept, expected, strict=True):  # kept beyond their loader
        assert torch.equal(batch.image, other.image)
        assert torch.equal(batch.masked_text, other.masked_text)


def test_killed_process_is_restarted_without_effect_on_data_until_it_dies_repeatedly(config, monkeypatch):
    uninterrupted = take(with_loader(config, num_workers=0), STEPS)
    with open_loader(config) as loader:
        batches = loader.batches(0)
        for step, expected in enumerate(uninterrupted):
            assert torch.equal(next(batches).image, expected.image)
            if step in (2, 6):
                children()[step % 3 // 2].kill()
        assert len(children()) == 2
    monkeypatch.setattr(backends, "MAX_RESTARTS", 1)
    message = r"died 2 times in a short while, the last time by SIGKILL.*memory"
    with open_loader(config) as loader, pytest.raises(RunFailed, match=message):  # noqa: PT012
        for _ in loader.batches(0):
            for child in children():
                child.send_signal(signal.SIGKILL)
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


def test_errors_keep_their_type_and_bad_samples_are_reported_across_processes(config, make_pairs, make_pair):
    for shard in Path(config.sources["pairs"].shards).glob("*.tar"):
        spoiled, times = bytearray(shard.read_bytes()), shard.stat()
        for offset in range(512, len(spoiled) - 1024, 64):
            spoiled[offset] ^= 1
        shard.write_bytes(spoiled)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with open_loader(config) as loader, pytest.raises(DataError, match=r"the shard was changed"):
        next(loader.batches(0))
    assert children() == []
    planted = {(0, n): make_pair(n) | {"jpg": b"\xff\xd8 no image"} for n in (2, 9, 17)}
    with open_loader(run_config(make_pairs("spoiled", [24], planted))) as loader:
        list(islice(loader.batches(0), 3))
        assert loader.counts()["bad/pairs"] == 3
        keys = sorted(record["key"] for record in loader.quarantined())
    assert keys == ["spoiled00002", "spoiled00009", "spoiled00017"]
