"""ViLT (arXiv 2102.03334): one transformer over words and patches together; pictures keep their shape.

It is a multiway encoder with one expert, absolute positions, and a key bias as published. The pictures of a batch lie
at the top left of a canvas as large as the largest; what is picture is told by its size, never guessed from pixels.
Patches are numbered row by row over the picture itself, so that no number depends on the canvas.

Shapes: B rows, H x W the canvas's pixels, L tokens, P patches of the canvas, K patches that are read or positions a
row, g side of the position grid, D width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.schema import Objective, SourceType, TransformerConfig, ViLTConfig
from pipeline.models.attention import gather
from pipeline.models.embeddings import ImageEmbedding, TextEmbedding, key_padding
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.heads import (
    MaskedImageHead,
    MaskedLanguageHead,
    MatchingHead,
    PooledHead,
    Pooler,
    RankingHead,
)
from pipeline.models.model import HeadConfig, Model, aligned
from pipeline.models.multiway import Expert, MultiwayBlock
from pipeline.models.packing import PackedInputs
from pipeline.models.resize import cut_text_positions, resize_grid

PARTS = (
    "text_embedding",
    "image_embedding",
    "blocks",
    "norm",
    "pooler",
    "itm_head",
    "mlm_head",
    "mim_head",  # with the embedding that hides a patch
    "vqa_head",
    "nlvr2_head",  # with the embedding that says "this is the second image"
    "ranking_head",
)
EXPERT: Expert = "vision_language"  # the one that reads everything


class ShapedImageEmbedding(ImageEmbedding):
    """Patches and [CLS] of pictures of any shape; the square position grid is resized to each picture's own."""

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        size: Tensor | None,
        hidden: Tensor | None = None,
        is_second: Tensor | None = None,
        stand_ins: Tensor | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """image (B, H, W, 3), uint8 or floats in [-1, 1] -> (B, 1 + K, D), and which of these are real: bool.

        size (B, 2) int64 are the pixels of each canvas that are picture, None: all. `hidden` (B, P) bool covers
        patches; `stand_ins` (B, P) says which patch is shown at each place; `read` (B, K) chooses patches, -1: none.
        """
        self._check(image)
        height, width = (side // self.patch_size for side in image.shape[1:3])
        whole = torch.tensor([[height, width]], device=image.device)
        grid = whole.expand(len(image), 2) if size is None else size // self.patch_size
        if read is None:
            read = torch.arange(height * width, device=image.device).expand(len(image), -1)
        keep = (read >= 0) & (read < grid.prod(dim=1, keepdim=True))
        read = read.where(keep, 0)
        shown = read if stand_ins is None else stand_ins.gather(1, read)
        patches = gather(self.cut(image), on_canvas(shown, grid, width))
        x = self.project(patches, None if hidden is None else hidden.gather(1, read))
        assert self.positions is not None
        x = x + resized_positions(self.positions[1:], read, grid)
        x = torch.cat([(self.cls + self.positions[0]).expand(len(x), 1, -1), x], dim=1)
        return self.tell_modality(x, is_second), F.pad(keep, (1, 0), value=True)

    def _check(self, image: Tensor) -> None:
        if image.dim() != 4 or image.shape[3] != 3 or any(side % self.patch_size for side in image.shape[1:3]):
            raise ValueError(
                f"an image batch of shape {tuple(image.shape)} does not fit the model, which reads (rows, height, "
                f"width, 3) with sides that are multiples of {self.patch_size}; cut or pad the images to that"
            )


def on_canvas(patches: Tensor, grid: Tensor, width: int) -> Tensor:
    """The numbers on a canvas `width` patches wide of patches numbered over their own pictures: (B, K) int64.

    patches (B, K) are numbers of real patches, grid (B, 2) the pictures' rows and columns of patches.
    """
    columns = grid[:, 1:]
    return torch.div(patches, columns, rounding_mode="floor") * width + patches % columns


def resized_positions(positions: Tensor, patches: Tensor, grid: Tensor) -> Tensor:
    """What a square grid of positions (g², D) says of `patches` (B, K) of pictures of `grid` (B, 2): (B, K, D).

    Bilinear with aligned corners (`resize.resize_grid`), for pictures of all shapes at once: a picture's patch lies
    between four points of the square, and reads each by a hat function of its distance.
    """
    side = round(len(positions) ** 0.5)
    columns = grid[:, 1:]
    down = torch.div(patches, columns, rounding_mode="floor")
    vertical = _hats(down, grid[:, :1], side)
    horizontal = _hats(patches % columns, columns, side)
    weights = (vertical.unsqueeze(-1) * horizontal.unsqueeze(-2)).flatten(2)  # (B, K, g²)
    return weights.to(positions.dtype) @ positions


def _hats(place: Tensor, count: Tensor, side: int) -> Tensor:
    """How much each of `side` points weighs at `place` (B, K) of `count` (B, 1) places spread over them: (B, K, g)."""
    at = place * ((side - 1) / (count - 1).clamp(min=1))
    points = torch.arange(side, device=place.device)
    return (1 - (at.unsqueeze(-1) - points).abs()).clamp(min=0)


class ViLT(Model):
    PARTS: ClassVar = PARTS
    HEAD_PARTS: ClassVar = PARTS[PARTS.index("pooler") :]
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})

    config: ViLTConfig

    def __init__(self, config: ViLTConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, targets = config.width, heads.image_targets(config.patch_size)
        self.text_embedding = TextEmbedding(
            vocabulary, width, config.max_text_length, absolute=True, epsilon=config.text_norm_eps
        )
        self.image_embedding = ShapedImageEmbedding(
            config.image_size, config.patch_size, width, absolute=True, maskable=targets > 0, second=heads.reasoning
        )
        self.blocks = nn.ModuleList(
            MultiwayBlock(
                width,
                config.heads,
                config.mlp_ratio,
                (EXPERT,),
                None,
                rate,
                key_bias=True,
                epsilon=config.norm_eps,
            )
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pooler = Pooler(width)
        self.itm_head = MatchingHead(width)
        self.mlm_head = MaskedLanguageHead(width, vocabulary, config.text_norm_eps)
        self.mim_head = MaskedImageHead(width, targets) if targets else None
        self.vqa_head = PooledHead(width, 2 * width, heads.answers) if heads.answers else None
        self.nlvr2_head = PooledHead(2 * width, 2 * width, 2) if heads.reasoning else None
        self.ranking_head = RankingHead(width) if heads.ranking else None

    def encode(self, rows: PackedInputs) -> tuple[Tensor, None]:
        """Text, then picture; a pass with one of them alone reads that."""
        parts: list[tuple[Tensor, Tensor]] = []
        if rows.text is not None and rows.text_keep is not None:
            parts.append((self.text_embedding(rows.text), rows.text_keep))
        if rows.image is not None:
            parts.append(self._embed_image(rows, rows.image))
        x = torch.cat([tokens for tokens, _ in parts], dim=1)
        padding = key_padding(torch.cat([real for _, real in parts], dim=1), x.dtype)
        for layer, block in enumerate(self.blocks):
            keep = None if rows.drop_path_mask is None else rows.drop_path_mask[:, layer]
            read = rows.output_positions if layer == len(self.blocks) - 1 else None
            x = block(x, {EXPERT: slice(None)}, None, padding, keep, read)
        return self.norm(x), None

    def _embed_image(self, rows: PackedInputs, image: Tensor) -> tuple[Tensor, Tensor]:
        count = image.shape[1] * image.shape[2] // self.config.patch_size**2
        return self.image_embedding(
            image, rows.image_size, rows.masked(count), rows.is_second, rows.replacements(count), rows.visible_patches
        )

    def head_outputs(self, head: Head, one: ForwardInput, features: Tensor, branch: Tensor | None) -> dict[str, Tensor]:
        if head == "itm":
            return {head: self.itm_head(self.pooler(features[:, 0]))}
        if head == "mlm":
            return {head: self.mlm_head(features)}
        if head == "mim" and self.mim_head is not None:
            return {head: self.mim_head(features)}
        if head == "answers" and self.vqa_head is not None:
            return {head: self.vqa_head(self.pooler(features[:, 0]))}
        if head == "nlvr2" and self.nlvr2_head is not None:
            return {head: self.nlvr2_head(self.pooler(features).flatten(1))}
        if head == "ranking" and self.ranking_head is not None:
            return {head: self.ranking_head(self.pooler(features[:, 0]))}
        if head == "alignment":
            return aligned(one, features, self._patches_keep(one, features))
        if head == "tokens":
            return {head: features}
        raise ValueError(f"this ViLT was built without the head '{head}'")

    def _patches_keep(self, one: ForwardInput, features: Tensor) -> Tensor:
        """Which of the patches among a fused pass's features (B, L + 1 + P, D) are patches of the picture: (B, P)."""
        assert one.image is not None
        assert one.text is not None
        count = features.shape[1] - one.text.shape[1] - 1
        if one.visible_patches is not None:
            return F.pad(one.visible_patches >= 0, (0, count - one.visible_patches.shape[1]))
        place = torch.arange(count, device=features.device).expand(len(features), -1)
        height, width = one.image.shape[1:3]
        pixels = height * width if one.image_size is None else one.image_size.prod(dim=1, keepdim=True)
        return place < pixels // self.config.patch_size**2

    def part_of(self, parameter: str) -> str:
        if parameter == "image_embedding.mask":
            return "mim_head"
        if parameter == "image_embedding.second":
            return "nlvr2_head"
        part = parameter.split(".")[0]
        assert part in PARTS, f"{parameter} belongs to no part"
        return part

    def modules_for(self, objective: Objective, source_type: SourceType) -> frozenset[str] | None:
        """Everything is read fused, where a source has both; masked words and patches are learnt from either alone."""
        readable: dict[tuple[Objective, SourceType], set[str]] = {
            ("itm", "pairs"): _FUSED | {"pooler", "itm_head"},
            ("mlm", "pairs"): _FUSED | {"mlm_head"},
            ("mlm", "text"): _FUSED - {"image_embedding"} | {"mlm_head"},
            ("mim", "pairs"): _FUSED | {"mim_head"},
            ("mim", "images"): _FUSED - {"text_embedding"} | {"mim_head"},
            ("wpa", "pairs"): _FUSED,
            ("vqa", "questions"): _FUSED | {"pooler", "vqa_head"},
            ("nlvr2", "statements"): _FUSED | {"pooler", "nlvr2_head"},
            ("ranking", "pairs"): _FUSED | {"pooler", "ranking_head"},
        }
        parts = readable.get((objective, source_type))
        return None if parts is None else frozenset(parts)

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Of another picture size or text length; or a ViT's, which the paper starts from: its words are new then.

        What fine-tuning adds starts from what it grew out of: the second picture's embedding from the picture's, the
        ranking head from the matching head's row of "matched".
        """
        if before.kind == "vit":
            state, before = self._from_vit(state), self.config.model_copy(update=_shared_sizes(before))
        resized = super().resize_state(state, before)
        rules = {
            "image_embedding.positions": lambda positions: resize_grid(positions, self.config.grid, "bilinear"),
            "text_embedding.positions": lambda positions: cut_text_positions(positions, self.config.max_text_length),
        }
        resized |= {name: rule(resized[name]) for name, rule in rules.items() if name in resized}
        if self.heads.reasoning and "image_embedding.modality" in resized:
            resized.setdefault("image_embedding.second", resized["image_embedding.modality"].clone())
        if self.heads.ranking and "itm_head.classify.weight" in resized:
            for name in ("weight", "bias"):
                resized.setdefault(f"ranking_head.score.{name}", resized[f"itm_head.classify.{name}"][1:].clone())
        return resized

    def _from_vit(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict()
        renamed = {name.replace(".experts.vision.", f".experts.{EXPERT}."): tensor for name, tensor in state.items()}
        new = {name: own[name] for name in own if name.startswith(("text_embedding.", "image_embedding.modality"))}
        return new | {name: tensor for name, tensor in renamed.items() if not name.startswith("classification_head.")}


def _shared_sizes(vit: TransformerConfig) -> dict[str, int]:
    """A ViT's sizes, which a ViLT that starts from it must have."""
    names = ("width", "layers", "heads", "mlp_ratio", "image_size", "patch_size")
    return {name: getattr(vit, name) for name in names}


_FUSED = {"text_embedding", "image_embedding", "blocks", "norm"}
