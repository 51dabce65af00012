"""VLMo (arXiv 2111.02358): one encoder for images, texts, or both, which routes tokens to modality experts.

Below the vision-language layers, text goes to the language expert and patches to the vision expert. Above, a fused
sequence goes to the vision-language expert as a whole. The last layer computes only the positions that the heads read.

Shapes: B examples, L tokens (text first, then image with its [CLS] in front), K visible patches, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import TransformerConfig, VLMoConfig
from pipeline.models.embeddings import ImageEmbedding, RelativePositions, TextEmbedding, key_padding, visible_padding
from pipeline.models.forward import ForwardInput, Head, InputKind
from pipeline.models.heads import (
    MAX_SCALE,
    ClassificationHead,
    ContrastiveHead,
    MaskedLanguageHead,
    MatchingHead,
    PooledHead,
    Pooler,
)
from pipeline.models.image_decoder import build_mim_head
from pipeline.models.model import HeadConfig, Model, alignment_outputs
from pipeline.models.multiway import Expert, MultiwayBlock, Route, gather_pairs
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import cut_text_positions, resize_grid, resize_relative_grid, resize_text_distances

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
    "itc_head",
    "itm_head",
    "mlm_head",
    "mim_head",  # with the mask embedding
    "classification_head",
    "vqa_head",
    "nlvr2_head",  # with the modality vector of the second image
)
_IMAGE = frozenset(
    {"attention", "norm", "image_embedding", "positions.image", "vision_expert.lower", "vision_expert.upper"}
)
_TEXT = frozenset(
    {"attention", "norm", "text_embedding", "positions.text", "language_expert.lower", "language_expert.upper"}
)
_FUSED = (_IMAGE | _TEXT | {"positions.cross", "vision_language_expert"}) - {
    "vision_expert.upper",
    "language_expert.upper",
}


class VLMo(Model):
    PARTS: ClassVar = PARTS
    HEAD_PARTS: ClassVar = PARTS[PARTS.index("pooler") :]
    ENCODER_PARTS: ClassVar = {
        frozenset({"image"}): _IMAGE,
        frozenset({"text"}): _TEXT,
        frozenset({"image", "text"}): _FUSED,
    }
    HEADS: ClassVar = {
        "itc": frozenset({"vision_language_expert", "itc_head"}),
        "itm": frozenset({"pooler", "itm_head"}),
        "mlm": frozenset({"mlm_head"}),
        "mim": frozenset({"mim_head"}),
        "alignment": frozenset(),
        "classes": frozenset({"classification_head"}),
        "answers": frozenset({"pooler", "vqa_head"}),
        "nlvr2": frozenset({"pooler", "nlvr2_head"}),
    }
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})

    config: VLMoConfig

    def __init__(self, config: VLMoConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, absolute = config.width, config.positions == "absolute"
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length, absolute)
        self.image_embedding = ImageEmbedding(
            config.image_size, config.patch_size, width, absolute, heads.covers_patches, second=heads.nlvr2
        )
        self.positions = (
            None if absolute else RelativePositions(config.layers, config.heads, config.grid, config.max_text_length)
        )
        self.first_fused = config.layers - config.vision_language_layers
        lower: tuple[Expert, ...] = ("vision", "language")
        self.blocks = nn.ModuleList(
            MultiwayBlock(
                width,
                config.heads,
                config.mlp_ratio,
                lower if layer < self.first_fused else (*lower, "vision_language"),
                config.layer_scale,
                rate,
                epsilon=config.norm_eps,
            )
            for layer, rate in enumerate(config.drop_path_rates)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pooler = Pooler(width)
        self.itc_head = ContrastiveHead(width, MAX_SCALE if heads.bounds_scales else math.inf, config.contrasts)
        self.itm_head = MatchingHead(width)
        self.mlm_head = MaskedLanguageHead(width, vocabulary)
        self.mim_head = build_mim_head(config, heads)
        self.classification_head = ClassificationHead(width, heads.classes) if heads.classes else None
        self.vqa_head = PooledHead(width, 2 * width, heads.answers) if heads.answers else None
        self.nlvr2_head = PooledHead(2 * width, 2 * width, 2) if heads.nlvr2 else None

    def encode(self, packed: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Return normalised features, and those of the vision-language branch where the contrast needs them.

        The branch leaves below the first vision-language layer and goes through that expert instead of its own.
        """
        x, padding = self._embed(packed)
        text = 0 if packed.text is None else packed.text.shape[1]
        bias = None if self.positions is None else self.positions(text, packed.image is not None)
        biases = [None] * len(self.blocks) if bias is None else bias.unbind(0)
        visible = None if packed.visible_patches is None else _sequence_positions(text, packed.visible_patches)
        lower, upper = _routes(text, packed.image is not None)

        def run(x: Tensor, layers: range, route: Route) -> Tensor:
            for layer in layers:
                keep = None if packed.drop_path_mask is None else packed.drop_path_mask[:, layer]
                positions = packed.output_positions if layer == len(self.blocks) - 1 else None
                bias = biases[layer]
                if bias is not None and visible is not None:
                    bias = gather_pairs(bias, visible)
                x = self.blocks[layer](x, route, bias, padding, keep, positions)
            return x

        below = run(x, range(self.first_fused), lower)
        fused_layers = range(self.first_fused, len(self.blocks))
        features = self.norm(run(below, fused_layers, upper))
        if not packed.branches or self.config.contrasts == 1:
            return features, None
        return features, self.norm(run(below, fused_layers, {"vision_language": slice(None)}))

    def _embed(self, packed: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Return the tokens (B, L, D) and the attention padding (B, L), which is None for whole images."""
        visible, image = packed.visible_patches, None
        if packed.image is not None:
            if packed.image_size is not None:
                raise ValueError("VLMo reads whole square images; use ViLT for images of their own shape")
            count = self.config.num_patches
            masked, replacements = packed.masked(count), packed.replacements(count)
            image = self.image_embedding(packed.image, masked, packed.is_second, replacements, visible)
        if packed.text is None or packed.text_keep is None:
            assert image is not None
            return image, None if visible is None else visible_padding(visible, image.dtype)
        x = self.text_embedding(packed.text)
        padding = key_padding(packed.text_keep, x.dtype)
        if image is None:
            return x, padding
        if visible is None:
            return torch.cat([x, image], dim=1), F.pad(padding, (0, image.shape[1]))
        return torch.cat([x, image], dim=1), torch.cat([padding, visible_padding(visible, x.dtype)], dim=1)

    def head_outputs(
        self, head: Head, inputs: ForwardInput, features: Tensor, branch: Tensor | None
    ) -> dict[str, Tensor]:
        if head == "alignment":
            return alignment_outputs(inputs, features)
        return super().head_outputs(head, inputs, features, branch)

    def part_of(self, parameter: str) -> str:
        names = parameter.split(".")
        if names[0] == "blocks":
            if names[2] != "experts":
                return "attention"
            if names[3] == "vision_language":
                return "vision_language_expert"
            return f"{names[3]}_expert.{'upper' if int(names[1]) >= self.first_fused else 'lower'}"
        if names[0] == "positions":
            return parameter
        if names[1] == "positions":
            return f"positions.{names[0].removesuffix('_embedding')}"
        return super().part_of(parameter)

    def modules_for(self, inputs: frozenset[InputKind], head: Head) -> frozenset[str] | None:
        parts = super().modules_for(inputs, head)
        if parts is not None and head == "itc" and self.config.contrasts == 1:
            parts -= {"vision_language_expert"}
        return parts if parts is None or self.config.positions == "relative" else parts - {"positions.cross"}

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Resize to another image size or text length by the release's rules (see `resize`).

        The second image's modality vector starts as a copy of the first's.
        """
        resized = super().resize_state(state, before)
        grid, max_text_length = self.config.grid, self.config.max_text_length
        rules: dict[str, Callable[[Tensor], Tensor]] = {
            "positions.image": lambda table: resize_relative_grid(table, grid),
            "positions.text": lambda table: resize_text_distances(table, max_text_length),
            "image_embedding.positions": lambda positions: resize_grid(positions, grid, "bicubic"),
            "text_embedding.positions": lambda positions: cut_text_positions(positions, max_text_length),
        }
        resized |= {name: rule(resized[name]) for name, rule in rules.items() if name in resized}
        if self.heads.nlvr2 and "image_embedding.modality" in resized:
            resized.setdefault("image_embedding.second", resized["image_embedding.modality"].clone())
        return resized

    def initialize_parameter(self, name: str, parameter: Tensor, seed: int) -> None:
        if name.endswith("gamma"):
            assert self.config.layer_scale is not None
            nn.init.constant_(parameter, self.config.layer_scale)
        elif name.startswith("positions."):
            nn.init.zeros_(parameter)
        else:
            super().initialize_parameter(name, parameter, seed)


def _routes(text: int, image: bool) -> tuple[Route, Route]:
    """Return the experts' token spans below and in the vision-language layers."""
    if text and image:
        return {"language": slice(0, text), "vision": slice(text, None)}, {"vision_language": slice(None)}
    single: Route = {"language": slice(None)} if text else {"vision": slice(None)}
    return single, single


def _sequence_positions(text: int, visible: Tensor) -> Tensor:
    """Return the positions in the whole sequence of the tokens that are read: (B, text + 1 + K) int64."""
    before = torch.arange(text + 1, device=visible.device).expand(len(visible), -1)
    return torch.cat([before, visible.clamp(min=0) + text + 1], dim=1)


def copy_expert(
    state: dict[str, Tensor], source: Literal["vision", "language"], target: Literal["language", "vision_language"]
) -> dict[str, Tensor]:
    """Return a copy of a state in which each `target` expert equals the `source` expert of its layer."""
    copied = dict(state)
    for name in state:
        if f".experts.{target}." in name:
            copied[name] = state[name.replace(f".experts.{target}.", f".experts.{source}.")].clone()
    return copied
