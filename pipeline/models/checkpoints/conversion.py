"""What Hugging Face's ViT, BEiT and their kin have in common: the names of an encoder layer's tensors, and their form.

Names are those of checkpoint files, which transformers keeps from version to version, and not those of its modules.
Of our tensors one may be several published ones, row upon row: query, key and value have a matrix each.
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
    """What a kind's config.json says that its tensors do not: keys that become ours, and values that we compute."""

    model_type: str
    keys: Mapping[str, str]  # ours -> theirs
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # their key -> the values that a model serves
    sizes: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs, of keys that tensors tell as well
    resample: int = BICUBIC  # Pillow's number of the kernel that the kind's processor uses unless it says so

    def section(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the `model` section that a config.json tells.

        Raises ConfigError for a config of another kind, or of a variant that our model would compute differently.
        """
        model_type = config.get("model_type", self.model_type)
        if model_type != self.model_type:
            raise ConfigError(f"config.json: model_type is {model_type!r}, this format reads {self.model_type!r}")
        for key, served in self.computed.items():
            if key in config and config[key] not in served:
                told = " or ".join(str(value) for value in served)
                raise ConfigError(f"config.json: {key} is {config[key]!r}; mome's model computes {key}={told} only")
        return {ours: config[theirs] for ours, theirs in self.keys.items() if config.get(theirs) is not None}

    def reading(self, processor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the `model` section that an image processor's config tells, and log what differs.

        What it does not say is as the processor of that kind does it.
        """
        number = processor.get("resample", self.resample)
        if number not in tuple(INTERPOLATIONS):  # whatever JSON holds
            raise ConfigError(
                f"preprocessor_config.json: resample is {number!r}; expected 2 (bilinear) or 3 (bicubic). Give "
                "interpolation=bicubic and remove the file, or resize otherwise"
            )
        for key in ("image_mean", "image_std"):
            told = processor.get(key, [0.5])
            if any(value != 0.5 for value in (told if isinstance(told, list) else [told])):
                log.warning(
                    "preprocessor_config.json: %s is %s; mome scales pixels with 0.5, so results differ", key, told
                )
        if processor.get("do_center_crop"):
            log.warning("preprocessor_config.json: do_center_crop; mome reads whole images, so results differ")
        return {"interpolation": INTERPOLATIONS[number]}

    def check(self, config: Mapping[str, Any], section: Mapping[str, Any]) -> None:
        """Raise ConfigError where a config.json contradicts the sizes of a section that tensors told."""
        for ours, theirs in self.sizes.items():
            told = config.get(theirs)
            if isinstance(told, int) and ours in section and told != section[ours]:
                raise ConfigError(
                    f"config.json: {theirs} is {told}, the tensors have {section[ours]}: it is another model's. "
                    "Give the folder that both were published in, or the file alone"
                )


def published_names(ours: str, outside: Mapping[str, str], layer_prefix: str) -> tuple[str, ...]:
    """The published names of one of our parameters; `outside` names those outside the layers, or their modules.

    KeyError where it has none.
    """
    if not ours.startswith("blocks."):
        return (translated(ours, outside),)
    _, layer, inner = ours.split(".", 2)
    names = _LAYER_TENSORS.get(inner) or (translated(inner, _LAYER),)
    return tuple(f"{layer_prefix}{layer}.{name}" for name in names)


def translated(name: str, names: Mapping[str, str]) -> str:
    """A parameter by its own entry, or by its module's."""
    module, _, last = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{last}"


def from_named(
    state: Mapping[str, Tensor],
    names: Names,
    ours: Mapping[str, Shape],
    patch_size: int,
    allowed: Collection[str] = (),
    more: Mapping[str, Shape] | None = None,
) -> dict[str, Tensor]:
    """Our tensors of `names`, in the shapes `ours`; `more` are published tensors that the caller converts itself.

    Models without biases of query, key and value (`qkv_bias: false`) compute what zeros do. Raises CheckpointError as
    `require`.
    """
    state = _with_biases(state, names, ours)
    wanted = {published: shape for name in names for published, shape in _published(name, names, ours, patch_size)}
    found = require(state, wanted | dict(more or {}), allowed)
    converted = {}
    for name, parts in names.items():
        if found.issuperset(parts):
            pieces = [state[part] for part in parts]
            converted[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(ours[name])
    return converted


def _with_biases(state: Mapping[str, Tensor], names: Names, ours: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The state with zeros for the biases of attention, where no layer has any."""
    biases = {part: ours[name] for name, parts in names.items() for part in parts if part.endswith(_BIASES)}
    if any(name in state for name in biases):
        return dict(state)
    return {**state, **{name: torch.zeros(shape) for name, shape in biases.items()}}


def to_named(
    state: Mapping[str, Tensor], names: Names, ours: Mapping[str, Shape], patch_size: int
) -> dict[str, Tensor]:
    """The published form of our tensors of `names`. Raises CheckpointError where one is absent or of another shape."""
    require({name: state[name] for name in names if name in state}, {name: ours[name] for name in names})
    published = {}
    for name in names:
        parts = _published(name, names, ours, patch_size)
        # Copies, because files of tensors do not hold two views of one memory.
        pieces = state[name].chunk(len(parts)) if len(parts) > 1 else [state[name]]
        for (part, shape), piece in zip(parts, pieces, strict=True):
            published[part] = piece.reshape(shape).clone() if len(parts) > 1 else piece.reshape(shape)
    return published


def _published(name: str, names: Names, ours: Mapping[str, Shape], patch_size: int) -> list[tuple[str, Shape]]:
    """Names and shapes of a parameter's published parts."""
    shape, parts = published_shape(name, ours[name], patch_size), names[name]
    return [(part, (shape[0] // len(parts), *shape[1:])) for part in parts]


def published_shape(ours: str, shape: Shape, patch_size: int) -> Shape:
    """Convolutions keep their kernel's shape, and what is one for all rows has a dimension for them."""
    if ours == "image_embedding.patch.weight":
        return (shape[0], 3, patch_size, patch_size)
    if ours in ("image_embedding.cls", "image_embedding.mask"):
        return (1, 1, *shape)
    if ours == "image_embedding.positions":
        return (1, *shape)
    return shape


Shape = tuple[int, ...]


def require(state: Mapping[str, Tensor], wanted: Mapping[str, Shape], allowed: Collection[str] = ()) -> set[str]:
    """The wanted names that the state has in their shapes: all of them, but for what `allowed` excuses.

    `allowed` are names or patterns (`vqa_classifier.*`); a name that matches may be missing, unexpected or of another
    shape, and is then left out. Raises CheckpointError listing every other fault.
    """
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    wrong = [name for name, shape in wanted.items() if name in state and tuple(state[name].shape) != shape]
    faults = {
        "missing": excused(missing, allowed),
        "unexpected": excused(unexpected, allowed),
        "wrong shape": [
            f"{name} (is {tuple(state[name].shape)}, must be {wanted[name]})" for name in excused(wrong, allowed)
        ],
    }
    if any(faults.values()):
        lines = [f"  {kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names]
        message = "the checkpoint does not fit the model; compare its sizes with the config's model section"
        raise CheckpointError("\n".join([message, *lines]))
    return set(wanted) - set(missing) - set(wrong)


def excused(names: Iterable[str], allowed: Collection[str]) -> list[str]:
    """The names that no pattern excuses."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]


log = logging.getLogger(__name__)

HEAD_WIDTH = 64  # of nearly every published model


def layer_count(names: Iterable[str], pattern: str) -> int:
    """Return how many layers there are; `pattern` finds a layer's number at the beginning of a name.

    Raises CheckpointError unless they are numbered from 0 without a gap.
    """
    layers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if gaps := [number for number in range(len(layers)) if number not in layers]:
        raise CheckpointError(f"the checkpoint has {len(layers)} layers, but none numbered {gaps[0]}; it is not whole")
    return len(layers)


def assumed(key: str, value: int, reason: str, given: Mapping[str, Any]) -> int:
    """Return `value` for a key that no tensor tells, and say so unless the key was given."""
    if key not in given:
        log.warning("%s=%s assumed (%s); give %s=N if that is wrong", key, value, reason, key)
    return value


def assumed_heads(width: int, given: Mapping[str, Any]) -> int:
    """Return the number of attention heads of a model whose tensors do not tell it."""
    return assumed("heads", max(1, width // HEAD_WIDTH), f"width/{HEAD_WIDTH}", given)
