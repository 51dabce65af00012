"""Shared parts of the converters: names and shapes of published tensors, inferred sizes, and Hugging Face's configs.

Names are those of checkpoint files, which transformers keeps stable, and not those of its modules. One of our tensors
may be several published ones, row upon row (query, key and value have a matrix each), and one published tensor may hold
several of ours, in the order of the model's parameters (the modality vectors are one table).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import TransformerConfig
from pipeline.models import skeleton
from pipeline.models.model import HeadConfig

Shape = tuple[int, ...]
Names = dict[str, tuple[str, ...]]  # ours -> the published tensors that, row upon row, are it

log = logging.getLogger(__name__)

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
INTERPOLATIONS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
HEAD_WIDTH = 64  # of nearly every published model

# A layer of Hugging Face's ViT, BEiT and ViLT: our parameters, or their modules -> theirs.
HUGGING_FACE_LAYER: Mapping[str, str | tuple[str, ...]] = {
    "norm": "layernorm_before",
    "attention.weight": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    "attention.query_bias": "attention.attention.query.bias",
    "attention.key_bias": "attention.attention.key.bias",
    "attention.value_bias": "attention.attention.value.bias",
    "attention.projection": "attention.output.dense",
    "attention_gamma": "lambda_1",
    "experts.vision.norm": "layernorm_after",
    "experts.vision.expand": "intermediate.dense",
    "experts.vision.contract": "output.dense",
    "expert_gamma": "lambda_2",
}
SIZES = {"width": "hidden_size", "layers": "num_hidden_layers"}  # ours -> config.json's, of every transformer
IMAGE_SIZES = {"image_size": "image_size", "patch_size": "patch_size"}  # and of those that read images

SECOND = "image_embedding.second"
MODALITIES = ("text_embedding.modality", "image_embedding.modality", SECOND)


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
        return {key: config[theirs] for key, theirs in self.keys.items() if config.get(theirs) is not None}

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
        for key, theirs in self.sizes.items():
            size = config.get(theirs)
            if isinstance(size, int) and key in section and size != section[key]:
                raise ConfigError(
                    f"config.json: {theirs} is {size}, the tensors have {section[key]}: it is another model's. "
                    "Give the folder in which both were published, or the weights file alone"
                )


def published_names(
    parameter: str,
    outside: Mapping[str, str],
    layer_prefix: str,
    layer_names: Mapping[str, str | tuple[str, ...]] = HUGGING_FACE_LAYER,
) -> tuple[str, ...]:
    """Return the published names of a parameter, by its own entry in `outside` or `layer_names`, or by its module's.

    Raises KeyError where it has none.
    """
    prefix, name = "", parameter
    names: Mapping[str, str | tuple[str, ...]] = outside
    if parameter.startswith("blocks."):
        _, layer, name = parameter.split(".", 2)
        prefix, names = f"{layer_prefix}{layer}.", layer_names
    module, _, last = name.rpartition(".")
    published = names[name] if name in names else f"{names[module]}.{last}"
    return tuple(prefix + part for part in ((published,) if isinstance(published, str) else published))


def published_layout(
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    naming: Callable[[str], tuple[str, ...]],
    optional: Collection[str],
    nameless: Collection[str] = (),
) -> tuple[Names, dict[str, Shape]]:
    """Return the published names and our shapes of the parameters of a model with all heads for fused inputs.

    `state` has our names or the published ones. It gives the numbers of words and answers (default 1), and of the parts
    in `optional` those of which it has no tensor are left out, as are parts in `nameless`. The second image's modality
    vector belongs to a head, but is published in the table of modalities, whose rows show whether it is there.
    """
    words, answers = (
        next((len(state[name]) for name in (own, *naming(own)) if name in state), 1)
        for own in ("text_embedding.word.weight", "vqa_head.classify.bias")
    )
    model = skeleton(config, words, HeadConfig(answers=answers, nlvr2=True, ranking=True))
    has_second = SECOND in state or len(state.get(naming(SECOND)[0], ())) >= len(MODALITIES)
    part_of = {name: model.part_of(name) for name, _ in model.named_parameters() if name != SECOND}
    names = {name: naming(name) for name, part in part_of.items() if part not in nameless}
    present = {part_of[name] for name in names if not state.keys().isdisjoint((name, *names[name]))}
    absent = set(optional) - present
    kept = {name for name in names if part_of[name] not in absent} | ({SECOND} if has_second else set())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in kept}
    return {name: naming(name) for name in shapes}, shapes


def published_rows(names: Names, shapes: Mapping[str, Shape]) -> dict[str, list[tuple[str, Shape]]]:
    """Return, for each published tensor, the parameters that it holds as rows, with the shapes of these rows."""
    rows: dict[str, list[tuple[str, Shape]]] = {}
    for name, parts in names.items():
        shape = shapes[name]
        if name == "image_embedding.patch.weight":  # the kernel of a convolution
            side = math.isqrt(shape[1] // 3)
            shape = (shape[0], 3, side, side)
        elif name in ("image_embedding.cls", "image_embedding.mask"):
            shape = (1, 1, *shape)
        elif name == "image_embedding.positions" or name in MODALITIES:
            shape = (1, *shape)
        elif name.startswith("itc_head.log_scale"):
            shape = ()
        for part in parts:
            own = shape if len(parts) == 1 else (shape[0] // len(parts), *shape[1:])
            rows.setdefault(part, []).append((name, own))
    return rows


def from_named(
    state: Mapping[str, Tensor],
    names: Names,
    shapes: Mapping[str, Shape],
    allowed: Collection[str] = (),
    more: Mapping[str, Shape] | None = None,
) -> dict[str, Tensor]:
    """Convert published tensors to those of `names`, of the given `shapes`; the caller converts those of `more`.

    Models without biases of query, key and value (`qkv_bias: false`) get zeros, which compute the same. Raises
    CheckpointError as `require`. Results may share memory with the given state.
    """
    rows = published_rows(names, shapes)
    ends = tuple(f"attention.attention.{name}.bias" for name in ("query", "key", "value"))  # not BERT's, which has them
    biases = [part for part in rows if part.endswith(ends)]
    if not any(part in state for part in biases):
        state = {**state, **{part: torch.zeros(rows[part][0][1]) for part in biases}}
    published = {
        part: held[0][1] if len(held) == 1 else (sum(shape[0] for _, shape in held), *held[0][1][1:])
        for part, held in rows.items()
    }
    fitting = require(state, published | dict(more or {}), allowed)
    pieces: dict[str, list[Tensor]] = {}
    for part in rows:
        if part not in fitting:
            continue
        tensors: Iterable[Tensor] = (state[part],)
        if len(rows[part]) > 1:  # copies, because files of tensors do not hold two views of one memory
            tensors = (tensor.clone() for tensor in state[part].split([shape[0] for _, shape in rows[part]]))
        for (name, _), tensor in zip(rows[part], tensors, strict=True):
            pieces.setdefault(name, []).append(tensor)
    return {
        name: (pieces[name][0] if len(parts) == 1 else torch.cat(pieces[name])).reshape(shapes[name])
        for name, parts in names.items()
        if fitting.issuperset(parts)
    }


def to_named(state: Mapping[str, Tensor], names: Names, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Convert our tensors to their published form. Raises CheckpointError where one is missing or misshapen."""
    require({name: state[name] for name in names if name in state}, {name: shapes[name] for name in names})
    published = {}
    for part, rows in published_rows(names, shapes).items():
        tensors = []
        for name, shape in rows:
            parts = names[name]
            # Copies of several parts, because files of tensors do not hold two views of one memory.
            own = state[name] if len(parts) == 1 else state[name].chunk(len(parts))[parts.index(part)].clone()
            tensors.append(own.reshape(shape))
        published[part] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return published


def require(state: Mapping[str, Tensor], shapes: Mapping[str, Shape], allowed: Collection[str] = ()) -> set[str]:
    """Return the names of `shapes` that the state has with the right shape.

    Names that match a pattern in `allowed` (`vqa_classifier.*`) may be missing, unexpected or of another shape, and are
    left out. Raises CheckpointError listing every other fault.
    """
    missing = {name: name for name in shapes if name not in state}
    wrong = {
        name: f"{name} (is {tuple(state[name].shape)}, must be {shape})"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    }
    unexpected = {name: name for name in state if name not in shapes}
    lines = []
    for fault, texts in {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}.items():
        faults = [text for name, text in texts.items() if not any(fnmatchcase(name, pattern) for pattern in allowed)]
        lines += [f"  {fault}: {', '.join(sorted(faults))}"] if faults else []
    if lines:
        message = "the checkpoint does not fit the model; compare its sizes with the config's model section"
        raise CheckpointError("\n".join([message, *lines]))
    return shapes.keys() - missing.keys() - wrong.keys()


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
