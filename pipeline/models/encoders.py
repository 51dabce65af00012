"""Multiway encoders with one expert and absolute positions, and a key bias as published.

ViT (arXiv 2010.11929), ViLT (arXiv 2102.03334) and the dual encoder, which is CLIP (arXiv 2103.00020).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config.schema import DualEncoderConfig, TransformerConfig, ViLTConfig, ViTConfig
from pipeline.models.embeddings import ImageEmbedding, PlainTextEmbedding, TextEmbedding
from pipeline.models.forward import PackedInputs
from pipeline.models.model import ContrastiveHead, HeadConfig, Model
from pipeline.models.multiway import Expert, MultiwayBlock, QuickGELU, key_padding, run_blocks

VILT_EXPERT: Expert = "vision_language"
_VIT_ENCODER = ("image_embedding", "positions.image", "blocks", "norm")
_VILT_ENCODER = ("text_embedding", "image_embedding", "blocks", "norm")
_FUSED = frozenset(_VILT_ENCODER)


class ViT(Model):
    """An encoder of images for classification and masked-image modelling; `vocabulary` is ignored."""

    HEAD_PARTS: ClassVar = ("mim_head", "classification_head")  # the first with the mask embedding
    PARTS: ClassVar = _VIT_ENCODER + HEAD_PARTS
    PART_OF: ClassVar = Model.PART_OF | {"image_embedding.positions": "positions.image"}
    ENCODER_PARTS: ClassVar = {frozenset({"image"}): frozenset(_VIT_ENCODER)}
    HEADS: ClassVar = ("mim", "classes")
    RESIZABLE: ClassVar = frozenset({"image_size"})

    config: ViTConfig

    def __init__(self, config: ViTConfig, vocabulary: int = 0, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, epsilon = config.width, config.norm_eps
        self.image_embedding = ImageEmbedding(config, heads, modality=False)
        self.blocks = nn.ModuleList(
            MultiwayBlock(width, config.heads, config.mlp_ratio, ("vision",), None, rate, True, epsilon)
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.build_heads()

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        if packed.image is None or any(x is not None for x in (packed.text, packed.image_size, packed.is_second)):
            raise ValueError("a ViT reads one whole square image per example, and no text; request an image input")
        x, keep = self.image_embedding(packed)
        padding = None if packed.visible_patches is None else key_padding(keep, x.dtype)
        x = run_blocks(self.blocks, x, "vision", padding, packed.drop_path_mask, packed.output_positions)
        return self.norm(x), None


class ViLT(Model):
    """One transformer over words and patches; images keep their aspect ratio on the canvas that a batch shares."""

    # The second image's modality vector is a part of `nlvr2_head`, the mask embedding of `mim_head`.
    HEAD_PARTS: ClassVar = ("pooler", "itm_head", "mlm_head", "mim_head", "vqa_head", "nlvr2_head", "ranking_head")
    PARTS: ClassVar = _VILT_ENCODER + HEAD_PARTS
    ENCODER_PARTS: ClassVar = {
        frozenset({"image", "text"}): _FUSED,
        frozenset({"text"}): _FUSED - {"image_embedding"},
        frozenset({"image"}): _FUSED - {"text_embedding"},
    }
    HEADS: ClassVar = ("itm", "mlm", "mim", "alignment", "answers", "nlvr2", "ranking")
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})

    config: ViLTConfig

    def __init__(self, config: ViLTConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, epsilon, text_epsilon = config.width, config.norm_eps, config.text_norm_eps
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length, epsilon=text_epsilon)
        self.image_embedding = ImageEmbedding(config, heads, any_shape=True)
        self.blocks = nn.ModuleList(
            MultiwayBlock(width, config.heads, config.mlp_ratio, (VILT_EXPERT,), None, rate, True, epsilon)
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.build_heads(vocabulary, text_epsilon)

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        x, keep = self.embed(packed)
        padding = key_padding(keep, x.dtype)
        x = run_blocks(self.blocks, x, VILT_EXPERT, padding, packed.drop_path_mask, packed.output_positions)
        return self.norm(x), None

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Resize to another image size or text length, or start from a ViT as the paper does, with new words.

        The ranking head starts from the matching head's row of "matched".
        """
        if before.kind == "vit":
            keys = ("width", "layers", "heads", "mlp_ratio", "image_size", "patch_size")
            own, prefixes = self.state_dict(), ("text_embedding.", "image_embedding.modality")
            state = {name: own[name] for name in own if name.startswith(prefixes)} | {
                name.replace(".experts.vision.", f".experts.{VILT_EXPERT}."): tensor
                for name, tensor in state.items()
                if not name.startswith("classification_head.")
            }
            before = self.config.model_copy(update={key: getattr(before, key) for key in keys})
        resized = super().resize_state(state, before)
        if self.heads.ranking and "itm_head.classify.weight" in resized:
            for name in ("weight", "bias"):
                resized.setdefault(f"ranking_head.score.{name}", resized[f"itm_head.classify.{name}"][1:].clone())
        return resized


