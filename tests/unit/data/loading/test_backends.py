"""Loader processes: the same examples as threads, restarts, and the lifetime of shared memory."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import DataError, RunFailed
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading import backends
from pipeline.data.loading.loader import Loader, fingerprint
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups

STEPS = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {n} shows a thing in way {way}" for n in range(40) for way in "abc"], 200)


@pytest.fixture
def config(make_pairs) -> RunConfig:
    folder = make_pairs("pairs", [11, 13])
    index_shards(Storage(), folder)
    values = {
        "name": "test",
        "model": {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4},
        "sources": {"pairs": {"shards": folder}},
        "data": {"streams": 4, "max_bad_rate": 1.0, "loader": {"num_workers": 2, "threads_per_worker": 2}},
        "stages": [
            {
                "name": "together",
                "sources": {"pairs": 1.0},
                "objectives": {"itc": {}, "mlm": {}, "mim": {}},
                "steps": STEPS,
                "global_batch_size": 8,
                "max_text_length": 12,
            }
        ],
    }
    return validate(values, "test")


def open_loader(config: RunConfig, tokenizer: Tokenizer) -> Loader:
    return Loader(
        config,
        config.stages[0],
        batch_groups(config, config.stages[0]),
        Storage(config.storage),
        tokenizer,
        rank=0,
        world_size=1,
    )


def with_workers(config: RunConfig, count: int) -> RunConfig:
    loader = config.data.loader.model_copy(update={"num_workers": count})
    return config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})


def children() -> list[int]:
    """Return the ids of the live loader processes of this process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (status.parent / "cmdline").read_bytes()
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"pipeline.data.loading.worker" in command and fields[1] == str(os.getpid()) and fields[0] != "Z":
            found.append(int(status.parent.name))
    return sorted(found)


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def batches(config, tokenizer) -> Iterator:
    with open_loader(config, tokenizer) as loader:
        yield loader.batches(0)


def test_processes_build_the_same_examples_as_threads(config, tokenizer):
    prints = {
        fingerprint(
            with_workers(config, count),
            config.stages[0],
            batch_groups(with_workers(config, count), config.stages[0]),
            Storage(),
            tokenizer,
            range(1, 6),
            world,
        )
        for count, world in ((0, 1), (1, 1), (3, 1), (2, 3))
    }
    assert len(prints) == 1


def test_batch_memory_is_reused_after_its_last_reference(config, tokenizer):
    with open_loader(config, tokenizer) as loader:
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


def test_consumer_may_keep_every_batch(config, tokenizer):
    with open_loader(config, tokenizer) as loader:
        kept = list(islice(loader.batches(0), STEPS))
    with open_loader(with_workers(config, 0), tokenizer) as loader:
        for batch, expected in zip(kept, loader.batches(0), strict=False):
            assert torch.equal(batch.image, expected.image)
            assert torch.equal(batch.masked_text, expected.masked_text)


def test_batches_outlive_their_loader(config, tokenizer):
    with open_loader(config, tokenizer) as loader:
        batch = next(loader.batches(0))
    expected = next(open_loader(with_workers(config, 0), tokenizer).batches(0))
    assert torch.equal(batch.image, expected.image)


def test_killed_process_is_restarted_without_effect_on_data(config, tokenizer, batches):
    uninterrupted = [batch.image for batch in islice(open_loader(with_workers(config, 0), tokenizer).batches(0), STEPS)]
    for step, expected in enumerate(uninterrupted):
        if step in (3, 7):
            os.kill(children()[step % 2], signal.SIGKILL)
        assert torch.equal(next(batches).image, expected)
    assert len(children()) == 2


def test_repeated_process_deaths_end_the_run(config, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "MAX_RESTARTS", 1)

    def kill_and_go_on(loader: Loader) -> None:
        for _ in loader.batches(0):
            for child in children():
                os.kill(child, signal.SIGKILL)

    with (
        open_loader(config, tokenizer) as loader,
        pytest.raises(RunFailed, match=r"died 2 times in a short while, the last time by SIGKILL.*memory"),
    ):
        kill_and_go_on(loader)
    assert children() == []


def test_close_leaves_no_process_or_descriptor(config, tokenizer):
    before = len(os.listdir("/proc/self/fd"))
    with open_loader(config, tokenizer) as loader:
        stream = loader.batches(0)
        next(stream)
        assert len(children()) == 2
    del loader, stream
    gc.collect()
    assert children() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_process_errors_are_raised_with_their_type(config, tokenizer):
    for shard in Path(config.sources["pairs"].shards).glob("*.tar"):
        spoiled = bytearray(shard.read_bytes())
        for offset in range(512, len(spoiled) - 1024, 64):
            spoiled[offset] ^= 1
        times = shard.stat()
        shard.write_bytes(spoiled)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with open_loader(config, tokenizer) as loader, pytest.raises(DataError, match=r"the shard was changed"):
        next(loader.batches(0))
    assert wait_until(lambda: children() == [])


def test_bad_samples_are_reported_across_processes(make_pairs, make_pair, config, tokenizer):
    folder = make_pairs("spoiled", [24], {(0, n): make_pair(n) | {"jpg": b"\xff\xd8 no picture"} for n in (2, 9, 17)})
    index_shards(Storage(), folder)
    sources = {"pairs": config.sources["pairs"].model_copy(update={"shards": folder})}
    config = config.model_copy(update={"sources": sources})
    with open_loader(config, tokenizer) as loader:
        list(islice(loader.batches(0), 3))
        assert loader.counts()["bad/pairs"] == 3
        assert sorted(record["key"] for record in loader.quarantined()) == [
            "spoiled00002",
            "spoiled00009",
            "spoiled00017",
        ]
