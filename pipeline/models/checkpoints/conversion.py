"""Shared parts of the converters: names and shapes of published tensors, inferred sizes, and Hugging Face's configs.

Names are those of checkpoint files, which transformers keeps stable, and not those of its modules. One of our tensors
may be several published ones, row upon row (query, key and value have a matrix each), and one published tensor may hold
several of ours, in the order of the model's parameters (the modality vectors are one table).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageTarget
from pipeline.models import skeleton
from pipeline.models.model import HeadConfig

Shape = tuple[int, ...]
State = dict[str, Tensor]
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

MASK, SECOND = "image_embedding.mask", "image_embedding.second"
MODALITIES = ("text_embedding.modality", "image_embedding.modality", SECOND)


def hugging_face_image_names(embeddings: str) -> dict[str, str]:
    """Return Hugging Face's names of the image embedding, which are the same in ViT, BEiT and ViLT."""
    return {
        "image_embedding.patch": f"{embeddings}.patch_embeddings.projection",
        "image_embedding.cls": f"{embeddings}.cls_token",
        MASK: f"{embeddings}.mask_token",
        "image_embedding.positions": f"{embeddings}.position_embeddings",
    }


@dataclass(frozen=True)
class ConfigFile:
    """A kind's config.json: keys that complete the tensors, and values for which our model computes the same."""

    model_type: str
    keys: Mapping[str, str]  # ours -> theirs
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # their key -> the values that a model serves
    sizes: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs, of keys that tensors show as well
    resample: int = BICUBIC  # Pillow's number of the kernel that the kind's processor uses unless it says so

    def section(self, config: Mapping[str, Any] | None, processor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the `model` section that a config.json and an image processor's config give.

        Missing keys of the processor have the defaults of that kind's; its differences from ours are logged. Raises
        ConfigError for a config of another kind, or of a variant that our model would compute differently.
        """
        config = config or {}
        model_type = config.get("model_type", self.model_type)
        if model_type != self.model_type:
            raise ConfigError(f"config.json: model_type is {model_type!r}, this format reads {self.model_type!r}")
        for key, supported in self.computed.items():
            if key in config and config[key] not in supported:
                expected = " or ".join(str(value) for value in supported)
                raise ConfigError(f"config.json: {key} is {config[key]!r}; mome's model supports {key}={expected} only")
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
        section = {key: config[theirs] for key, theirs in self.keys.items() if config.get(theirs) is not None}
        return section | {"interpolation": INTERPOLATIONS[number]}

    def check(self, config: Mapping[str, Any], section: Mapping[str, Any]) -> None:
        """Raise ConfigError where a config.json contradicts sizes that were inferred from tensors."""
        for key, theirs in self.sizes.items():
            size = config.get(theirs)
            if isinstance(size, int) and key in section and size != section[key]:
                raise ConfigError(
                    f"config.json: {theirs} is {size}, the tensors have {section[key]}: it is another model's. "
                    "Give the folder in which both were published, or the weights file alone"
                )


class Format:
    """A published naming of weights, with exact conversions in both directions; a subclass has the tables of names."""

    title: ClassVar[str] = ""  # for messages
    kinds: ClassVar[tuple[str, ...] | None] = None  # of model that the format can hold; None: every
    exact: ClassVar[bool] = True  # False: a round trip computes the same, with other tensors
    config: ClassVar[ConfigFile | None] = None  # of a Hugging Face folder: how its config.json is read
    image_target: ClassVar[ImageTarget | None] = None  # of its masked-image head; None: by the number of its outputs

    # Published names of our parameters, or of their modules: outside the layers, and inside one.
    outside: ClassVar[Mapping[str, str]] = {}
    layers: ClassVar[str] = ""  # what is in front of a layer's number
    layer: ClassVar[Mapping[str, str | tuple[str, ...]]] = HUGGING_FACE_LAYER
    expert: ClassVar[str] = "vision"  # of which every checkpoint has tensors
    optional: ClassVar[tuple[str, ...]] = ()  # parts that a checkpoint may lack, and is then read and written without
    prefix: ClassVar[str] = ""  # of the names of a model inside a class with heads; a model without them lacks it
    unprefixed: ClassVar[tuple[str, ...]] = ()  # how the names of the heads begin
    unused: ClassVar[str] = r"(?!)"  # expression for tensors that have no counterpart and are dropped
    tables: ClassVar[tuple[str, ...]] = ()  # of relative positions, one of which shows that they are relative

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Infer the `model` section of a published state from tensor shapes; keys in `overrides` take precedence.

        Raises ConfigError for a state of another model, or of sizes that neither shapes nor `overrides` show.
        """
        state = self.prepare(state)
        parameters = (
            "image_embedding.patch.weight",
            f"blocks.0.experts.{self.expert}.expand.weight",
            "image_embedding.positions",
            "text_embedding.positions",
        )
        patch, expand, image, text = (state.get(next(iter(self.names(name)), "")) for name in parameters)
        is_relative = any(name in state for name in self.tables)
        if patch is None or expand is None or (image is None and not is_relative):
            raise ConfigError(f"no {self.title} checkpoint: the patch projection, layer 0 or positions are missing")
        assert self.kinds is not None
        section: dict[str, Any] = {
            "kind": self.kinds[0],
            "width": len(patch),
            "layers": layer_count(state, self.layers),
            "mlp_ratio": len(expand) // len(patch),
            "patch_size": patch.shape[-1],
        }
        if image is not None:
            section["image_size"] = round((image.shape[1] - 1) ** 0.5) * patch.shape[-1]
        if text is not None:
            section["max_text_length"] = len(text)
        if self.tables:  # a VLMo
            section["positions"] = "relative" if is_relative else "absolute"
            section["layer_scale"] = 0.1 if self.names("blocks.0.attention_gamma")[0] in state else None
        section |= self.infer_more(state, section, overrides)
        if "heads" not in section:
            section["heads"] = assumed_heads(len(patch), overrides)
        return section | dict(overrides)

    def infer_more(self, state: State, section: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return further keys of a section that has been inferred so far."""
        return {}

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        """Convert a published state to ours, with its own numbers of words, answers and classes.

        Names that match `allowed` (see `require`) may differ, and are left out. Raises CheckpointError listing every
        missing, unexpected or wrong-shaped tensor. Results may share memory with the given state.
        """
        state = {name: tensor for name, tensor in self.prepare(state).items() if not re.search(self.unused, name)}
        return from_named(state, *self.layout(config, state), allowed)

    def write(self, state: State, config: Any) -> State:
        """Convert our state to the published form, without what the format has no names for."""
        return to_named(state, *self.layout(config, state))

    def prepare(self, state: State) -> State:
        """Return a published state under the names of the tables."""
        if any(name.startswith(self.prefix) for name in state):
            return dict(state)
        return {name if name.startswith(self.unprefixed) else self.prefix + name: state[name] for name in state}

    def names(self, parameter: str) -> tuple[str, ...]:
        """Return the published names of a parameter by its own entry in a table, or by its module's; () for none."""
        prefix, name = "", parameter
        table: Mapping[str, str | tuple[str, ...]] = self.outside
        if parameter.startswith("blocks."):
            _, number, name = parameter.split(".", 2)
            prefix, table = f"{self.layers}{number}.", self.layer
        module, _, last = name.rpartition(".")
        published = table.get(name, f"{table[module]}.{last}" if module in table else ())
        return tuple(prefix + part for part in ((published,) if isinstance(published, str) else published))

    def layout(self, config: Any, state: State) -> tuple[Names, dict[str, Shape]]:
        """Return the published names and our shapes of the parameters that a state of this format holds.

        `state` has our names or the published ones, and gives the numbers of words and of outputs of heads (default 1).
        Parts in `optional` of which it has no tensor are left out. So are the mask embedding and the second image's
        modality vector, which belong to heads but are published apart from them.
        """

        def rows(*parameters: str) -> int:
            names = [name for parameter in parameters for name in (parameter, *self.names(parameter))]
            return next((len(state[name]) for name in names if name in state), 1)

        heads = HeadConfig(
            image_target="visual_tokens",
            visual_tokens=rows("mim_head.predict.bias"),
            classes=rows("classification_head.classify.bias"),
            answers=rows("vqa_head.classify.bias"),
            nlvr2=True,
            ranking=True,
        )
        words = rows("text_embedding.word.weight", "text_embedding.word_embeddings.weight")
        model = skeleton(config, words, heads)
        parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if self.names(name)}
        names = {name: self.names(name) for name in parameters}
        present = {name for name in names if not state.keys().isdisjoint((name, *names[name]))}
        if SECOND in names:  # published as the third row of the modalities
            has_second = SECOND in state or len(state.get(names[SECOND][0], ())) >= len(MODALITIES)
            present = present - {SECOND} | ({SECOND} if has_second else set())
        parts = {model.part_of(name) for name in present - {MASK, SECOND}}
        kept = [
            name
            for name in names
            if name in present
            or (name not in (MASK, SECOND) and ((part := model.part_of(name)) not in self.optional or part in parts))
        ]
        return {name: names[name] for name in kept}, {name: parameters[name] for name in kept}


def published_rows(names: Names, shapes: Mapping[str, Shape]) -> dict[str, list[tuple[str, Shape]]]:
    """Return, for each published tensor, the parameters that it holds as rows, with the shapes of these rows."""
    rows: dict[str, list[tuple[str, Shape]]] = {}
    for name, parts in names.items():
        shape = shapes[name]
        if name == "image_embedding.patch.weight":  # the kernel of a convolution
            side = math.isqrt(shape[1] // 3)
            shape = (shape[0], 3, side, side)
        elif name in ("image_embedding.cls", MASK):
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
    state: State,
    names: Names,
    shapes: Mapping[str, Shape],
    allowed: Collection[str] = (),
    more: Mapping[str, Shape] | None = None,
) -> State:
    """Convert published tensors to those of `names`, of the given `shapes`; the caller converts those of `more`.

    Models without biases of query, key and value (`qkv_bias: false`) get zeros, which compute the same. Raises
    CheckpointError as `require`.
    """
    rows = published_rows(names, shapes)
    ends = tuple(f"attention.attention.{name}.bias" for name in ("query", "key", "value"))  # not BERT's, which has them
    biases = [part for part in rows if part.endswith(ends)]
    if not any(part in state for part in biases):
        state = state | {part: torch.zeros(rows[part][0][1]) for part in biases}
    published = {
        part: held[0][1] if len(held) == 1 else (sum(shape[0] for _, shape in held), *held[0][1][1:])
        for part, held in rows.items()
    }
    fitting = require(state, {**published, **(more or {})}, allowed)
    pieces: dict[str, list[Tensor]] = {}
    for part, held in rows.items():
        if part not in fitting:
            continue
        tensors: Iterable[Tensor] = (state[part],)
        if len(held) > 1:  # copies, because files of tensors do not hold two views of one memory
            tensors = (tensor.clone() for tensor in state[part].split([shape[0] for _, shape in held]))
        for (name, _), tensor in zip(held, tensors, strict=True):
            pieces.setdefault(name, []).append(tensor)
    return {
        name: (pieces[name][0] if len(parts) == 1 else torch.cat(pieces[name])).reshape(shapes[name])
        for name, parts in names.items()
        if fitting.issuperset(parts)
    }


def to_named(state: State, names: Names, shapes: Mapping[str, Shape]) -> State:
    """Convert our tensors to their published form. Raises CheckpointError where one is missing or misshapen."""
    require({name: state[name] for name in names if name in state}, shapes)
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


def layer_count(names: Iterable[str], prefix: str) -> int:
    """Return the number of layers, whose tensors have names of `prefix`, a number and a dot.

    Raises CheckpointError unless layers are numbered from 0 without a gap.
    """
    layers = {int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
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
