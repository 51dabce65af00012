"""Image-text contrast (ITC): each image finds its text among the global batch, each text its image (CLIP, VLMo).

Shapes: N pairs of the global batch, R of them ours, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, image_id: Tensor, rows: slice | Tensor = slice(None)
) -> Tensor:
    """Symmetric cross-entropy, summed over the pairs in `rows` (all, by default) against all N candidates.

    image and text (N, D) are unit vectors, row i of both is one pair. Pairs of equal `image_id` (N,) are never each
    other's negatives: their logits are removed before the softmax. The sums of disjoint `rows` add up to the whole,
    so ranks may share the work.
    """
    image, text, scale = image.float(), text.float(), scale.float()
    own = torch.arange(len(image), device=image.device)[rows]
    equal = image_id[own, None] == image_id[None, :]
    equal = equal.scatter(1, own[:, None], False)
    image_to_text = (scale * image[own] @ text.T).masked_fill(equal, float("-inf"))
    text_to_image = (scale * text[own] @ image.T).masked_fill(equal, float("-inf"))
    total = F.cross_entropy(image_to_text, own, reduction="sum") + F.cross_entropy(text_to_image, own, reduction="sum")
    return total / 2
