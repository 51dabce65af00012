"""Tensor files in published formats: safetensors, or torch's. Nothing but tensors is ever loaded.

Every damaged or hostile file ends in CheckpointError, and none takes much more memory than its size.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError

CONTAINERS = ("state_dict", "module", "model")  # Lightning; DeepSpeed; BEiT and MAE
METADATA = "mome"  # next to `state_dict` in our torch files: the metadata of a safetensors header
_HEADER_LENGTH = 8  # bytes in front of a safetensors header, which say how long it is
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


@dataclass(frozen=True)
class Published:
    """The tensors of a file or folder, its metadata, and the JSON files next to it."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None  # of Hugging Face's config.json
    processor: Mapping[str, Any] | None = None  # of its preprocessor_config.json


def read_json(data: bytes, origin: str) -> dict[str, Any]:
    """Read the object in a JSON file. Raises CheckpointError naming `origin` for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin}: is no JSON ({error}); download or copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin}: holds {type(value).__name__}, expected a JSON object")
    return value


def write_tensors(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> bytes:
    """Return the bytes of a file named `path`, the same at each call: safetensors by its suffix, else torch's."""
    if path.endswith(".safetensors"):
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        # The safetensors library writes the metadata in arbitrary order.
        end = _HEADER_LENGTH + int.from_bytes(data[:_HEADER_LENGTH], "little")
        header = json.loads(data[_HEADER_LENGTH:end])
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_LENGTH)  # so that the tensors are aligned
        return b"".join((len(text).to_bytes(_HEADER_LENGTH, "little"), text, memoryview(data)[end:]))
    file = io.BytesIO()
    torch.save({"state_dict": tensors, METADATA: metadata}, file)
    return file.getvalue()


def read_tensors(data: bytes, origin: str) -> Published:
    """Read the tensors of a file from any known container, without wrappers' prefixes, floating-point ones as float32.

    Raises CheckpointError naming `origin` for a damaged file, one without named tensors, and one that needs code.
    """
    try:
        loaded, metadata = _load(data, origin)
        others = [
            str(name)
            for name, value in loaded.items()  # all but dense CPU tensors whose memory holds every element
            if not isinstance(value, Tensor)
            or (value.layout, value.device.type, value.is_quantized) != (torch.strided, "cpu", False)
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ]
        if not loaded or others:
            contents = f"also holds {', '.join(sorted(others)[:4])}" if loaded else "holds none"
            raise CheckpointError(
                f"{origin}: expected tensors by name, bare or under one of {', '.join(CONTAINERS)}; it {contents}"
            )
        # Two names may share one memory (tied weights).
        if sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) > 4 * len(data):
            raise CheckpointError(
                f"{origin}: its tensors are many times larger than the file, unlike any published checkpoint's"
            )
        tensors: dict[str, Tensor] = {}
        for published, tensor in loaded.items():
            # Wrappers' prefixes: `module.` in front, the others anywhere in a name.
            name = re.sub(r"^(module\.)+", "", _WRAPPERS.sub("", str(published)))
            if name in tensors:
                raise CheckpointError(
                    f"{origin}: names the tensor {name} more than once, with and without a wrapper's prefix"
                )
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        texts = metadata.items() if isinstance(metadata, dict) else ()
        return Published(tensors, {k: v for k, v in texts if isinstance(k, str) and isinstance(v, str)})
    except CheckpointError:
        raise
    except Exception as error:  # parsers of damaged files raise everything: struct.error, KeyError, AssertionError, …
        raise CheckpointError(
            f"{origin}: neither safetensors nor a file that torch saved can be read from its {len(data)} bytes; it is "
            f"damaged or cut off ({type(error).__name__}: {str(error)[:200]}). Download or copy it again"
        ) from error


def _load(data: bytes, origin: str) -> tuple[dict[Any, Any], Any]:
    """Return the values by name in a file's innermost container, and its metadata, without running code it names."""
    if data[_HEADER_LENGTH : _HEADER_LENGTH + 1] == b"{":
        tensors = safetensors.torch.load(data)  # first: it bounds the header and checks every tensor's range
        header = json.loads(data[_HEADER_LENGTH : _HEADER_LENGTH + int.from_bytes(data[:_HEADER_LENGTH], "little")])
        return tensors, header.get("__metadata__")
    if not data.startswith((b"PK", b"\x80")):  # a zip file; before torch 1.6, a pickle
        raise ValueError(f"it begins with {data[:8]!r}")
    if data.startswith(b"PK"):  # compressed entries could unpack to any size
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if compressed or sum(entry.file_size for entry in entries) > len(data):
            names = ", ".join(compressed[:3])
            raise CheckpointError(
                f"{origin}: holds compressed entries ({names}), which torch never writes; save it with torch.save"
            )
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = ", ".join(dict.fromkeys(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not called:
            raise
        containers = ", ".join(repr(name) for name in CONTAINERS)
        raise CheckpointError(
            f"{origin}: holds more than tensors; reading it would run code that it names ({called}). If you trust it, "
            "save its tensors alone, where it was made: torch.save({k: v for k, v in torch.load(FILE, "
            f"weights_only=False).items() if k in ({containers}) or torch.is_tensor(v)}}, NEW_FILE)"
        ) from error
    metadata = loaded.get(METADATA) if isinstance(loaded, dict) else None
    while isinstance(loaded, dict):  # containers may be nested
        inner = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            return loaded, metadata
        loaded = inner
    return {}, None
