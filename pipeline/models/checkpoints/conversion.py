"""Conversion of published checkpoints to our states and back, by tables of names; `formats` holds the tables.

Names are those of checkpoint files, which transformers keeps stable. One of our tensors may be several published ones
(query, key and value have a matrix each), and one published tensor may hold several of ours, row upon row in the order
of the model's parameters (the modality vectors are one table).
"""

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageTarget
from pipeline.models import skeleton
from pipeline.models.model import HeadConfig
from pipeline.models.resize import cut_text_positions

Shape = tuple[int, ...]
State = dict[str, Tensor]
Names = dict[str, tuple[str, ...]]  # ours -> the published tensors that it consists of
Table = Mapping[str, str | tuple[str, ...]]

log = logging.getLogger(__name__)

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
INTERPOLATIONS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
HEAD_WIDTH = 64  # of nearly every published model
SIZES = {"width": "hidden_size", "layers": "num_hidden_layers"}  # ours -> config.json's, of every transformer
IMAGE_SIZES = SIZES | {"image_size": "image_size", "patch_size": "patch_size"}
MASK, SECOND = "image_embedding.mask", "image_embedding.second"
MODALITIES = ("text_embedding.modality", "image_embedding.modality", SECOND)
POSITIONED = ("image_embedding.patch.weight", "image_embedding.positions", "text_embedding.positions")
SIDE_BY_SIDE = {"positions.image": 1}  # the dimension that joins several published tensors, where it is not 0

COUNTED = {  # parameters whose rows count the words and the outputs of heads
    "words": ("text_embedding.word.weight", "text_embedding.word_embeddings.weight"),
    "visual_tokens": ("mim_head.predict.bias",),
    "classes": ("classification_head.classify.bias",),
    "answers": ("vqa_head.classify.bias",),
}

