"""VLMo (arXiv 2111.02358): one encoder for images, texts, or both, which routes tokens to modality experts.

Below the vision-language layers, text goes to the language expert and patches to the vision expert. Above, a fused
sequence goes to the vision-language expert as a whole. The last layer computes only the positions that the heads read.

BEiT-3 (arXiv 2208.10442) is a VLMo without vision-language layers whose attention and norms are routed, too: all that
one modality alone uses belongs to its expert.

Shapes: B examples, L tokens (text first, then image with its [CLS] in front), K visible patches, H heads.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.config.schema import VLMoConfig
from pipeline.models.embeddings import ImageEmbedding, PlainTextEmbedding, RelativePositions, TextEmbedding
from pipeline.models.forward import PackedInputs
from pipeline.models.model import MAX_SCALE, ContrastiveHead, HeadConfig, Model
from pipeline.models.multiway import (
    Expert,
    MultiwayBlock,
    Route,
    apply_routed,
    build_for_experts,
    gather,
    gather_bias,
    key_padding,
)

# "attention" has its norm, and both LayerScale gammas, which all experts share.
_SHARED, _UPPER = {"attention", "norm"}, {"vision_expert.upper", "language_expert.upper"}
_IMAGE = frozenset(_SHARED | {"image_embedding", "positions.image", "vision_expert.lower", "vision_expert.upper"})
_TEXT = frozenset(_SHARED | {"text_embedding", "positions.text", "language_expert.lower", "language_expert.upper"})
_FUSED = (_IMAGE | _TEXT | {"positions.cross", "vision_language_expert"}) - _UPPER


class VLMo(Model):
    # The second image's modality vector is a part of `nlvr2_head`, the mask embedding of `mim_head`.
    HEAD_PARTS: ClassVar = (
        *("pooler", "itc_head", "itm_head", "mlm_head", "mim_head"),
        *("classification_head", "vqa_head", "nlvr2_head"),
    )
    PARTS: ClassVar = (*sorted(_FUSED | _UPPER), *HEAD_PARTS)
    PART_OF: ClassVar = {
        **Model.PART_OF,
        "blocks": "attention",  # but for the experts, which depend on the layer
        **{f"positions.{table}": f"positions.{table}" for table in ("image", "cross", "text")},
        **{f"{kind}_embedding.positions": f"positions.{kind}" for kind in ("image", "text")},
    }
    ENCODER_PARTS: ClassVar = {
        frozenset({"image"}): _IMAGE,
        frozenset({"text"}): _TEXT,
        frozenset({"image", "text"}): _FUSED,
    }
    HEADS: ClassVar = ("itc", "itm", "mlm", "mim", "alignment", "classes", "answers", "nlvr2")
    RESIZABLE: ClassVar = frozenset({"image_size", "max_text_length"})
    GRID_RULE: ClassVar = "bicubic"

    config: VLMoConfig

    def __init__(self, config: VLMoConfig, vocabulary: int, heads: HeadConfig = HeadConfig()) -> None:
        super().__init__(config, heads)
        width, length, absolute = config.width, config.max_text_length, config.positions == "absolute"
        is_plain, is_routed = config.embeddings == "plain", config.attention == "routed"
        if is_plain:
            self.text_embedding = PlainTextEmbedding(vocabulary, width, length)
        else:
            self.text_embedding = TextEmbedding(vocabulary, width, length, absolute)
        self.image_embedding = ImageEmbedding(config, heads, absolute, modality=not is_plain)
        self.positions = None if absolute else RelativePositions(config.layers, config.heads, config.grid, length)
        self.first_fused = config.layers - config.vision_language_layers
        self.branch_parts = frozenset({"vision_language_expert"} if config.contrasts == 2 else ())
        self.blocks, scale, epsilon = nn.ModuleList(), config.layer_scale, config.norm_eps
        modalities: tuple[Expert, ...] = ("vision", "language")
        routed = ("norm", "attention.joint", "attention.projection") if is_routed else ()
        for layer, rate in enumerate(config.drop_path_rates):
            experts, half = modalities, "upper" if layer >= self.first_fused else "lower"
            parts = {
                f"blocks.{layer}.{module}.{expert}": f"{expert}_expert.{half}"
                for expert in experts
                for module in ("experts", *routed)
            }
            if layer >= self.first_fused:
                experts += ("vision_language",)
                parts[f"blocks.{layer}.experts.vision_language"] = "vision_language_expert"
            self.part_of_module |= parts
            sizes = (width, config.heads, config.mlp_ratio, experts, scale, rate)
            block = MultiwayBlock(*sizes, epsilon=epsilon, routed=is_routed, sub_norm=config.sub_norm)
            self.blocks.append(block)
        self.norm = build_for_experts(modalities if is_routed else (), lambda: nn.LayerNorm(width, eps=epsilon))
        self.part_of_module |= {f"norm.{expert}": f"{expert}_expert.lower" for expert in modalities}
        max_scale = MAX_SCALE if heads.bounds_scales else math.inf
        self.build_heads(vocabulary, itc_head=ContrastiveHead(width, config.contrasts, max_scale=max_scale))

    def encode(self, packed: PackedInputs) -> tuple[Tensor, Tensor | None]:
        """Return normalised features, and for two contrasts those of a branch through the vision-language expert."""
        if packed.image is not None and packed.image_size is not None:
            raise ValueError("VLMo reads whole square images; use ViLT for images of their own shape")
        text, visible = 0 if packed.text is None else packed.text.shape[1], packed.visible_patches
        x, keep = self.embed(packed)
        bias = None if self.positions is None else self.positions(text, packed.image is not None)
        biases = [None] * len(self.blocks) if bias is None else bias.unbind(0)
        places = None  # (B, text + 1 + K): positions in the whole sequence of the tokens that are read
        if visible is not None:
            before = torch.arange(text + 1, device=x.device).expand(len(x), -1)
            places = torch.cat([before, visible.clamp(min=0) + text + 1], dim=1)
        # Whole images have no padding.
        padding = None if packed.text is None and visible is None else key_padding(keep, x.dtype)

        def run(x: Tensor, layers: range, route: Route) -> Tensor:
            for layer in layers:
                mask = None if packed.drop_path_mask is None else packed.drop_path_mask[:, layer]
                is_last = layer == len(self.blocks) - 1
                positions = packed.output_positions if is_last and len(route) == 1 else None
                bias = biases[layer]  # (H, L, L)
                if bias is not None and places is not None:  # between the tokens that are read: (B, H, K, K)
                    rows = gather_bias(bias.unsqueeze(0), places)
                    bias = rows.gather(3, places[:, None, None, :].expand(*rows.shape[:3], -1))
                x = self.blocks[layer](x, route, bias, padding, mask, positions)
            return x

        fused: Route = {"vision_language": slice(None)}
        if packed.text is not None and packed.image is not None:
            lower: Route = {"language": slice(0, text), "vision": slice(text, None)}
            upper = fused
        else:
            lower = upper = {"vision" if packed.text is None else "language": slice(None)}
        fused_layers = range(self.first_fused, len(self.blocks))
        below = run(x, range(self.first_fused), lower)
        last = upper if fused_layers else lower
        features = apply_routed(self.norm, run(below, fused_layers, upper), last)
        if len(last) > 1 and packed.output_positions is not None:
            features = gather(features, packed.output_positions)
        if not packed.branches or self.config.contrasts == 1:
            return features, None
        return features, self.norm(run(below, fused_layers, fused))
