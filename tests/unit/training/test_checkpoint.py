"""Checkpoints and weights: saved asynchronously, read as safetensors and by range, retained by policy, verified."""

import hashlib
import math
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import CheckpointError, MomeError, StorageError
from pipeline.config.schema import CheckpointConfig, KeepBestConfig
from pipeline.data.storage import ObjectChanged, Storage, join
from pipeline.training.checkpoint import committed, serialization
from pipeline.training.checkpoint.committed import COMMIT, NO_START, Checkpoint, parse_name, select_kept
from pipeline.training.checkpoint.serialization import DTYPES, SavedState, TensorFile
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.checkpoint.weights import VOCABULARY, WEIGHTS, load_weights, save_weights, weights_info
from pipeline.training.engine import Fragment
from pipeline.training.ownership import Start
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.small_checkpoint import metadata, store_of
from tests.support.tiny_model import tiny_config

KINDS = ("exp_avg", "exp_avg_sq", "weight")


# ---- asynchronous saves hold the state at the call, whatever the store and later steps do
@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Yield a store that writes files of ranks once `gate` is set, or raises `fault`, if any."""
    store: Any = store_of(storage := Storage(), str(tmp_path), keep=9)
    store.gate, store.fault, write_parts = threading.Event(), None, storage.write_parts

    def write_when_open(*arguments: Any) -> bool:
        assert store.gate.wait(30)
        if store.fault is not None:
            raise store.fault
        return write_parts(*arguments)

    storage.write_parts = write_when_open  # type: ignore[method-assign]
    yield store
    store.gate.set()
    store.close()


def state(num_steps: int = 0) -> list[Fragment]:
    """Build a parameter in two fragments with its moments, and a frozen one in half precision, after some steps."""
    generator = torch.Generator().manual_seed(1)
    parts = [("a", 0, 7, KINDS), ("a", 7, 1000, KINDS), ("b", 0, 5, ("weight",))]
    fragments = [
        Fragment(name, start, {kind: torch.randn(size, generator=generator) for kind in kinds})
        for name, start, size, kinds in parts
    ]
    fragments[2].values["weight"] = fragments[2].values["weight"].bfloat16()
    return train(fragments, num_steps)


def train(fragments: list[Fragment], num_steps: int = 1) -> list[Fragment]:
    """Overwrite the state in place, as the next steps do."""
    for value in (value for fragment in fragments for value in fragment.values.values()):
        value.add_(num_steps)
    return fragments


def assert_restored(store: CheckpointStore, expected: list[Fragment]) -> None:
    _, saved = store.latest() or pytest.fail("nothing found")
    for fragment in expected:
        for kind, value in fragment.values.items():
            read = saved.read(fragment.name, kind, fragment.start, fragment.start + len(value))
            assert torch.equal(read, value.float()), (fragment.name, kind)


def end_of_the_save(store: Any) -> None:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    store.gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_saves_hold_the_state_at_the_call_and_the_second_waits_for_the_first(store: Any) -> None:
    store.host_copy.reserve(state())
    reserved, fragments, names = store.host_copy.buffer.data_ptr(), state(), list[list[str]]()
    first = store.save(fragments, metadata(1), lambda: names.append(store.storage.list(first)))
    assert not store.storage.exists(first), "the save waited for the store"
    assert not store.check()
    assert store.latest() is None
    threading.Timer(0.3, store.gate.set).start()
    second = store.save(train(fragments), metadata(2))
    assert store.waited > 0.2
    assert names == [["rank-00000.safetensors"]], "the journal is committed between files and commit"
    assert COMMIT in store.storage.list(first)
    train(fragments)
    store.wait()
    assert [step for step, _ in store.written] == [1, 2]
    assert_restored(store, state(1))
    store.storage.delete(second)
    assert_restored(store, state())
    assert store.host_copy.buffer.data_ptr() == reserved, "both saves used the reserved host memory"


def test_failed_save_raises_at_the_next_step_and_may_be_repeated(store: Any) -> None:
    store.gate.set()
    store.save(state(), metadata(1), Mock(side_effect=StorageError("the journal could not be written")))
    with pytest.raises(StorageError, match="the journal"):
        store.wait()
    store.fault = StorageError("no space left")
    store.save(state(), metadata(1))
    with pytest.raises(StorageError, match="no space left"):
        store.wait()
    assert store.latest() is None
    store.gate.clear()
    store.save(state(), metadata(2))
    end_of_the_save(store)
    with pytest.raises(StorageError, match="no space left"):
        store.check()
    store.fault = None
    store.save(state(), metadata(3))
    store.wait()
    assert store.check()
    assert_restored(store, state())


def test_close_abandons_a_save_that_does_not_end(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    url = store.save(state(), metadata(1))
    store.close(seconds=0.1)
    assert "abandoned" in caplog.text
    end_of_the_save(store)
    assert store.storage.list(url) == []


# ---- files of tensors, and parameters split across three ranks' files
TENSORS = {
    "a|0|weight": torch.arange(1000.0),
    "half": torch.randn(3, 5).bfloat16(),
    "transposed": torch.arange(12).reshape(3, 4).T,
    "none": torch.empty(0),
    "one": torch.tensor(3.0),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES},
}
SIZES = {"a": 10, "b": 70_000, "c": 3, "d": 40_001}
RANKS = 3
WHOLE = {(name, kind): torch.randn(size) for name, size in SIZES.items() for kind in KINDS}


def test_safetensors_reads_the_file_and_its_ranges() -> None:
    for tensors in (TENSORS, {}):
        file = TensorFile(tensors)
        whole = file.read(0, file.size)
        read = safetensors.torch.load(whole)
        assert {n: t.dtype for n, t in read.items()} == {n: t.dtype for n, t in tensors.items()}
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
        assert file.record() == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
        for start in range(0, file.size, 97):
            for length in (1, 8, 500, file.size):
                assert file.read(start, min(start + length, file.size)) == whole[start : start + length]


def split_state(folder: Path) -> tuple[SavedState, Mock]:
    """Return the parameters written by the ranks, and the mock that received the reads of their files."""
    storage, files = Storage(), {}
    for rank in range(RANKS):
        bounds = {
            key: slice(len(whole) * rank // RANKS, len(whole) * (rank + 1) // RANKS) for key, whole in WHOLE.items()
        }
        parts = {f"{name}|{own.start}|{kind}": WHOLE[name, kind][own] for (name, kind), own in bounds.items()}
        file = TensorFile(parts)
        storage.write(url := join(str(folder), f"rank-{rank}"), file.read(0, file.size))
        files[f"rank-{rank}"] = storage.info(url)
    storage.read = reads = Mock(wraps=storage.read)  # type: ignore[method-assign]
    return SavedState(storage, str(folder), files, optimizer_step=7), reads


def test_any_range_of_any_kind_round_trips_until_a_file_changes(tmp_path: Path) -> None:
    state, _ = split_state(tmp_path)
    for (name, kind), values in WHOLE.items():
        size = len(values)
        for start, stop in [(0, size), (0, 1), (size - 1, size), (size // 3, size // 2), (2, 2)]:
            assert torch.equal(state.read(name, kind, start, stop), values[start:stop])
    assert state.parts.keys() == WHOLE.keys()
    with pytest.raises(CheckpointError, match=r"holds 3 of the 4 elements 0…4 of c \(weight\)"):
        state.read("c", "weight", 0, 4)
    state._blocks.clear()
    Storage().write(str(tmp_path / "rank-0"), (tmp_path / "rank-0").read_bytes() + b"\0")
    with pytest.raises(ObjectChanged, match="rank-0"):
        state.read("a", "weight", 0, 3)


def test_engine_access_pattern_fetches_little_more_than_it_reads(monkeypatch: Any, tmp_path: Path) -> None:
    """Each parameter's own range of each kind, then its whole weight, with a cache far smaller than the files."""
    monkeypatch.setattr(serialization, "_MIN_BLOCK", 1024)
    monkeypatch.setattr(serialization, "_CACHE_BYTES", 1024 * 3 * 4 * RANKS)
    (state, reads), num_read = split_state(tmp_path), 0
    for name, size in SIZES.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            num_read += len(state.read(name, kind, size // RANKS, size * 2 // RANKS))
        for start in range(0, size, 500):
            num_read += len(state.read(name, "weight", start, min(start + 500, size)))
    assert reads.call_count * 1024 < 1.2 * 4 * num_read


# ---- retention
LOSS = {100: 3.0, 200: 1.0, 300: 2.0, 400: 1.0, 500: 4.0, 600: 5.0}
BEST, WORST = KeepBestConfig(metric="train/loss", mode="min"), KeepBestConfig(metric="train/loss", mode="max")


def info(step: int, stage: str = "s", **changed: Any) -> Checkpoint:
    return replace(Checkpoint(str(step), step, stage, metrics={"train/loss": LOSS[step]}), **changed)


SIX = [info(step) for step in LOSS]
NOT_A_NUMBER, ANOTHER = info(100, metrics={"train/loss": math.nan}), info(200, metrics={"other": 0.0})
KEPT: list[tuple[dict[str, Any], list[Checkpoint], set[int | str]]] = [
    ({"keep": 1}, SIX, {600}),
    ({"keep": 2}, SIX, {500, 600}),
    ({"keep": 9}, SIX, {100, 200, 300, 400, 500, 600}),
    ({"keep_every": 300}, SIX, {300, 600}),
    ({"keep_best": BEST}, SIX, {400, 600}),
    ({"keep_best": WORST}, SIX, {600}),
    ({"keep": 2, "keep_every": 200, "keep_best": BEST}, SIX, {200, 400, 500, 600}),
    ({"keep_best": BEST}, [info(s, "first" if s <= 300 else "second") for s in LOSS], {200, 400, 600}),
    ({"keep_best": BEST}, [info(100), ANOTHER, info(300)], {300}),
    ({"keep_best": BEST}, [NOT_A_NUMBER, info(200), info(300), info(500)], {200, 500}),
    # The older one of a step is damaged, and counting it would remove a complete checkpoint.
    ({"keep": 2}, [info(100), info(200, url="damaged"), info(200, url="again")], {100, "again"}),
    ({"keep": 2}, [info(100), info(200), info(300, is_complete=False), info(400)], {200, 400}),
]


@pytest.mark.parametrize(("config", "checkpoints", "stay"), KEPT)
def test_last_periodic_and_best_checkpoints_are_kept(config: Any, checkpoints: Any, stay: Any) -> None:
    kept = select_kept(checkpoints, checkpoints[-1], CheckpointConfig(**{"keep": 1} | config))
    assert kept == {str(url) for url in stay}


def test_checkpoints_are_ordered_by_step_then_start_then_time_of_their_names(tmp_path: Path) -> None:
    """The order is numeric: 99,999,999 precedes 100,000,000, and start 9,999 precedes start 10,000."""
    ordered = {
        "step-00000090.ff": (90, NO_START, 0xFF),
        "step-00000150.3f9a": (150, NO_START, 0x3F9A),
        "step-00000150.0003-9f86d081-19ad3c7f2e1": (150, Start(3, "9f86d081"), 0x19AD3C7F2E1),
        "step-99999999.0001-aaaaaaaa-9": (99_999_999, Start(1, "aaaaaaaa"), 9),
        "step-100000000.ff": (100_000_000, NO_START, 0xFF),
        "step-100000000.fff": (100_000_000, NO_START, 0xFFF),
        "step-100000000.0002-bbbbbbbb-10": (100_000_000, Start(2, "bbbbbbbb"), 16),
        "step-100000000.9999-aaaaaaaa-f": (100_000_000, Start(9999, "aaaaaaaa"), 15),
        "step-100000000.9999-aaaaaaaa-10": (100_000_000, Start(9999, "aaaaaaaa"), 16),
        "step-100000000.10000-00000000-1": (100_000_000, Start(10000, "00000000"), 1),
    }
    others = ("step-00000150.0003-9f86d081", "step-00000150.copy", "step-00000150", "step-150.3f9a", "notes.txt")
    for name in (*ordered, *others, "step-7", "my-step-00000150.3f9a"):
        Storage().write(str(tmp_path / name / COMMIT), b"")
        assert parse_name(name) == ordered.get(name), name
    checkpoints = [url.rpartition("/")[2] for url in committed.newest_first(Storage(), str(tmp_path))]
    assert checkpoints == [*ordered][::-1]


# ---- weights that a stage hands over
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "\x85", "##b\x1c", " "]
METADATA = {"config": tiny_config().model_dump(mode="json"), "stage": "vision", "step": 4}


def saved(url: str, metadata: dict[str, Any] = METADATA) -> str:
    save_weights(Storage(), url, {"a": torch.arange(4.0)}, TOKENS, metadata)
    return url


def test_manifest_without_a_key_is_rejected(tmp_path: Path) -> None:
    assert load_weights(Storage(), saved(str(tmp_path / "whole"))).vocabulary == TOKENS, "other line ends are tokens"
    for key in METADATA:
        url = saved(str(tmp_path / key), {name: value for name, value in METADATA.items() if name != key})
        for read in (load_weights, weights_info):
            with pytest.raises(MomeError, match=r"is damaged|config"):
                read(Storage(), url)


def test_mutated_files_with_correct_digests_raise_mome_errors(tmp_path: Path) -> None:
    folder, rng, storage, outcomes = f"memory://{tmp_path.name}", random.Random("weights"), Storage(), set[bool]()
    whole = {name: storage.read(join(saved(folder), name)) for name in (WEIGHTS, VOCABULARY)}
    for number in range(fuzz_rounds(100)):
        name = rng.choice((WEIGHTS, VOCABULARY))
        files, url = whole | {name: mutate(whole[name], rng)}, join(folder, str(number))
        for file, data in files.items():
            storage.write(join(url, file), data)
        committed.commit(storage, url, {file: committed.file_record(data) for file, data in files.items()}, METADATA)
        try:
            outcomes.add(bool(load_weights(storage, url).tensors))
        except MomeError:
            outcomes.add(False)
    assert outcomes == {True, False}
