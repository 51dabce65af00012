"""Shared parts of the converters: fitting names and shapes, inferred sizes, and Hugging Face's layer names and configs.

Names are those of checkpoint files, which transformers keeps stable, and not those of its modules. One of our tensors
may be several published ones, concatenated by rows: query, key and value have a matrix each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError

Names = Mapping[str, tuple[str, ...]]  # ours -> the published tensors that, row upon row, are it

log = logging.getLogger(__name__)

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
INTERPOLATIONS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}

_ATTENTION = "attention.attention"
_LAYER = {
    "norm": "layernorm_before",
    "attention.projection": "attention.output.dense",
    "experts.vision.norm": "layernorm_after",
    "experts.vision.expand": "intermediate.dense",
    "experts.vision.contract": "output.dense",
}
_LAYER_TENSORS = {
    "attention.weight": tuple(f"{_ATTENTION}.{part}.weight" for part in ("query", "key", "value")),
    "attention.query_bias": (f"{_ATTENTION}.query.bias",),
    "attention.key_bias": (f"{_ATTENTION}.key.bias",),
    "attention.value_bias": (f"{_ATTENTION}.value.bias",),
    "attention_gamma": ("lambda_1",),
    "expert_gamma": ("lambda_2",),
}

SIZES = {"width": "hidden_size", "layers": "num_hidden_layers"}  # ours -> config.json's, of every transformer
IMAGE_SIZES = {"image_size": "image_size", "patch_size": "patch_size"}  # and of those that read images

_BIASES = ("query.bias", "key.bias", "value.bias")


@dataclass(frozen=True)
class ConfigFile:
    """A kind's config.json: keys that complete the tensors, and values for which our model computes the same."""

    model_type: str
    keys: Mapping[str, str]  # ours -> theirs
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # their key -> the values that a model serves
    sizes: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs, of keys that tensors show as well
    resample: int = BICUBIC  # Pillow's number of the kernel that the kind's processor uses unless it says so

    def section(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the `model` section that a config.json gives.

        Raises ConfigError for a config of another kind, or of a variant that our model would compute differently.
        """
        model_type = config.get("model_type", self.model_type)
        if model_type != self.model_type:
            raise ConfigError(f"config.json: model_type is {model_type!r}, this format reads {self.model_type!r}")
        for key, supported in self.computed.items():
            if key in config and config[key] not in supported:
                expected = " or ".join(str(value) for value in supported)
                raise ConfigError(f"config.json: {key} is {config[key]!r}; mome's model supports {key}={expected} only")
        return {
            key: config[published_key]
            for key, published_key in self.keys.items()
            if config.get(published_key) is not None
        }

    def reading(self, processor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the `model` section that an image processor's config gives, and log differences.

        Missing keys have the defaults of that kind's processor.
        """
        number = processor.get("resample", self.resample)
        if number not in tuple(INTERPOLATIONS):  # whatever JSON holds
            raise ConfigError(
                f"preprocessor_config.json: resample is {number!r}; expected 2 (bilinear) or 3 (bicubic). Give "
                "interpolation=bicubic and remove the file, or resize otherwise"
            )
        for key in ("image_mean", "image_std"):
            values = processor.get(key, [0.5])
            if any(value != 0.5 for value in (values if isinstance(values, list) else [values])):
                log.warning(
                    "preprocessor_config.json: %s is %s; mome scales pixels with 0.5, so results differ", key, values
                )
        if processor.get("do_center_crop"):
            log.warning("preprocessor_config.json: do_center_crop; mome reads whole images, so results differ")
        return {"interpolation": INTERPOLATIONS[number]}

    def check(self, config: Mapping[str, Any], section: Mapping[str, Any]) -> None:
        """Raise ConfigError where a config.json contradicts sizes that were inferred from tensors."""
        for key, published_key in self.sizes.items():
            size = config.get(published_key)
            if isinstance(size, int) and key in section and size != section[key]:
                raise ConfigError(
                    f"config.json: {published_key} is {size}, the tensors have {section[key]}: it is another model's. "
                    "Give the folder in which both were published, or the weights file alone"
                )


def published_names(parameter: str, outside: Mapping[str, str], layer_prefix: str) -> tuple[str, ...]:
    """Return the published names of a parameter; `outside` names those outside the layers, or their modules.

    Raises KeyError where it has none.
    """
    if not parameter.startswith("blocks."):
        return (translated(parameter, outside),)
    _, layer, inner = parameter.split(".", 2)
    names = _LAYER_TENSORS.get(inner) or (translated(inner, _LAYER),)
    return tuple(f"{layer_prefix}{layer}.{name}" for name in names)


def translated(name: str, names: Mapping[str, str]) -> str:
    """Translate a parameter by its own entry in `names`, or by its module's."""
    module, _, last = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{last}"


def from_named(
    state: Mapping[str, Tensor],
    names: Names,
    shapes: Mapping[str, Shape],
    patch_size: int,
    allowed: Collection[str] = (),
    more: Mapping[str, Shape] | None = None,
) -> dict[str, Tensor]:
    """Convert published tensors to those of `names`, of the given `shapes`; the caller converts those of `more`.

    Models without biases of query, key and value (`qkv_bias: false`) get zeros, which compute the same. Raises
    CheckpointError as `require`.
    """
    biases = {part: shapes[name] for name, parts in names.items() for part in parts if part.endswith(_BIASES)}
    if not any(name in state for name in biases):
        state = {**state, **{name: torch.zeros(shape) for name, shape in biases.items()}}
    published_shapes = {
        published: shape for name in names for published, shape in _published(name, names, shapes, patch_size)
    }
    fitting = require(state, published_shapes | dict(more or {}), allowed)
    converted = {}
    for name, parts in names.items():
        if fitting.issuperset(parts):
            pieces = [state[part] for part in parts]
            converted[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(shapes[name])
    return converted


def to_named(
    state: Mapping[str, Tensor], names: Names, shapes: Mapping[str, Shape], patch_size: int
) -> dict[str, Tensor]:
    """Convert our tensors to their published form. Raises CheckpointError where one is missing or misshapen."""
    require({name: state[name] for name in names if name in state}, {name: shapes[name] for name in names})
    published = {}
    for name in names:
        parts = _published(name, names, shapes, patch_size)
        # Copies, because files of tensors do not hold two views of one memory.
        pieces = state[name].chunk(len(parts)) if len(parts) > 1 else [state[name]]
        for (part, shape), piece in zip(parts, pieces, strict=True):
            published[part] = piece.reshape(shape).clone() if len(parts) > 1 else piece.reshape(shape)
    return published


def _published(name: str, names: Names, shapes: Mapping[str, Shape], patch_size: int) -> list[tuple[str, Shape]]:
    """Return the names and shapes of a parameter's published parts."""
    shape, parts = published_shape(name, shapes[name], patch_size), names[name]
    return [(part, (shape[0] // len(parts), *shape[1:])) for part in parts]


def published_shape(name: str, shape: Shape, patch_size: int) -> Shape:
    """Return the published shape: kernels of convolutions, and a leading dimension for what all examples share."""
    if name == "image_embedding.patch.weight":
        return (shape[0], 3, patch_size, patch_size)
    if name in ("image_embedding.cls", "image_embedding.mask"):
        return (1, 1, *shape)
    if name == "image_embedding.positions":
        return (1, *shape)
    return shape


Shape = tuple[int, ...]


def require(state: Mapping[str, Tensor], shapes: Mapping[str, Shape], allowed: Collection[str] = ()) -> set[str]:
    """Return the names of `shapes` that the state has with the right shape.

    Names that match a pattern in `allowed` (`vqa_classifier.*`) may be missing, unexpected or of another shape, and are
    left out. Raises CheckpointError listing every other fault.
    """
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    wrong = [name for name, shape in shapes.items() if name in state and tuple(state[name].shape) != shape]
    faults = {
        "missing": excused(missing, allowed),
        "unexpected": excused(unexpected, allowed),
        "wrong shape": [
            f"{name} (is {tuple(state[name].shape)}, must be {shapes[name]})" for name in excused(wrong, allowed)
        ],
    }
    if any(faults.values()):
        lines = [f"  {fault}: {', '.join(sorted(names))}" for fault, names in faults.items() if names]
        message = "the checkpoint does not fit the model; compare its sizes with the config's model section"
        raise CheckpointError("\n".join([message, *lines]))
    return set(shapes) - set(missing) - set(wrong)


def excused(names: Iterable[str], allowed: Collection[str]) -> list[str]:
    """Return the names that match no pattern."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]


log = logging.getLogger(__name__)

HEAD_WIDTH = 64  # of nearly every published model


def layer_count(names: Iterable[str], pattern: str) -> int:
    """Return the number of layers; `pattern` matches a name's beginning and captures its layer.

    Raises CheckpointError unless layers are numbered from 0 without a gap.
    """
    layers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if gaps := [number for number in range(len(layers)) if number not in layers]:
        raise CheckpointError(f"the checkpoint has {len(layers)} layers, but none numbered {gaps[0]}; it is incomplete")
    return len(layers)


def assumed(key: str, value: int, reason: str, overrides: Mapping[str, Any]) -> int:
    """Return `value` for a key that cannot be inferred, with a warning unless it is in `overrides`."""
    if key not in overrides:
        log.warning("%s=%s assumed (%s); give %s=N if that is wrong", key, value, reason, key)
    return value


def assumed_heads(width: int, overrides: Mapping[str, Any]) -> int:
    """Return the assumed number of attention heads, which no tensor shows."""
    return assumed("heads", max(1, width // HEAD_WIDTH), f"width/{HEAD_WIDTH}", overrides)
