"""Files of tensors, as others publish them: safetensors, or what torch saves. Nothing but tensors is ever loaded."""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError

CONTAINERS = ("state_dict", "module", "model")  # Lightning's, DeepSpeed's, BEiT's and MAE's
TORCH_BEGINNINGS = (b"PK", b"\x80")  # a zip file; before torch 1.6, a pickle
_HEADER_LENGTH = 8  # bytes in front of a safetensors header, which says how long it is


@dataclass(frozen=True)
class Published:
    """The tensors of one file, and what a safetensors header says beside them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_tensors(data: bytes, origin: str) -> Published:
    """The tensors of a file's bytes, whatever container they lie in; floating ones as float32.

    Raises CheckpointError, which names `origin`, for a file that holds no tensors by name, or needs code to be read.
    """
    if data[_HEADER_LENGTH : _HEADER_LENGTH + 1] == b"{":
        header = json.loads(data[_HEADER_LENGTH : _HEADER_LENGTH + int.from_bytes(data[:_HEADER_LENGTH], "little")])
        loaded, metadata = safetensors.torch.load(data), header.get("__metadata__", {})
    else:
        loaded, metadata = _unwrapped(_load(data, origin)), {}
    others = sorted(str(name) for name, value in loaded.items() if not isinstance(value, Tensor))
    if not loaded or others:
        found = f"also holds {', '.join(others[:4])}" if loaded else "holds none"
        raise CheckpointError(
            f"{origin}: expected tensors by name, bare or under one of {', '.join(CONTAINERS)}; it {found}"
        )
    return Published({name: t.float() if t.is_floating_point() else t for name, t in loaded.items()}, metadata)


def write_tensors(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> bytes:
    """The bytes of a file named `path`: safetensors by its ending, else torch's, under `state_dict`."""
    if path.endswith(".safetensors"):
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    file = io.BytesIO()
    torch.save({"state_dict": tensors}, file)
    return file.getvalue()


def _load(data: bytes, origin: str) -> Any:
    try:
        if not data.startswith(TORCH_BEGINNINGS):
            raise ValueError(f"it begins with {data[:8]!r}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = ", ".join(dict.fromkeys(re.findall(r"GLOBAL ([\w.]+)", str(error)))) or "what torch does not know"
        raise CheckpointError(
            f"{origin}: holds more than tensors; reading it would run code that it names ({called}). If you trust it, "
            "save its tensors alone, where it was made: "
            "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW_FILE)"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{origin}: is neither safetensors nor a file that torch saved ({error})") from error


def _unwrapped(loaded: Any) -> dict[str, Any]:
    """What lies in the containers, if there are any."""
    while isinstance(loaded, dict):
        inner = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            return loaded
        loaded = inner
    return {}
