"""VLMo (arXiv 2111.02358): one encoder for images, texts, or both, which routes tokens to modality experts.

Below the vision-language layers, text goes to the language expert and patches to the vision expert. Above, a fused
sequence goes to the vision-language expert as a whole. The last layer computes only the positions that the heads read.

Shapes: B examples, L tokens (text first, then image with its [CLS] in front), K visible patches, H heads.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import VLMoConfig
from pipeline.models.embeddings import ImageEmbedding, RelativePositions, TextEmbedding, key_padding
from pipeline.models.forward import Head, InputKind
from pipeline.models.heads import MAX_SCALE, ContrastiveHead, FloatHead, masked_language_head, pooled_head, pooler
from pipeline.models.image_decoder import build_mim_head
from pipeline.models.model import HeadConfig, Model
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
    RESIZE_RULES: ClassVar = {
        "positions.image": lambda table, config: resize_relative_grid(table, config.grid),
        "positions.text": lambda table, config: resize_text_distances(table, config.max_text_length),
        "image_embedding.positions": lambda positions, config: resize_grid(positions, config.grid, "bicubic"),
        "text_embedding.positions": lambda positions, config: cut_text_positions(positions, config.max_text_length),
    }

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
        self.pooler = pooler(width)
        self.itc_head = ContrastiveHead(width, MAX_SCALE if heads.bounds_scales else math.inf, config.contrasts)
        self.itm_head = FloatHead(classify=nn.Linear(width, 2))  # (not matched, matched)
        self.mlm_head = masked_language_head(width, vocabulary)
        self.mim_head = build_mim_head(config, heads)
        self.classification_head = FloatHead(classify=nn.Linear(width, heads.classes)) if heads.classes else None
        self.vqa_head = pooled_head(width, 2 * width, heads.answers) if heads.answers else None
        self.nlvr2_head = pooled_head(2 * width, 2 * width, 2) if heads.nlvr2 else None

    def encode(self, packed: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Return normalised features, and those of the vision-language branch where the contrast needs them.

        The branch leaves below the first vision-language layer and goes through that expert instead of its own.
        """
        text = 0 if packed.text is None else packed.text.shape[1]
        tokens, keeps = [], []
        if packed.text is not None and packed.text_keep is not None:
            tokens.append(self.text_embedding(packed.text))
            keeps.append(packed.text_keep)
        if packed.image is not None:
            if packed.image_size is not None:
                raise ValueError("VLMo reads whole square images; use ViLT for images of their own shape")
            masked, replacements = packed.masking(self.config.num_patches)
            image = self.image_embedding(packed.image, masked, packed.is_second, replacements, packed.visible_patches)
            tokens.append(image)
            keeps.append(torch.ones(image.shape[:2], dtype=torch.bool, device=image.device))
        x = torch.cat(tokens, dim=1)
        bias = None if self.positions is None else self.positions(text, packed.image is not None)
        biases = [None] * len(self.blocks) if bias is None else bias.unbind(0)
        places = None  # (B, text + 1 + K): positions in the whole sequence of the tokens that are read
        if (visible := packed.visible_patches) is not None:
            keeps[-1] = F.pad(visible >= 0, (1, 0), value=True)
            before = torch.arange(text + 1, device=x.device).expand(len(x), -1)
            places = torch.cat([before, visible.clamp(min=0) + text + 1], dim=1)
        # Whole images have no padding.
        padding = None if packed.text is None and visible is None else key_padding(torch.cat(keeps, dim=1), x.dtype)

        def run(x: Tensor, layers: range, route: Route) -> Tensor:
            for layer in layers:
                keep = None if packed.drop_path_mask is None else packed.drop_path_mask[:, layer]
                positions = packed.output_positions if layer == len(self.blocks) - 1 else None
                bias = biases[layer]
                if bias is not None and places is not None:
                    bias = gather_pairs(bias, places)
                x = self.blocks[layer](x, route, bias, padding, keep, positions)
            return x

        fused: Route = {"vision_language": slice(None)}
        if packed.text is not None and packed.image is not None:
            lower: Route = {"language": slice(0, text), "vision": slice(text, None)}
            upper = fused
        else:
            lower = upper = {"vision" if packed.text is None else "language": slice(None)}
        fused_layers = range(self.first_fused, len(self.blocks))
        below = run(x, range(self.first_fused), lower)
        features = self.norm(run(below, fused_layers, upper))
        if not packed.branches or self.config.contrasts == 1:
            return features, None
        return features, self.norm(run(below, fused_layers, fused))

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

    def initialize_parameter(self, name: str, parameter: Tensor, seed: int) -> None:
        if name.endswith("gamma"):
            assert self.config.layer_scale is not None
            nn.init.constant_(parameter, self.config.layer_scale)
        elif name.startswith("positions."):
            nn.init.zeros_(parameter)
        else:
            super().initialize_parameter(name, parameter, seed)


def copy_expert(
    state: dict[str, Tensor], source: Literal["vision", "language"], target: Literal["language", "vision_language"]
) -> dict[str, Tensor]:
    """Return a copy of a state in which each `target` expert equals the `source` expert of its layer."""
    copied = dict(state)
    for name in state:
        if f".experts.{target}." in name:
            copied[name] = state[name.replace(f".experts.{target}.", f".experts.{source}.")].clone()
    return copied
