"""Weights that a stage hands over: damaged files raise MomeError, and tokens are read back unchanged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.errors import MomeError
from pipeline.data.storage import Storage
from pipeline.training.checkpoint import MANIFEST, load_weights, save_weights, weights_info
from pipeline.training.checkpoint.committed import commit, file_record
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.tiny_model import tiny_config

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
        manifest["files"][name] = file_record((folder / name).read_bytes())
    files = manifest.pop("files", {})
    commit(Storage(), str(folder), files, manifest)


@pytest.mark.parametrize("key", ["config", "stage", "step"])
def test_manifest_without_a_key_is_rejected(key: str, tmp_path: Path) -> None:
    assert load_weights(Storage(), save(tmp_path)).vocabulary == TOKENS, "line ends of other kinds are tokens"
    rewritten(tmp_path, lambda manifest: manifest.pop(key))
    for read in (load_weights, weights_info):
        with pytest.raises(MomeError, match=r"is damaged|config"):
            read(Storage(), str(tmp_path))


def test_mutated_files_with_correct_digests_raise_mome_errors(tmp_path: Path) -> None:
    save(tmp_path)
    rng, names = random.Random("weights"), ("weights.safetensors", "vocab.txt", MANIFEST)
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    escaped = []
    for _ in range(fuzz_rounds(100)):
        for name, data in whole.items():
            (tmp_path / name).write_bytes(data)
        name = rng.choice(names)
        (tmp_path / name).write_bytes(mutate(whole[name], rng))
        try:
            rewritten(tmp_path, lambda manifest: None)
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # the mutated manifest cannot be rewritten
        try:
            load_weights(Storage(), str(tmp_path))
        except MomeError:
            pass
        except Exception as error:
            escaped.append(f"{name}: {type(error).__name__}: {error}")
    assert escaped == []
