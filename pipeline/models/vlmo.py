"""VLMo (arXiv 2111.02358): one encoder that reads images, texts, or both, by routing tokens to modality experts.

Shapes: B rows, L tokens (text first, then image with its [CLS] in front), P patches, K positions a row, D width,
H heads, N layers, V vocabulary.

Layers below the vision-language layers send text to the language expert and patches to the vision expert. Above,
a fused sequence reads the vision-language expert as a whole. The last layer computes only the positions that the
heads asked for, and passes of one kind share one run through the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import Objective, SourceType, TransformerConfig, VLMoConfig
from pipeline.models.attention import gather_pairs
from pipeline.models.embeddings import ImageEmbedding, RelativePositions, TextEmbedding, key_padding, read_padding
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.heads import (
    MAX_SCALE,
    ClassificationHead,
    ContrastiveHead,
    MaskedImageHead,
    MaskedLanguageHead,
    MatchingHead,
    PooledHead,
    Pooler,
)
from pipeline.models.image_decoder import ImageDecoder, build_masked_image_head
from pipeline.models.model import HeadConfig, Model, aligned
from pipeline.models.multiway import Expert, MultiwayBlock, Route
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
    "mim_head",  # with the embedding that hides a patch
    "classification_head",
    "vqa_head",
    "nlvr2_head",  # with the embedding that says "this is the second image"
)


class VLMo(Model):
    PARTS: ClassVar = PARTS
    HEAD_PARTS: ClassVar = PARTS[PARTS.index("pooler") :]
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})

    config: VLMoConfig

    def __init__(self, config: VLMoConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, absolute = config.width, config.positions == "absolute"
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length, absolute)
        self.image_embedding = ImageEmbedding(
            config.image_size, config.patch_size, width, absolute, heads.covers_patches, second=heads.reasoning
        )
        self.positions = (
            None if absolute else RelativePositions(config.layers, config.heads, config.grid, config.max_text_length)
        )
        self.blocks = nn.ModuleList(_block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pooler = Pooler(width)
        self.itc_head = ContrastiveHead(width, MAX_SCALE if heads.bounds_scales else math.inf, config.contrasts)
        self.itm_head = MatchingHead(width)
        self.mlm_head = MaskedLanguageHead(width, vocabulary)
        self.mim_head = build_masked_image_head(config, heads)
        self.classification_head = ClassificationHead(width, heads.classes) if heads.classes else None
        self.vqa_head = PooledHead(width, 2 * width, heads.answers) if heads.answers else None
        self.nlvr2_head = PooledHead(2 * width, 2 * width, 2) if heads.reasoning else None

    def encode(self, rows: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Normalised features at the positions the heads read; and those of the vision-language branch, if asked.

        The branch leaves below the first vision-language layer and goes through that expert instead of its own.
        """
        x, padding = self._embed(rows)
        text = 0 if rows.text is None else rows.text.shape[1]
        image = rows.image is not None
        bias = None if self.positions is None else self.positions(text, image)
        biases = [None] * len(self.blocks) if bias is None else bias.unbind(0)
        among = None if rows.visible_patches is None else _tokens_read(text, rows.visible_patches)
        start = len(self.blocks) - self.config.vision_language_layers
        lower, upper = _routes(text, image)

        def run(x: Tensor, layers: range, route: Route) -> Tensor:
            for layer in layers:
                keep = None if rows.drop_path_mask is None else rows.drop_path_mask[:, layer]
                read = rows.output_positions if layer == len(self.blocks) - 1 else None
                bias = biases[layer]
                if bias is not None and among is not None:
                    bias = gather_pairs(bias, among)
                x = self.blocks[layer](x, route, bias, padding, keep, read)
            return x

        below = run(x, range(start), lower)
        features = self.norm(run(below, range(start, len(self.blocks)), upper))
        if not rows.branches or self.config.contrasts == 1:
            return features, None
        branch = run(below, range(start, len(self.blocks)), {"vision_language": slice(None)})
        return features, self.norm(branch)

    def _embed(self, rows: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, L, D), and what attention adds for each key (B, L): nothing, or a huge negative at padding."""
        image = None if rows.image is None else self._embed_image(rows)
        if rows.text is None or rows.text_keep is None:
            assert image is not None
            return image, None if rows.visible_patches is None else read_padding(rows.visible_patches, image.dtype)
        x = self.text_embedding(rows.text)
        text_padding = key_padding(rows.text_keep, x.dtype)
        if image is None:
            return x, text_padding
        if rows.visible_patches is None:
            return torch.cat([x, image], dim=1), F.pad(text_padding, (0, image.shape[1]))
        return torch.cat([x, image], dim=1), torch.cat(
            [text_padding, read_padding(rows.visible_patches, x.dtype)], dim=1
        )

    def _embed_image(self, rows: PackedInputs) -> Tensor | None:
        if rows.image is None:
            return None
        if rows.image_size is not None:
            raise ValueError("VLMo reads whole square pictures; pictures of their own shape are for ViLT")
        count = self.config.num_patches
        return self.image_embedding(
            rows.image, rows.masked(count), rows.is_second, rows.replacements(count), rows.visible_patches
        )

    def head_outputs(self, head: Head, one: ForwardInput, features: Tensor, branch: Tensor | None) -> dict[str, Tensor]:
        if head == "itc":
            modality: Literal["image", "text"] = "image" if one.text is None else "text"
            read = (features,) if branch is None else (features, branch)
            return self.itc_head(modality, *(each[:, 0] for each in read))
        if head == "itm":
            return {head: self.itm_head(self.pooler(features[:, 0]))}
        if head == "mlm":
            return {head: self.mlm_head(features)}
        if head == "mim" and isinstance(self.mim_head, MaskedImageHead):
            return {head: self.mim_head(features)}
        if head == "decoded_image" and isinstance(self.mim_head, ImageDecoder):
            return {"mim": self.mim_head(features, one.visible_patches, one.patch_positions)}
        if head == "classes" and self.classification_head is not None:
            return {head: self.classification_head(features[:, 0])}
        if head == "answers" and self.vqa_head is not None:
            return {head: self.vqa_head(self.pooler(features[:, 0]))}
        if head == "nlvr2" and self.nlvr2_head is not None:
            return {head: self.nlvr2_head(self.pooler(features).flatten(1))}
        if head == "alignment":
            return aligned(one, features)
        if head == "tokens":
            return {head: features}
        raise ValueError(f"this VLMo was built without the head '{head}'")

    def part_of(self, parameter: str) -> str:
        names = parameter.split(".")
        if names[0] == "blocks":
            if names[2] != "experts":
                return "attention"
            if names[3] == "vision_language":
                return "vision_language_expert"
            upper = int(names[1]) >= self.config.layers - self.config.vision_language_layers
            return f"{names[3]}_expert.{'upper' if upper else 'lower'}"
        if names[0] == "positions":
            return parameter
        if names[1] == "positions":
            return f"positions.{names[0].removesuffix('_embedding')}"
        if parameter == "image_embedding.mask":
            return "mim_head"
        if parameter == "image_embedding.second":
            return "nlvr2_head"
        assert names[0] in PARTS, f"{parameter} belongs to no part"
        return names[0]

    def modules_for(self, objective: Objective, source_type: SourceType) -> frozenset[str] | None:
        """Contrast reads images and texts of pairs apart, matching and masked language read pairs fused; masked
        language reads a text source by itself, and masked images are read by themselves.
        """
        readable: dict[tuple[Objective, SourceType], set[str]] = {
            ("itc", "pairs"): _IMAGE | _TEXT | {"vision_language_expert", "itc_head"},
            ("itm", "pairs"): _FUSED | {"pooler", "itm_head"},
            ("mlm", "pairs"): _FUSED | {"mlm_head"},
            ("mlm", "text"): _TEXT | {"mlm_head"},
            ("mim", "pairs"): _IMAGE | {"mim_head"},
            ("mim", "images"): _IMAGE | {"mim_head"},
            ("wpa", "pairs"): set(_FUSED),
            ("classification", "labelled"): _IMAGE | {"classification_head"},
            ("vqa", "questions"): _FUSED | {"pooler", "vqa_head"},
            ("nlvr2", "statements"): _FUSED | {"pooler", "nlvr2_head"},
        }
        parts = readable.get((objective, source_type))
        if parts is None:
            return None
        if objective == "itc" and self.config.contrasts == 1:
            parts = parts - {"vision_language_expert"}
        return frozenset(parts if self.config.positions == "relative" else parts - {"positions.cross"})

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Of another picture size or text length: the release's rules (see `resize`).

        A model of two pictures that starts from one of a single picture knows the second as it knows the first.
        """
        resized = super().resize_state(state, before)
        resized |= {name: rule(resized[name]) for name, rule in self._resize_rules().items() if name in resized}
        if self.heads.reasoning and "image_embedding.modality" in resized:
            resized.setdefault("image_embedding.second", resized["image_embedding.modality"].clone())
        return resized

    def _resize_rules(self) -> dict[str, Callable[[Tensor], Tensor]]:
        grid, max_text_length = self.config.grid, self.config.max_text_length
        if self.config.positions == "relative":
            return {
                "positions.image": lambda table: resize_relative_grid(table, grid),
                "positions.text": lambda table: resize_text_distances(table, max_text_length),
            }
        return {
            "image_embedding.positions": lambda positions: resize_grid(positions, grid, "bicubic"),
            "text_embedding.positions": lambda positions: cut_text_positions(positions, max_text_length),
        }

    def initialize_parameter(self, name: str, parameter: Tensor, seed: int) -> None:
        if name.endswith("gamma"):
            assert self.config.layer_scale is not None
            nn.init.constant_(parameter, self.config.layer_scale)
        elif name.startswith("positions."):
            nn.init.zeros_(parameter)
        else:
            super().initialize_parameter(name, parameter, seed)