class DualEncoder(Model):
    """CLIP: an image tower read at its [CLS], and a causal text tower read at its end token, in one unit sphere."""

    PARTS: ClassVar = ("image_embedding", "text_embedding", "image_tower", "text_tower", "itc_head")
    HEAD_PARTS: ClassVar = ("itc_head",)
    ENCODER_PARTS: ClassVar = {
        frozenset({"image"}): frozenset({"image_embedding", "image_tower"}),
        frozenset({"text"}): frozenset({"text_embedding", "text_tower"}),
    }
    HEADS: ClassVar = ("itc",)
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})
    GRID_RULE: ClassVar = "bicubic"  # as open_clip resizes CLIP's positions
    READS_LAST_TOKEN: ClassVar = True

    config: DualEncoderConfig
    image_tower: nn.ModuleDict
    text_tower: nn.ModuleDict

    def __init__(self, config: DualEncoderConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        epsilon, activation = config.norm_eps, QuickGELU if config.activation == "quick_gelu" else nn.GELU
        self.image_embedding = ImageEmbedding(config, HeadConfig(), modality=False, patch_bias=False)
        self.text_embedding = PlainTextEmbedding(vocabulary, config.text_width, config.max_text_length)
        towers: tuple[tuple[str, Expert, int, int, int], ...] = (
            ("image_tower", "vision", config.layers, config.width, config.heads),
            ("text_tower", "language", config.text_layers, config.text_width, config.text_heads),
        )
        for name, expert, layers, width, num_heads in towers:
            # The shallower tower has the drop-path rates of the other's last layers.
            blocks = nn.ModuleList(
                MultiwayBlock(width, num_heads, config.mlp_ratio, (expert,), None, rate, True, epsilon, activation)
                for rate in config.drop_path_rates[-layers:]
            )
            self.add_module(name, nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(width, eps=epsilon)}))
        self.image_tower["input_norm"] = nn.LayerNorm(config.width, eps=epsilon)
        self.itc_head = ContrastiveHead(config.width, 1, config.embedding, text_width=config.text_width)

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        if packed.image is not None and packed.text is not None:
            raise ValueError("a dual encoder reads an image or a text, never both in one input; request two inputs")
        if packed.image_size is not None or packed.visible_patches is not None:
            raise ValueError("a dual encoder reads whole square images; use ViLT for images of their own shape")
        x, keep = self.embed(packed)
        expert: Expert
        if packed.text is None:
            expert, tower, x, padding, bias = "vision", self.image_tower, self.image_tower["input_norm"](x), None, None
        else:
            expert, tower, padding = "language", self.text_tower, key_padding(keep, x.dtype)
            is_earlier = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            bias = key_padding(is_earlier, x.dtype)  # (1, L, L): a token attends to itself and those before it
        blocks: Any = tower["blocks"]
        mask = None if packed.drop_path_mask is None else packed.drop_path_mask[:, -len(blocks) :]
        return tower["norm"](run_blocks(blocks, x, expert, padding, mask, packed.output_positions, bias)), None
