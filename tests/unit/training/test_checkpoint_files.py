"""Files of checkpoints and weights: read as safetensors and by range, retained by policy, checked when read."""

import hashlib
import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import CheckpointError, MomeError
from pipeline.config.schema import CheckpointConfig, KeepBestConfig
from pipeline.data.storage import ObjectChanged, Storage, join
from pipeline.training.checkpoint import committed, serialization
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST, NO_START, Checkpoint, parse_name, select_kept
from pipeline.training.checkpoint.serialization import DTYPES, SavedState, TensorFile
from pipeline.training.checkpoint.weights import load_weights, save_weights, weights_info
from pipeline.training.ownership import Start
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.tiny_model import tiny_config

SIZES = {"a": 10, "b": 70_000, "c": 3, "d": 40_001}
KINDS = ("exp_avg", "exp_avg_sq", "weight")
RANKS = 3
DRAW = torch.Generator().manual_seed(0)
WHOLE = {(name, kind): torch.randn(size, generator=DRAW) for name, size in SIZES.items() for kind in KINDS}


class Counting(Storage):
    num_requests = 0

    def read(self, url: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        self.num_requests += stop is not None
        return super().read(url, start, stop, etag)


def bounds(size: int, rank: int) -> tuple[int, int]:
    return size * rank // RANKS, size * (rank + 1) // RANKS


def split_state(folder: Path) -> SavedState:
    """Return parameters split across three ranks' files."""
    storage, files = Counting(), {}
    for rank in range(RANKS):
        places = [(name, kind, *bounds(SIZES[name], rank)) for kind in KINDS for name in SIZES]
        file = TensorFile(
            {f"{name}|{start}|{kind}": WHOLE[name, kind][start:stop] for name, kind, start, stop in places}
        )
        storage.write(url := join(str(folder), f"rank-{rank}"), file.read(0, file.size))
        files[f"rank-{rank}"] = storage.info(url)
    return SavedState(storage, str(folder), files, optimizer_step=7)


def test_any_range_of_any_kind_round_trips_until_a_file_changes(tmp_path: Path) -> None:
    state = split_state(tmp_path)
    for (name, kind), values in WHOLE.items():
        size = len(values)
        for start, stop in [(0, size), (0, 1), (size - 1, size), (size // 3, size // 2), (2, 2)]:
            assert torch.equal(state.read(name, kind, start, stop), values[start:stop])
    assert (state.holds("a", "weight"), state.holds("a", "ema")) == (True, False)
    with pytest.raises(CheckpointError, match=r"holds 3 of the 4 elements 0…4 of c \(weight\)"):
        state.read("c", "weight", 0, 4)
    state._blocks.clear()
    Storage().write(str(tmp_path / "rank-0"), (tmp_path / "rank-0").read_bytes() + b"\0")
    with pytest.raises(ObjectChanged, match="rank-0"):
        state.read("a", "weight", 0, 3)


def test_engine_access_pattern_fetches_little_more_than_it_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each parameter's own range of each kind, then its whole weight, with a cache far smaller than the files."""
    monkeypatch.setattr(serialization, "_MIN_BLOCK", 1024)
    monkeypatch.setattr(serialization, "_CACHE_BYTES", 1024 * 3 * 4 * RANKS)
    state, read = split_state(tmp_path), 0
    for name, size in SIZES.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            read += len(state.read(name, kind, *bounds(size, 1)))
        for start in range(0, size, 500):
            read += len(state.read(name, "weight", start, min(start + 500, size)))
    assert state._storage.num_requests * 1024 < 1.2 * 4 * read


TENSORS = {
    "a|0|weight": torch.arange(1000.0),
    "half": torch.randn(3, 5).bfloat16(),
    "transposed": torch.arange(12).reshape(3, 4).T,
    "none": torch.empty(0),
    "one": torch.tensor(3.0),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES},
}


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


# ---- retention


LOSS = {100: 3.0, 200: 1.0, 300: 2.0, 400: 1.0, 500: 4.0, 600: 5.0}
BEST = KeepBestConfig(metric="train/loss", mode="min")
WORST = KeepBestConfig(metric="train/loss", mode="max")


def info(step: int, stage: str = "s", url: str | None = None) -> Checkpoint:
    return Checkpoint(url or str(step), step, stage, metrics={"train/loss": LOSS[step]})


SIX = [info(step) for step in LOSS]
NOT_A_NUMBER = Checkpoint("100", 100, "s", metrics={"train/loss": math.nan})


@pytest.mark.parametrize(
    ("config", "checkpoints", "stay"),
    [
        ({"keep": 1}, SIX, {"600"}),
        ({"keep": 2}, SIX, {"500", "600"}),
        ({"keep": 9}, SIX, {"100", "200", "300", "400", "500", "600"}),
        ({"keep": 1, "keep_every": 300}, SIX, {"300", "600"}),
        ({"keep": 1, "keep_best": BEST}, SIX, {"400", "600"}),
        ({"keep": 1, "keep_best": WORST}, SIX, {"600"}),
        ({"keep": 2, "keep_every": 200, "keep_best": BEST}, SIX, {"200", "400", "500", "600"}),
        ({"keep_best": BEST}, [info(s, "first" if s <= 300 else "second") for s in LOSS], {"200", "400", "600"}),
        ({"keep_best": BEST}, [info(100), Checkpoint("200", 200, "s", metrics={"other": 0.0}), info(300)], {"300"}),
        ({"keep_best": BEST}, [NOT_A_NUMBER, info(200), info(300), info(500)], {"200", "500"}),
        # The older one of a step is damaged, and counting it would remove a complete checkpoint.
        ({"keep": 2}, [info(100), info(200, url="damaged"), info(200, url="again")], {"100", "again"}),
        ({"keep": 2}, [info(100), info(200), replace(info(300), is_complete=False), info(400)], {"200", "400"}),
    ],
)
def test_last_periodic_and_best_checkpoints_are_kept(
    config: dict[str, Any], checkpoints: list[Checkpoint], stay: set[str]
) -> None:
    assert select_kept(checkpoints, checkpoints[-1], CheckpointConfig(**{"keep": 1} | config)) == stay


def test_checkpoints_are_ordered_by_step_then_start_then_time_of_their_names(tmp_path: Path) -> None:
    """The order is numeric: 99,999,999 precedes 100,000,000, and start 9,999 precedes start 10,000."""
    ordered = [
        "step-00000090.ff",
        "step-99999999.0001-aaaaaaaa-9",
        "step-100000000.ff",
        "step-100000000.fff",
        "step-100000000.0002-bbbbbbbb-10",
        "step-100000000.9999-aaaaaaaa-f",
        "step-100000000.9999-aaaaaaaa-10",
        "step-100000000.10000-00000000-1",
    ]
    for name in (*ordered, "notes.txt", "step-7"):
        Storage().write(str(tmp_path / name / COMMIT), b"")
    checkpoints = [url.rpartition("/")[2] for url in committed.newest_first(Storage(), str(tmp_path))]
    assert checkpoints == ordered[::-1]
    expected = {
        "step-00000150.0003-9f86d081-19ad3c7f2e1": (150, Start(3, "9f86d081"), 0x19AD3C7F2E1),
        "step-00000150.12345-0a1b2c3d-a": (150, Start(12345, "0a1b2c3d"), 10),
        "step-00000150.3f9a": (150, NO_START, 0x3F9A),
        "step-123456789.3f9a00ff": (123456789, NO_START, 0x3F9A00FF),
    }
    others = ("step-00000150.0003-9f86d081", "step-00000150.copy", "step-00000150", "step-150.3f9a", "notes")
    for name in (*expected, *others, "my-step-00000150.3f9a"):
        assert parse_name(name) == expected.get(name), name


# ---- weights that a stage hands over


TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "\x85", "##b\x1c", " "]


def save(folder: Path) -> str:
    config = tiny_config()
    metadata = {"config": config.model_dump(mode="json"), "stage": "vision", "step": 4}
    save_weights(Storage(), str(folder), {"a": torch.arange(4.0)}, TOKENS, metadata)
    return str(folder)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest with `change`, keeping its digests correct."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    for name in manifest.get("files", {}):
        manifest["files"][name] = committed.file_record((folder / name).read_bytes())
    files = manifest.pop("files", {})
    committed.commit(Storage(), str(folder), files, manifest)


def test_manifest_without_a_key_is_rejected(tmp_path: Path) -> None:
    for key in ("config", "stage", "step"):
        assert load_weights(Storage(), save(tmp_path / key)).vocabulary == TOKENS, "line ends of other kinds are tokens"
        rewritten(tmp_path / key, lambda manifest: manifest.pop(key))  # noqa: B023
        for read in (load_weights, weights_info):
            with pytest.raises(MomeError, match=r"is damaged|config"):
                read(Storage(), str(tmp_path / key))


def test_mutated_files_with_correct_digests_raise_mome_errors(tmp_path: Path) -> None:
    save(tmp_path)
    rng, names = random.Random("weights"), ("weights.safetensors", "vocab.txt", MANIFEST)
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    for _ in range(fuzz_rounds(100)):
        for name, data in whole.items():
            (tmp_path / name).write_bytes(data)
        name = rng.choice(names)
        (tmp_path / name).write_bytes(mutate(whole[name], rng))
        try:
            rewritten(tmp_path, lambda manifest: None)
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # the mutated manifest cannot be rewritten
        with suppress(MomeError):
            load_weights(Storage(), str(tmp_path))
