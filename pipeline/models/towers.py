"""Models without fusion: ViT (arXiv 2010.11929), and a dual encoder trained by contrast (CLIP, arXiv 2103.00020).

ViT is a multiway encoder with one expert, absolute positions, and a key bias as published, for classification and
masked-image modelling. The dual encoder is the baseline: each tower is a bidirectional transformer with absolute
positions, whose [CLS] is projected into the shared unit sphere. CLIP's other choices (a causal text tower read at its
end token, QuickGELU, a LayerNorm before the image tower) are left out, so that comparisons are about fusion.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from pipeline.config.schema import DualEncoderConfig, ViTConfig
from pipeline.models.embeddings import ImageEmbedding, TextEmbedding
from pipeline.models.heads import ContrastiveHead
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import EPSILON, Expert, MultiwayBlock, key_padding, run_blocks
from pipeline.models.packing import PackedInputs

_ENCODER = ("image_embedding", "positions.image", "blocks", "norm")


class ViT(Model):
    HEAD_PARTS: ClassVar = ("mim_head", "classification_head")  # the first with the mask embedding
    PARTS: ClassVar = _ENCODER + HEAD_PARTS
    PART_OF: ClassVar = Model.PART_OF | {"image_embedding.positions": "positions.image"}
    ENCODER_PARTS: ClassVar = {frozenset({"image"}): frozenset(_ENCODER)}
    HEADS: ClassVar = ("mim", "classes")
    RESIZABLE: ClassVar = frozenset({"image_size"})

    config: ViTConfig

    def __init__(self, config: ViTConfig, vocabulary: int = 0, heads: HeadConfig = HeadConfig()) -> None:
        """Build a ViT; `vocabulary` is ignored, as it reads no text."""
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


class DualEncoder(Model):
    PARTS: ClassVar = ("image_embedding", "text_embedding", "image_tower", "text_tower", "itc_head")
    HEAD_PARTS: ClassVar = ("itc_head",)
    ENCODER_PARTS: ClassVar = {
        frozenset({"image"}): frozenset({"image_embedding", "image_tower"}),
        frozenset({"text"}): frozenset({"text_embedding", "text_tower"}),
    }
    HEADS: ClassVar = ("itc",)
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})
    GRID_RULE: ClassVar = "bicubic"  # as open_clip resizes CLIP's positions

    config: DualEncoderConfig
    image_tower: nn.ModuleDict
    text_tower: nn.ModuleDict

    def __init__(self, config: DualEncoderConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width = config.width
        self.image_embedding = ImageEmbedding(config, HeadConfig())
        self.text_embedding = TextEmbedding(vocabulary, width, config.max_text_length)
        towers: tuple[tuple[str, Expert, int], ...]
        towers = (("image_tower", "vision", config.layers), ("text_tower", "language", config.text_layers))
        for name, expert, layers in towers:  # the shallower one has the drop-path rates of the other's last layers
            blocks = nn.ModuleList(
                MultiwayBlock(width, config.heads, config.mlp_ratio, (expert,), None, rate)
                for rate in config.drop_path_rates[-layers:]
            )
            self.add_module(name, nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(width, eps=EPSILON)}))
        self.itc_head = ContrastiveHead(width, contrasts=1, embedding=config.embedding)

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        if packed.image is not None and packed.text is not None:
            raise ValueError("a dual encoder reads an image or a text, never both in one input; request two inputs")
        if packed.image_size is not None or packed.visible_patches is not None:
            raise ValueError("a dual encoder reads whole square images; use ViLT for images of their own shape")
        x, keep = self.embed(packed)
        expert: Expert = "vision" if packed.text is None else "language"
        tower = self.image_tower if packed.text is None else self.text_tower
        padding = None if packed.text is None else key_padding(keep, x.dtype)
        blocks: Any = tower["blocks"]
        mask = None if packed.drop_path_mask is None else packed.drop_path_mask[:, -len(blocks) :]
        return tower["norm"](run_blocks(blocks, x, expert, padding, mask, packed.output_positions)), None