# A layer of Hugging Face's ViT, BEiT and ViLT: our parameters, or their modules -> theirs.
HUGGING_FACE_LAYER: Table = {
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


class Format:
    """A published naming of weights, with exact conversions in both directions; a subclass has the tables of names."""

    title: ClassVar[str] = ""  # for messages
    kinds: ClassVar[tuple[str, ...] | None] = None  # of model that the format can hold; None: every
    exact: ClassVar[bool] = True  # False: a round trip computes the same, with other tensors
    image_target: ClassVar[ImageTarget | None] = None  # of its masked-image head; None: by the number of its outputs

    # Published names of our parameters or modules, without `prefix`: outside the layers, and inside one.
    outside: ClassVar[Table] = {}
    layers: ClassVar[str] = "encoder.layer."  # what is in front of a layer's number
    layer: ClassVar[Table] = HUGGING_FACE_LAYER
    optional: ClassVar[tuple[str, ...]] = ()  # parts that a checkpoint may lack, and is then read and written without
    prefix: ClassVar[str] = ""  # of the names of a model inside a class with heads; a model without them lacks it
    unprefixed: ClassVar[tuple[str, ...]] = ()  # how the names of the heads begin
    unused: ClassVar[str] = r"(?!)"  # expression for tensors that have no counterpart and are dropped
    tables: ClassVar[tuple[str, ...]] = ()  # relative positions of a VLMo: forms of all layers, and of layer 0
    older: ClassVar[tuple[tuple[str, str], ...]] = ()  # expressions for parts of other releases' names -> these names'
    is_batched: ClassVar[bool] = True  # [CLS], positions and modality vectors are published with dimensions of 1
    is_tied: ClassVar[bool] = False  # the decoder of masked words may be the table of words, and then has no name
    copies: ClassVar[dict[str, str]] = {}  # names that some readers expect -> the tensor that is written again there

    # Hugging Face's config.json and image processor, of formats with a model_type.
    model_type: ClassVar[str] = ""
    config_file: ClassVar[str] = "config.json"
    image_processor: ClassVar[str] = ""  # transformers' class; "" for a model of texts
    classes: ClassVar[dict[str, str]] = {}  # transformers' class by the head that is written; "" without any
    keys: ClassVar[dict[str, str]] = {"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}  # ours -> theirs
    computed: ClassVar[dict[str, tuple[Any, ...]]] = {"hidden_act": ("gelu",), "num_channels": (3,)}  # supported
    sizes: ClassVar[dict[str, str]] = IMAGE_SIZES  # ours -> theirs, of keys that tensors show as well
    # Our parameters that show them: the first embedding, positions of patches and of words, a matrix of layer 0.
    shown: ClassVar[tuple[str, str, str, str]] = (*POSITIONED, "blocks.0.experts.vision.expand.weight")
    max_text_length: ClassVar[int | None] = None  # to which longer positions are cut; None: they must be the model's
    resample: ClassVar[int] = BICUBIC  # Pillow's number of the kernel that the processor uses unless it says so

    def section(self, config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the `model` section that a config.json and an image processor's config give.

        Differences of the processor are logged. Raises ConfigError for another kind, or a variant computed differently.
        """
        if (model_type := config.get("model_type", self.model_type)) != self.model_type:
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
        section = {key: config[theirs] for key, theirs in self.keys.items() if config.get(theirs) is not None}
        for key in ("image_mean", "image_std"):
            if (values := processor.get(key)) is not None:
                section[key] = values if isinstance(values, list) else [values] * 3
        if "do_center_crop" in processor:
            crop, size = (processor.get(key) for key in ("crop_size", "size"))
            shorter = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
            if processor["do_center_crop"] and shorter != (crop.get("height") if isinstance(crop, dict) else crop):
                log.warning("preprocessor_config.json: crops less than the shorter side of the image; mome does not")
            section["image_fit"] = "centre_crop" if processor["do_center_crop"] else "stretch"
        return section | {"interpolation": INTERPOLATIONS[number]}

    def hugging_face_config(self, state: State, config: Any, num_words: int, labels: Sequence[str]) -> dict[str, Any]:
        """Return the config.json with which transformers reads what `write` makes of a state.

        `labels` name the outputs of a classifier. Raises ConfigError for a format that transformers does not read.
        """
        heads = {name.split(".")[0] for name in state} & self.classes.keys()
        if not self.classes or len(heads) > 1:
            fault = (
                f"its heads {', '.join(sorted(heads))} have classes of their own" if heads else "it has no such form"
            )
            raise ConfigError(f"{self.title} cannot be written as a Hugging Face folder: {fault}; give a file's name")
        names = self.sizes | self.keys
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.classes["".join(heads)]]}
        written |= {theirs: getattr(config, ours) for ours, theirs in names.items() if hasattr(config, ours)}
        written |= {key: values[0] for key, values in self.computed.items()}
        written |= {"intermediate_size": config.mlp_ratio * config.width, "vocab_size": num_words}
        if labels:
            written["id2label"] = {str(number): label for number, label in enumerate(labels)}
            written["label2id"] = {label: number for number, label in enumerate(labels)}
        return written | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}

    def infer(self, state: State, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Infer the `model` section of a published state from `overrides`, else tensor shapes, else ConfigError."""
        state = self.prepare(state)
        first, image, text, expand = (state.get((*self.names(name), "")[0]) for name in self.shown)
        table = next((state[name] for name in self.tables if name in state), None)
        is_image = "patch_size" in self.sizes
        if first is None or expand is None or (image is None and table is None if is_image else text is None):
            raise ConfigError(f"no {self.title} checkpoint: the first embedding, positions or layer 0 are missing")
        assert self.kinds is not None
        prefix = re.escape(self.prefix + self.layers)
        numbers = {int(match[1]) for name in state if (match := re.match(rf"{prefix}(\d+)\.", name))}
        if expand.dim() != 2 or 0 in expand.shape:
            name = self.names(self.shown[3])[0]
            raise CheckpointError(f"{name} has the shape {tuple(expand.shape)}; expected (width of the MLP, width)")
        width, layers = expand.shape[1], len(numbers)
        if gaps := [number for number in range(layers) if number not in numbers]:
            raise CheckpointError(f"the checkpoint has {layers} layers, but none numbered {gaps[0]}; it is incomplete")
        mlp_ratio = len(expand) // width
        section: dict[str, Any] = {"kind": self.kinds[0], "width": width, "layers": layers, "mlp_ratio": mlp_ratio}
        patch_size = first.shape[-1]
        if is_image:
            section["patch_size"] = patch_size
        if image is not None:
            section["image_size"] = round((image.shape[1] - 1) ** 0.5) * patch_size
        if text is not None:
            section["max_text_length"] = min(len(text), self.max_text_length or len(text))
        assumed = {"heads": (max(1, width // HEAD_WIDTH), f"width/{HEAD_WIDTH}")}  # value and reason
        if self.tables:  # a VLMo
            section["positions"] = "absolute" if table is None else "relative"
            section["layer_scale"] = 0.1 if self.names("blocks.0.attention_gamma")[0] in state else None
            names = [self.names(f"blocks.{n}.experts.vision_language.expand.weight") for n in range(layers)]
            if fused := [n for n in range(layers) if not state.keys().isdisjoint(names[n])]:
                section["vision_language_layers"] = layers - fused[0]
            else:
                upper = 3 if layers > 12 else min(2, layers - 1)
                assumed["vision_language_layers"] = (upper, f"VLMo's, for {layers} layers")
            if width == 544:  # base_plus
                assumed["heads"] = (16, f"VLMo's, for width {width}")
        if table is not None:
            is_of_layer = self.tables[-1].startswith(self.prefix + self.layers)
            section["heads"] = table.shape[1] if is_of_layer else table.shape[1] // layers
            if is_of_layer:
                section["image_size"] = (round((len(table) - 3) ** 0.5) + 1) // 2 * patch_size
        for key, (value, reason) in assumed.items():
            if key not in section and key not in overrides:
                log.warning("%s=%s assumed (%s); give %s=N if that is wrong", key, value, reason, key)
                section[key] = value
        section |= overrides
        if section["kind"] == "vilt":
            # As in ViLT's release and in Hugging Face's processor.
            section.setdefault("longest_side", int(1333 / 800 * section["image_size"]))
        return section

    def read(self, state: State, config: Any, allowed: Collection[str] = ()) -> State:
        """Convert a published state to ours, with its own numbers of words, answers and classes.

        Names that match `allowed` (see `require`, which raises) may differ, and are left out. Models without biases of
        query, key and value (`qkv_bias: false`) get zeros. Results may share memory with the given state. ConfigError
        for a `max_text_length` above the number of positions that would be cut to it.
        """
        state = {name: tensor for name, tensor in self.prepare(state).items() if not re.search(self.unused, name)}
        for name in self.names(self.shown[2]) if self.max_text_length is not None else ():
            if name in state:
                state[name] = cut_text_positions(state[name], config.max_text_length)
        names, shapes = self.layout(config, state)
        contents = published_contents(names, shapes, self.is_batched)
        ends = tuple(f"attention.attention.{name}.bias" for name in ("query", "key", "value"))  # not BERT's, required
        biases = [part for part in contents if part.endswith(ends)]
        if not any(part in state for part in biases):
            state |= {part: torch.zeros(contents[part][0][1]) for part in biases}
        expected = {
            part: own[0][1] if len(own) == 1 else (sum(shape[0] for _, shape in own), *own[0][1][1:])
            for part, own in contents.items()
        }
        fitting = require(state, expected, allowed)
        pieces: dict[str, list[Tensor]] = {}
        for part in (part for part in contents if part in fitting):
            tensors = [state[part]]
            if len(contents[part]) > 1:  # copies, because files of tensors do not hold two views of one memory
                tensors = [rows.clone() for rows in state[part].split([shape[0] for _, shape in contents[part]])]
            for (name, _), tensor in zip(contents[part], tensors, strict=True):
                pieces.setdefault(name, []).append(tensor)
        return {
            name: torch.cat(pieces[name], SIDE_BY_SIDE.get(name, 0)).reshape(shapes[name])
            if len(parts) > 1
            else pieces[name][0].reshape(shapes[name])
            for name, parts in names.items()
            if fitting.issuperset(parts)
        }

    def write(self, state: State, config: Any) -> State:
        """Convert our state to the published form, without what the format has no names for; see `require`."""
        names, shapes = self.layout(config, state)
        require({name: state[name] for name in names if name in state}, shapes)
        published = {}
        for part, own in published_contents(names, shapes, self.is_batched).items():
            tensors = []
            for name, shape in own:
                tensor, parts = state[name], names[name]
                if len(parts) > 1:  # a copy, because files of tensors do not hold two views of one memory
                    tensor = tensor.chunk(len(parts), SIDE_BY_SIDE.get(name, 0))[parts.index(part)].clone()
                tensors.append(tensor.reshape(shape))
            published[part] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return published | {copy: published[name].clone() for copy, name in self.copies.items() if name in published}

    def prepare(self, state: State) -> State:
        """Return a published state under the names of the tables; preparing it again changes nothing."""
        prepared: State = {}
        for name, tensor in state.items():
            for pattern, replacement in self.older:
                name = re.sub(pattern, replacement, name)
            prepared[name] = tensor
        prepared |= {name: state[name] for name in prepared if name in state}  # of a file with both names
        if not any(name.startswith(self.prefix) for name in prepared):
            names = {name: name if name.startswith(self.unprefixed) else self.prefix + name for name in prepared}
            prepared = {names[name]: tensor for name, tensor in prepared.items()}
        if self.is_tied and self.names("mlm_head.decode.bias")[0] in prepared:
            decoder = self.names("mlm_head.decode.weight")[0]
            words = next((name for own in COUNTED["words"] for name in self.names(own) if name in prepared), None)
            if words is not None:  # a copy, because files of tensors do not hold one memory twice
                prepared[decoder] = prepared.get(decoder, prepared[words]).clone()
        return prepared

    def names(self, parameter: str) -> tuple[str, ...]:
        """Return the published names of a parameter, by the entry of it or its innermost module; () for none."""
        before, module, table = "", parameter, self.outside
        if parameter.startswith("blocks."):
            _, number, module = parameter.split(".", 2)
            before, table = f"{self.layers}{number}.", self.layer
        rest = ""
        while module and module not in table:
            module, _, last = module.rpartition(".")
            rest = f".{last}{rest}"
        published = table.get(module, ())
        parts = [before + part + rest for part in ((published,) if isinstance(published, str) else published)]
        return tuple(part if part.startswith(self.unprefixed) else self.prefix + part for part in parts)

    def layout(self, config: Any, state: State) -> tuple[Names, dict[str, Shape]]:
        """Return the published names and our shapes of the parameters that a state of this format holds.

        `state` has our names or the published ones, and gives the numbers of words and of outputs of heads (default 1).
        Left out are `optional` parts, the mask embedding and the second image's modality vector without a tensor in it.
        """
        rows: dict[str, Any] = {}
        for part, parameters in COUNTED.items():
            known = [name for parameter in parameters for name in (parameter, *self.names(parameter))]
            rows[part] = next((len(state[name]) for name in known if name in state), 1)
        words = rows.pop("words")
        model = skeleton(config, words, HeadConfig("visual_tokens", nlvr2=True, ranking=True, **rows))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if self.names(name)}
        names = {name: self.names(name) for name in shapes}
        present = {name for name in names if not state.keys().isdisjoint((name, *names[name]))}
        # The second image's vector is published as the third row of the modalities.
        if SECOND in present and SECOND not in state and len(state[names[SECOND][0]]) < len(MODALITIES):
            present.remove(SECOND)
        parts = {model.part_of(name) for name in present - {MASK, SECOND}}
        required = {name for name in names if (part := model.part_of(name)) not in self.optional or part in parts}
        present |= required - {MASK, SECOND}
        kept = [name for name in names if name in present]
        return {name: names[name] for name in kept}, {name: shapes[name] for name in kept}


def published_contents(
    names: Names, shapes: Mapping[str, Shape], is_batched: bool
) -> dict[str, list[tuple[str, Shape]]]:
    """Return, for each published tensor, the parameters that it holds as rows, with the shapes of these rows."""
    contents: dict[str, list[tuple[str, Shape]]] = {}
    for name, parts in names.items():
        shape = shapes[name]
        if name == "image_embedding.patch.weight":  # the kernel of a convolution
            side = math.isqrt(shape[1] // 3)
            shape = (shape[0], 3, side, side)
        elif name in ("image_embedding.cls", MASK):
            shape = (1, 1, *shape) if is_batched else shape
        elif name == "image_embedding.positions" or name in MODALITIES:
            shape = (1, *shape) if is_batched else shape
        elif name.startswith("itc_head.log_scale"):
            shape = ()
        elif len(parts) > 1:
            dim = SIDE_BY_SIDE.get(name, 0)
            shape = (*shape[:dim], shape[dim] // len(parts), *shape[dim + 1 :])
        for part in parts:
            contents.setdefault(part, []).append((name, shape))
    return contents


def require(state: Mapping[str, Tensor], shapes: Mapping[str, Shape], allowed: Collection[str] = ()) -> set[str]:
    """Return the names of `shapes` that the state has with the right shape.

    Raises CheckpointError listing every other difference, except of names that match `allowed` (`vqa_classifier.*`).
    """
    actual = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = {
        "missing": {name: name for name in shapes.keys() - actual.keys()},
        "unexpected": {name: name for name in actual.keys() - shapes.keys()},
        "wrong shape": {
            name: f"{name} (is {actual[name]}, must be {shape})"
            for name, shape in shapes.items()
            if actual.get(name, shape) != shape
        },
    }
    lines = ["the checkpoint does not fit the model; compare its sizes with the config's model section"]
    for fault, texts in faults.items():
        refused = [text for name, text in texts.items() if not any(fnmatchcase(name, pattern) for pattern in allowed)]
        lines += [f"  {fault}: {', '.join(sorted(refused))}"] if refused else []
    if len(lines) > 1:
        raise CheckpointError("\n".join(lines))
    return {name for name, shape in shapes.items() if actual.get(name) == shape}
