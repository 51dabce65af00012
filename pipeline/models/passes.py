"""What a training step asks of a model: several named passes in one call, and their features by name.

    outputs = model({"image": Pass(image=…, heads=("itc",)), "masked": Pass(image=…, text=…, heads=("mlm",))})
    outputs["masked"]["mlm"]

A pass with an image only, a text only, or both (fused) differs in nothing but its members: the model routes
by what is there. Randomness arrives as an argument (`drop_keep`); a model draws nothing itself.

Shapes: B rows, L tokens, P patches, K chosen positions a row, N layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Head = Literal["itc", "itm", "mlm", "masked_image", "tokens"]
Outputs = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Pass:
    """One reading of some rows, and the heads whose outputs are wanted.

    Heads and what they return:
      itc           on an image or a text pass: `itc` and `itc_vl` (B, D), unit vectors; `scale` and `scale_vl`, the
                    exponentiated logit scales (0-d), so that no parameter is read outside the engine's forward
      itm           on a fused pass: `itm` (B, 2), logits of (not matched, matched)
      mlm           on a text or fused pass: `mlm` (B, K, V), logits at `mask_positions`
      masked_image  on an image pass: `masked_image` (B, K, targets), predictions at `patch_positions`
      tokens        any pass: `tokens`, final normalised features of every position (text first, then image with its
                    CLS in front), for inspection
    """

    heads: tuple[Head, ...]
    image: Tensor | None = None  # (B, H, W, 3) uint8
    text: Tensor | None = None  # (B, L) int64
    text_keep: Tensor | None = None  # (B, L) bool, False at padding
    mask_positions: Tensor | None = None  # (B, K) int64: tokens the mlm head reads
    patch_positions: Tensor | None = None  # (B, K) int64: patches hidden from the encoder, read by masked_image
    drop_keep: Tensor | None = None  # (B, N, 2) bool: attention and feed-forward branches kept; None keeps all
