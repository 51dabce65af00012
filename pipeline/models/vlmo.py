"""VLMo (arXiv 2111.02358): one encoder that reads images, texts, or both, by routing tokens to modality experts.

Shapes: B rows, L tokens (text first, then image with its [CLS] in front), P patches, K positions a row, D width,
H heads, N layers, V vocabulary.

Layers below the vision-language layers send text to the language expert and patches to the vision expert. Above,
a fused sequence reads the vision-language expert as a whole. The last layer computes only the positions that the
heads asked for, and passes of one kind share one run through the layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.errors import ConfigError
from pipeline.config.schema import ModelConfig, Objective, Use
from pipeline.models.attention import pick
from pipeline.models.embeddings import ImageEmbedding, RelativePositions, TextEmbedding
from pipeline.models.heads import (
    INITIAL_SCALE,
    ContrastiveHead,
    MaskedImageHead,
    MaskedLanguageHead,
    MatchingHead,
    Pooler,
)
from pipeline.models.multiway import EPSILON, Expert, MultiwayBlock, Route
from pipeline.models.passes import Head, Outputs, Pass

ImageTarget = Literal["mean_colour", "pixels"]

COLOUR_CLASSES = 512  # three bits a channel

# A name stands for itself and for all that begin with it and a dot: freezing "vision_expert" freezes both halves.
PARTS = (
    "text_embedding",
    "image_embedding",
    "positions.text",
    "positions.image",
    "positions.cross",
    "attention",  # with its norm, and both LayerScale gammas, which all experts share
    "vision_expert.lower",
    "vision_expert.upper",
    "language_expert.lower",
    "language_expert.upper",
    "vision_language_expert",
    "norm",
    "pooler",
    "contrastive_head",
    "matching_head",
    "masked_language_head",
    "masked_image_head",  # with the embedding that hides a patch
)


class VLMo(nn.Module):
    def __init__(self, config: ModelConfig, vocabulary: int, image_target: ImageTarget | None = None) -> None:
        """`image_target` builds the masked-image head for that target; None builds none."""
        super().__init__()
        self.config = config
        width, absolute = config.width, config.positions == "absolute"
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text, absolute)
        self.image_embedding = ImageEmbedding(
            config.image_size, config.patch_size, width, absolute, maskable=image_target is not None
        )
        grid = config.image_size // config.patch_size
        self.positions = None if absolute else RelativePositions(config.layers, config.heads, grid, config.max_text)
        self.blocks = nn.ModuleList(_block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.pooler = Pooler(width)
        self.contrastive_head = ContrastiveHead(width)
        self.matching_head = MatchingHead(width)
        self.masked_language_head = MaskedLanguageHead(width, vocabulary)
        targets = {None: 0, "mean_colour": COLOUR_CLASSES, "pixels": 3 * config.patch_size**2}[image_target]
        self.masked_image_head = MaskedImageHead(width, targets) if targets else None

    def forward(self, passes: dict[str, Pass]) -> Outputs:
        """Every pass's features under its own name; `Pass` says what the heads return."""
        outputs: Outputs = {}
        for group in _grouped(passes).values():
            outputs.update(self._read(group))
        return {name: outputs[name] for name in passes}

    def part_of(self, parameter: str) -> str:
        """The name in PARTS that a parameter belongs to."""
        return part_of(parameter, self.config)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter, each from the seed and its own name: another head or layer changes no other weight."""
        for name, parameter in self.named_parameters():
            _initialize(name, parameter, self.config, seed)

    def _read(self, passes: dict[str, Pass]) -> Outputs:
        """Passes of one kind in one run through the layers."""
        rows = _Rows(list(passes.values()), self.config.num_patches)
        features, features_vl = self._encode(rows)
        outputs: Outputs = {}
        for index, (name, one) in enumerate(passes.items()):
            found = {head: rows.find(features, index, head) for head in one.heads}
            found_vl = rows.find(features_vl, index, "itc") if features_vl is not None else None
            outputs[name] = self._apply_heads(one, found, found_vl)
        return outputs

    def _encode(self, rows: _Rows) -> tuple[Tensor, Tensor | None]:
        """Normalised features at the positions the heads read; and those of the vision-language branch, if asked.

        The branch leaves below the first vision-language layer and goes through that expert instead of its own.
        """
        x, padding = self._embed(rows)
        text = 0 if rows.text is None else rows.text.shape[1]
        image = rows.image is not None
        bias = None if self.positions is None else self.positions(text, image)
        biases = [None] * len(self.blocks) if bias is None else bias.unbind(0)
        start = len(self.blocks) - self.config.vision_language_layers
        lower, upper = _routes(text, image)

        def run(x: Tensor, layers: range, route: Route) -> Tensor:
            for layer in layers:
                keep = None if rows.drop_keep is None else rows.drop_keep[:, layer]
                read = rows.read if layer == len(self.blocks) - 1 else None
                x = self.blocks[layer](x, route, biases[layer], padding, keep, read)
            return x

        below = run(x, range(start), lower)
        features = self.norm(run(below, range(start, len(self.blocks)), upper))
        if not rows.branches:
            return features, None
        branch = run(below, range(start, len(self.blocks)), {"vision_language": slice(None)})
        return features, self.norm(branch)

    def _embed(self, rows: _Rows) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, L, D), and what attention adds for each key (B, L): nothing, or a huge negative at padding."""
        image = None if rows.image is None else self.image_embedding(rows.image, rows.hidden)
        if rows.text is None or rows.text_keep is None:
            assert image is not None
            return image, None
        x = self.text_embedding(rows.text)
        # Finite, so that a row of nothing but padding gives numbers and not NaN; its exponential is exactly 0.
        padding = torch.zeros_like(rows.text, dtype=x.dtype).masked_fill(~rows.text_keep, torch.finfo(x.dtype).min / 2)
        if image is None:
            return x, padding
        return torch.cat([x, image], dim=1), F.pad(padding, (0, image.shape[1]))

    def _apply_heads(self, one: Pass, found: dict[Head, Tensor], found_vl: Tensor | None) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        for head, features in found.items():
            if head == "itc":
                modality: Literal["image", "text"] = "image" if one.text is None else "text"
                assert found_vl is not None
                values = self.contrastive_head(modality, features[:, 0], found_vl[:, 0])
                results.update(zip(("itc", "itc_vl", "scale", "scale_vl"), values, strict=True))
            elif head == "itm":
                results["itm"] = self.matching_head(self.pooler(features[:, 0]))
            elif head == "mlm":
                results["mlm"] = self.masked_language_head(features)
            elif head == "masked_image":
                if self.masked_image_head is None:
                    raise ValueError("the masked_image head needs a model built with an image target")
                results["masked_image"] = self.masked_image_head(features)
            else:
                results[head] = features
        return results