def _routes(text: int, image: bool) -> tuple[Route, Route]:
    """Which expert reads which tokens, below and in the vision-language layers."""
    if text and image:
        return {"language": slice(0, text), "vision": slice(text, None)}, {"vision_language": slice(None)}
    alone: Route = {"language": slice(None)} if text else {"vision": slice(None)}
    return alone, alone


def _tokens_read(text: int, patches: Tensor) -> Tensor:
    """Where the tokens of rows that read only `patches` (B, K) stand in the whole sequence: (B, L + 1 + K) int64."""
    before = torch.arange(text + 1, device=patches.device).expand(len(patches), -1)
    return torch.cat([before, patches.clamp(min=0) + text + 1], dim=1)


def _block(config: VLMoConfig, layer: int) -> MultiwayBlock:
    experts: tuple[Expert, ...] = ("vision", "language")
    if layer >= config.layers - config.vision_language_layers:
        experts += ("vision_language",)
    rate = config.drop_path_rates[layer]
    return MultiwayBlock(
        config.width,
        config.heads,
        config.mlp_ratio,
        experts,
        config.layer_scale,
        rate,
        epsilon=config.norm_eps,
    )


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


def copy_expert(
    state: dict[str, Tensor], source: Literal["vision", "language"], target: Literal["language", "vision_language"]
) -> dict[str, Tensor]:
    """A copy of a state in which each layer's `target` expert, where it has one, equals its `source` expert."""
    copied = dict(state)
    for name in state:
        if f".experts.{target}." in name:
            copied[name] = state[name.replace(f".experts.{target}.", f".experts.{source}.")].clone()
    return copied
