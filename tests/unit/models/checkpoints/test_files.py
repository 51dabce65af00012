"""Reading any weight file returns tensors or raises CheckpointError, in memory proportional to the file."""

import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.errors import CheckpointError
from pipeline.models.checkpoints.files import CONTAINERS, read_json, read_tensors, write_tensors
from tests.support.fuzz import fuzz_rounds, mutate

STATE = {"layer.0.weight": torch.arange(6.0).view(2, 3), "layer.0.bias": torch.arange(3), "half": torch.ones(2).half()}


def as_torch(contents: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def deflated(data: bytes, zeros: int = 0) -> bytes:
    """Return the zip file with compressed entries, each extended by `zeros` zero bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry) + bytes(zeros))
    return file.getvalue()


SEEDS: dict[str, bytes] = {
    "safetensors": safetensors.torch.save(STATE, {"model": '{"kind": "vit"}'}),
    "pt": as_torch({"state_dict": STATE, "epoch": 3}),
    "pt-legacy": as_torch({"model": STATE}, legacy=True),
}
SAFETENSORS = SEEDS["safetensors"]
JSON = json.dumps({"model_type": "vit", "hidden_size": 24, "id2label": {"0": "a"}, "x": [1e9, None]}).encode()


@pytest.mark.parametrize("kind", [*SEEDS, "json"])
def test_mutated_files_raise_only_checkpoint_errors(kind: str) -> None:
    rng, refused = random.Random(f"files {kind}"), list[str]()
    for _ in range(fuzz_rounds(120)):
        try:
            (read_json if kind == "json" else read_tensors)(mutate(SEEDS.get(kind, JSON), rng), "weights")
        except CheckpointError as error:
            refused.append(str(error))
    assert refused
    assert all(message.startswith("weights: ") for message in refused)


@pytest.mark.parametrize(
    "data",
    [
        *(b"........{", b"PK\x03\x04", b"\x80", b"\x80\x02}.", b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\xff"),
        with_header(b'{"a":' * 100_000),
        with_header(b"{" + b"[" * 100_000),
        with_header(b'{"\xff": 1}'),
        with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        with_header(b'{"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 0]}}'),
        with_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"abcd"),
        with_header(b'{"__metadata__": {"model": "{}"}}'),
        struct.pack("<Q", 2**63) + b"{}",
        as_torch(STATE)[:-100],
        *map(as_torch, ([1, 2], torch.ones(3), {"state_dict": {}}, {"a": torch.ones(3).to_sparse()})),
        as_torch({"a": torch.empty(3, device="meta")}),
        as_torch({"a": torch.ones(1).expand(10**6, 10**6)}),
        as_torch(dict.fromkeys([f"nine names of one memory {number}" for number in range(9)], torch.ones(1000))),
    ],
)
def test_crafted_files_raise_checkpoint_errors(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^weights: "):
        read_tensors(data, "weights")


def test_truncated_files_and_those_that_unpack_to_more_than_their_size_are_rejected() -> None:
    for cut in (0, 1, 7, 9, 40, len(SAFETENSORS) // 2, len(SAFETENSORS) - 1):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(damaged|cut off)"):
            read_tensors(SAFETENSORS[:cut], "model.safetensors")
    for zeros in (0, 10**6):
        with pytest.raises(CheckpointError, match="compressed"):
            read_tensors(deflated(SEEDS["pt"], zeros), "weights")


def test_both_formats_keep_metadata_prefixes_of_wrappers_are_removed_and_doubled_names_rejected() -> None:
    for name in ("a.safetensors", "a.pt"):
        published = read_tensors(write_tensors(STATE, name, {"model": "{}"}), name)
        assert published.metadata == {"model": "{}"}
        dtypes = {name: tensor.dtype for name, tensor in published.tensors.items()}
        assert dtypes == {"layer.0.weight": torch.float32, "layer.0.bias": torch.int64, "half": torch.float32}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."):
        wrapped = {f"{prefix}{name}".replace("layer.0.", "layer.0._orig_mod."): t for name, t in STATE.items()}
        for data in (*(as_torch({c: wrapped}) for c in CONTAINERS), as_torch(wrapped), safetensors.torch.save(wrapped)):
            tensors = read_tensors(data, "weights").tensors
            assert all(torch.equal(tensors.pop(name), tensor) for name, tensor in STATE.items())
            assert not tensors
    with pytest.raises(CheckpointError, match="also holds epoch"):
        read_tensors(as_torch({"state_dict": STATE | {"epoch": 3}}), "weights")
    with pytest.raises(CheckpointError, match=r"tensor half more than once"):
        read_tensors(as_torch(STATE | {"module.half": torch.ones(2)}), "weights")


class Armed:
    """Object whose unpickling touches a file, so that an unsafe loader is noticed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "contents",
    [{"model": STATE, "args": 0}, {"state_dict": STATE, "hyper": 0}, {"module": STATE, "ds": 0}, {**STATE, "args": 0}],
)
def test_suggested_command_produces_a_readable_file(contents: dict[str, Any], tmp_path: Path) -> None:
    path, new, ran = tmp_path / "old.pth", tmp_path / "new.pth", tmp_path / "ran"
    torch.save(contents | {list(contents)[-1]: Armed(ran)}, path)
    with pytest.raises(CheckpointError, match="would run code that it names") as error:
        read_tensors(path.read_bytes(), "old.pth")
    assert not ran.exists()
    command = str(error.value)[str(error.value).index("torch.save(") :]
    exec(command, {"torch": torch, "FILE": path, "NEW_FILE": new})
    assert read_tensors(new.read_bytes(), "new.pth").tensors.keys() == STATE.keys()