class _Rows:
    """Several passes of one kind as one: their rows joined, texts padded to the longest, and what each head reads."""

    def __init__(self, passes: list[Pass], num_patches: int) -> None:
        for one in passes:
            _check(one)
        self._passes = passes
        self._sizes = [len(_anchor(one)) for one in passes]
        self.branches = "itc" in passes[0].heads
        self.image = _joined([one.image for one in passes])
        self.text = _joined([one.text for one in passes], value=0)
        self.text_keep = None if self.text is None else _joined([_text_keep(one) for one in passes], value=False)
        self.drop_keep = _joined([one.drop_keep for one in passes])
        self.hidden = None
        if any(one.patch_positions is not None for one in passes):
            self.hidden = torch.cat([self._hidden(i, num_patches) for i in range(len(passes))])
        self._read = [self._positions(i) for i in range(len(passes))]
        self._whole = any("tokens" in one.heads for one in passes)
        joined = [torch.cat(list(positions.values()), dim=1) for positions in self._read if positions]
        self.read = None if self._whole else _joined(joined, value=0)

    def find(self, features: Tensor, index: int, head: str) -> Tensor:
        """What a head of the index-th pass reads, out of the features of all rows."""
        first = sum(self._sizes[:index])
        mine = features[first : first + self._sizes[index]]
        if head == "tokens":
            return self._without_padding(mine, index)
        if self._whole:
            return pick(mine, self._read[index][head])
        column = 0
        for name, positions in self._read[index].items():
            if name == head:
                return mine[:, column : column + positions.shape[1]]
            column += positions.shape[1]
        raise AssertionError(f"head {head} was not read")

    def _positions(self, index: int) -> dict[str, Tensor]:
        """Where in the sequence each head of a pass reads: (B, K)."""
        one, size = self._passes[index], self._sizes[index]
        positions: dict[str, Tensor] = {}
        for head in one.heads:
            if head in ("itc", "itm"):
                positions[head] = torch.zeros(size, 1, dtype=torch.int64, device=_anchor(one).device)
            elif head == "mlm":
                assert one.mask_positions is not None
                positions[head] = one.mask_positions
            elif head == "masked_image":
                assert one.patch_positions is not None
                offset = 1 if self.text is None else 1 + self.text.shape[1]
                positions[head] = one.patch_positions + offset
        return positions

    def _hidden(self, index: int, num_patches: int) -> Tensor:
        """Which patches of a pass are covered: (B, P) bool."""
        one = self._passes[index]
        assert one.image is not None
        hidden = torch.zeros(self._sizes[index], num_patches, dtype=torch.bool, device=one.image.device)
        return hidden if one.patch_positions is None else hidden.scatter(1, one.patch_positions, True)

    def _without_padding(self, x: Tensor, index: int) -> Tensor:
        """The tokens of a pass without what joining added to its text."""
        one = self._passes[index]
        if self.text is None or one.text is None or one.text.shape[1] == self.text.shape[1]:
            return x
        return torch.cat([x[:, : one.text.shape[1]], x[:, self.text.shape[1] :]], dim=1)


