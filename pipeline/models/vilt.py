"""ViLT (arXiv 2102.03334): one transformer over words and patches; images keep their aspect ratio.

It is a multiway encoder with one expert, absolute positions, and a key bias as published. Patches are numbered row by
row over the image itself, so that no number depends on the canvas that the images of a batch share.
"""

from typing import ClassVar

from torch import Tensor, nn

from pipeline.config.schema import TransformerConfig, ViLTConfig
from pipeline.models.embeddings import ImageEmbedding, TextEmbedding
from pipeline.models.model import HeadConfig, Model
from pipeline.models.multiway import Expert, MultiwayBlock, key_padding, run_blocks
from pipeline.models.packing import PackedInputs

EXPERT: Expert = "vision_language"
_ENCODER = ("text_embedding", "image_embedding", "blocks", "norm")
_FUSED = frozenset(_ENCODER)


class ViLT(Model):
    # The second image's modality vector is a part of `nlvr2_head`, the mask embedding of `mim_head`.
    HEAD_PARTS: ClassVar = ("pooler", "itm_head", "mlm_head", "mim_head", "vqa_head", "nlvr2_head", "ranking_head")
    PARTS: ClassVar = _ENCODER + HEAD_PARTS
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
            MultiwayBlock(width, config.heads, config.mlp_ratio, (EXPERT,), None, rate, True, epsilon)
            for rate in config.drop_path_rates
        )
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.build_heads(vocabulary, text_epsilon)

    def encode(self, packed: PackedInputs) -> tuple[Tensor, None]:
        x, keep = self.embed(packed)
        padding = key_padding(keep, x.dtype)
        x = run_blocks(self.blocks, x, EXPERT, padding, packed.drop_path_mask, packed.output_positions)
        return self.norm(x), None

    def resize_state(self, state: dict[str, Tensor], before: TransformerConfig) -> dict[str, Tensor]:
        """Resize to another image size or text length, or start from a ViT as the paper does, with new words.

        The ranking head starts from the matching head's row of "matched".
        """
        if before.kind == "vit":
            keys = ("width", "layers", "heads", "mlp_ratio", "image_size", "patch_size")
            own, prefixes = self.state_dict(), ("text_embedding.", "image_embedding.modality")
            state = {name: own[name] for name in own if name.startswith(prefixes)} | {
                name.replace(".experts.vision.", f".experts.{EXPERT}."): tensor
                for name, tensor in state.items()
                if not name.startswith("classification_head.")
            }
            before = self.config.model_copy(update={key: getattr(before, key) for key in keys})
        resized = super().resize_state(state, before)
        if self.heads.ranking and "itm_head.classify.weight" in resized:
            for name in ("weight", "bias"):
                resized.setdefault(f"ranking_head.score.{name}", resized[f"itm_head.classify.{name}"][1:].clone())
        return resized