def _check(one: Pass) -> None:
    """A pass whose members do not serve its heads is refused, by name."""
    kind = "an image" if one.text is None else "a text" if one.image is None else "a fused"
    if one.image is None and one.text is None:
        raise ValueError("a pass needs an image, a text, or both")
    wrong = {
        "itc": one.image is not None and one.text is not None,
        "itm": one.image is None or one.text is None,
        "mlm": one.text is None or one.mask_positions is None,
        "masked_image": one.image is None or one.patch_positions is None,
        "tokens": False,
    }
    for head in one.heads:
        if wrong[head]:
            raise ValueError(f"head '{head}' cannot read {kind} pass with these members; see Pass for what it needs")


def _anchor(one: Pass) -> Tensor:
    """A member that the pass surely has: its rows and device are the pass's."""
    member = one.image if one.text is None else one.text
    assert member is not None
    return member


def _text_keep(one: Pass) -> Tensor:
    assert one.text is not None
    return torch.ones_like(one.text, dtype=torch.bool) if one.text_keep is None else one.text_keep


def _joined(members: list[Tensor | None] | list[Tensor], value: float | None = None) -> Tensor | None:
    """The rows of all members; with `value`, dimension 1 is padded to the longest. None if there are none."""
    tensors = [member for member in members if member is not None]
    if not tensors:
        return None
    if value is not None:
        longest = max(t.shape[1] for t in tensors)
        tensors = [t if t.shape[1] == longest else F.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _grouped(passes: dict[str, Pass]) -> dict[tuple, dict[str, Pass]]:
    """Passes that can share a run: of one kind, image shape and branching, and with drop path in all or none."""
    groups: dict[tuple, dict[str, Pass]] = {}
    for name, one in passes.items():
        image = None if one.image is None else (one.image.shape[1:], one.image.dtype)
        key = (image, one.text is None, "itc" in one.heads, one.drop_keep is None)
        groups.setdefault(key, {})[name] = one
    return groups


def _routes(text: int, image: bool) -> tuple[Route, Route]:
    """Which expert reads which tokens, below and in the vision-language layers."""
    if text and image:
        return {"language": slice(0, text), "vision": slice(text, None)}, {"vision_language": slice(None)}
    alone: Route = {"language": slice(None)} if text else {"vision": slice(None)}
    return alone, alone


def _block(config: ModelConfig, layer: int) -> MultiwayBlock:
    experts: tuple[Expert, ...] = ("vision", "language")
    if layer >= config.layers - config.vision_language_layers:
        experts += ("vision_language",)
    rate = drop_path_rates(config)[layer]
    return MultiwayBlock(config.width, config.heads, config.feed_forward_ratio, experts, config.layer_scale, rate)


def drop_path_rates(config: ModelConfig) -> tuple[float, ...]:
    """Each layer's chance of dropping a branch: from 0 in the first rising linearly to `drop_path` in the last."""
    return tuple(config.drop_path * layer / max(config.layers - 1, 1) for layer in range(config.layers))


def _initialize(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Truncated normal weights as BERT and BEiT; biases and relative positions 0, norms 1."""
    last = name.rpartition(".")[2]
    if name.endswith("norm.weight"):
        nn.init.ones_(parameter)
    elif last.endswith("bias") or name.startswith("positions."):
        nn.init.zeros_(parameter)
    elif last.endswith("gamma"):
        assert config.layer_scale is not None
        nn.init.constant_(parameter, config.layer_scale)
    elif last.startswith("log_scale"):
        nn.init.constant_(parameter, math.log(INITIAL_SCALE))
    else:
        key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(key)
        drawn = torch.empty(parameter.shape)
        nn.init.trunc_normal_(
            drawn, std=config.initial_std, a=-2 * config.initial_std, b=2 * config.initial_std, generator=generator
        )
        parameter.copy_(drawn)


def part_of(parameter: str, config: ModelConfig) -> str:
    """The name in PARTS that a parameter belongs to; every parameter belongs to exactly one."""
    names = parameter.split(".")
    if names[0] == "blocks":
        if names[2] != "experts":
            return "attention"
        if names[3] == "vision_language":
            return "vision_language_expert"
        upper = int(names[1]) >= config.layers - config.vision_language_layers
        return f"{names[3]}_expert.{'upper' if upper else 'lower'}"
    if names[0] == "positions":
        return parameter
    if names[1] == "positions":
        return f"positions.{names[0].removesuffix('_embedding')}"
    if parameter == "image_embedding.mask":
        return "masked_image_head"
    assert names[0] in PARTS, f"{parameter} belongs to no part"
    return names[0]


_ALWAYS = {"attention", "norm"}
_IMAGE = _ALWAYS | {"image_embedding", "positions.image", "vision_expert.lower", "vision_expert.upper"}
_TEXT = _ALWAYS | {"text_embedding", "positions.text", "language_expert.lower", "language_expert.upper"}
_FUSED = _ALWAYS | {
    "image_embedding",
    "text_embedding",
    "positions.text",
    "positions.image",
    "positions.cross",
    "vision_expert.lower",
    "language_expert.lower",
    "vision_language_expert",
}


def parts_used(objectives: Iterable[Objective], uses: Iterable[Use], config: ModelConfig) -> frozenset[str]:
    """The parts that get a gradient (all of their parameters do) when a stage has these objectives and sources.

    Contrast reads images and texts of pairs apart, matching and masked language read pairs fused; masked language
    reads a text source by itself, and masked images are read by themselves. ConfigError if an objective has nothing
    to read.
    """
    uses = frozenset(uses)
    readable: dict[Objective, dict[str, set[str]]] = {
        "contrastive": {"pairs": _IMAGE | _TEXT | {"vision_language_expert", "contrastive_head"}},
        "matching": {"pairs": _FUSED | {"pooler", "matching_head"}},
        "masked_language": {"pairs": _FUSED | {"masked_language_head"}, "text": _TEXT | {"masked_language_head"}},
        "masked_image": {"pairs": _IMAGE | {"masked_image_head"}, "images": _IMAGE | {"masked_image_head"}},
    }
    used: set[str] = set()
    for objective in objectives:
        served = [parts for use, parts in readable[objective].items() if use in uses]
        if not served:
            raise ConfigError(
                f"objective '{objective}' reads {' or '.join(readable[objective])}, and no source of the stage gives "
                f"that (sources give: {', '.join(sorted(uses))}); add a source or drop the objective"
            )
        used.update(*served)
    return frozenset(used if config.positions == "relative" else used - {"positions.cross"})


def parts_named(names: Iterable[str]) -> frozenset[str]:
    """The parts that names of a config's `freeze` stand for; ConfigError for a name that stands for none."""
    found: set[str] = set()
    for name in names:
        parts = {part for part in PARTS if part == name or part.startswith(f"{name}.")}
        if not parts:
            known = sorted({*PARTS, *(part.split(".")[0] for part in PARTS)})
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the parts are {', '.join(known)}"
            raise ConfigError(f"freeze: '{name}' is no part of the model; {hint}")
        found |= parts
    return frozenset(found)


def copy_expert(
    state: dict[str, Tensor], source: Literal["vision", "language"], target: Literal["language", "vision_language"]
) -> dict[str, Tensor]:
    """A copy of a state in which each layer's `target` expert, where it has one, equals its `source` expert."""
    copied = dict(state)
    for name in state:
        if f".experts.{target}." in name:
            copied[name] = state[name.replace(f".experts.{target}.", f".experts.{source}.")].clone()
    return copied
