"""Image-text contrastive loss (ITC) over the global batch (CLIP, VLMo).

Every rank differentiates the loss of the whole batch with respect to the gathered features, and feeds the gradients of
its own examples' features into its own backward through a surrogate loss. With gradient accumulation the features come
from a first forward without gradient; each micro-batch then repeats it with the same drop-path masks.

Shapes: B global batch, n examples of this rank, D feature width, S sources.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives import Objective

# Feature and logit scale of each contrast. VLMo has both (its loss is their mean), other models only the first.
CONTRASTS = {"itc": "scale", "itc_vl": "scale_vl"}
WHOLE = slice(None)


def itc_loss(image: Tensor, text: Tensor, scale: Tensor, image_id: Tensor, rows: slice | Tensor = WHOLE) -> Tensor:
    """Return the symmetric cross-entropy summed over the pairs in `rows` against all B candidates.

    image and text (B, D) are unit vectors; row i of both is one pair. Pairs of equal `image_id` (B,) are never each
    other's negatives: their logits are removed before the softmax. The sums of disjoint `rows` add up to the whole.
    """
    image, text, scale = image.float(), text.float(), scale.float()
    own = torch.arange(len(image), device=image.device)[rows]
    equal = image_id[own, None] == image_id[None, :]
    equal = equal.scatter(1, own[:, None], False)
    image_to_text = (scale * image[own] @ text.T).masked_fill(equal, float("-inf"))
    text_to_image = (scale * text[own] @ image.T).masked_fill(equal, float("-inf"))
    total = F.cross_entropy(image_to_text, own, reduction="sum") + F.cross_entropy(text_to_image, own, reduction="sum")
    return total / 2


class ITC(Objective):
    """Image and text towers. The loss is `global_contrast`, because it needs the features of all ranks."""

    source_types = frozenset({"pairs"})
    head = "itc"
    evaluations: ClassVar = {"pairs": "retrieval", "labelled": "zero_shot"}
    towers = (frozenset({"image"}), frozenset({"text"}))

    def forwards(self, examples: Batch) -> dict[str, ForwardInput]:
        image, text = (self.context.drop_path_mask(examples, name) for name in ("image", "text"))
        return {
            "image": ForwardInput(self.heads, examples.image, examples.image_size, drop_path_mask=image),
            "text": ForwardInput(self.heads, text=examples.text, text_keep=examples.text_keep, drop_path_mask=text),
        }


class Contrast(NamedTuple):
    """The loss of the global batch and its gradient in this rank's features. All tensors are detached."""

    loss: Tensor  # unweighted mean over the global batch
    gradients: dict[tuple[str, str], Tensor]  # (forward, feature) -> (n, D) gradient of the weighted loss
    scale_gradients: dict[str, Tensor]
    image: Tensor  # (B, D) features of the first contrast, from which negatives are drawn
    text: Tensor
    scale: Tensor
    by_source: Tensor | None  # (S, 2) sum of the loss over each source's pairs, and their number


def feature_spread(*features: Tensor) -> Tensor:
    """Return the mean variance of unit vectors (B, D) around their mean: 0 if all are equal, 1 if they cancel out."""
    return torch.stack([1 - vectors.mean(dim=0).square().sum() for vectors in features]).mean()


def global_contrast(
    outputs: ForwardOutput,
    batch: Batch,
    weight: float,
    gather: Callable[[Tensor], Tensor],
    own: slice,
    num_sources: int = 0,
    divisor: int = 1,
) -> Contrast:
    """Compute the loss over all B x B pairs from this rank's features. A collective call.

    `gather` maps (n, ...) -> (B, ...), where `own` are this rank's rows. Features get 1 / `divisor` of their gradient.
    """
    heads = [head for head in CONTRASTS if head in outputs["image"]]
    names = [(name, head) for head in heads for name in ("image", "text")]
    with torch.enable_grad():
        features = {(name, head): gather(outputs[name][head].float()).requires_grad_() for name, head in names}
        scales = {CONTRASTS[h]: outputs["image"][CONTRASTS[h]].detach().float().requires_grad_() for h in heads}
        image_id = gather(batch.image_id)
        pairs = [(features["image", h], features["text", h], scales[CONTRASTS[h]], image_id) for h in heads]
        loss = torch.stack([itc_loss(*pair) for pair in pairs]).sum() / (len(heads) * len(image_id))
        gradients = iter(torch.autograd.grad(loss * weight, [*features.values(), *scales.values()]))
    by_source = None
    if num_sources:
        source = gather(batch.source)
        sums = []
        with torch.no_grad():
            for rows in (torch.nonzero(source == number).flatten() for number in range(num_sources)):
                losses = torch.stack([itc_loss(*pair, rows) for pair in pairs])
                sums.append(torch.stack([losses.mean(), loss.new_tensor(float(len(rows)))]))
        by_source = torch.stack(sums)
    return Contrast(
        loss=loss.detach(),
        gradients={name: next(gradients)[own] / divisor for name in features},
        scale_gradients={name: next(gradients) for name in scales},
        image=features["image", "itc"].detach(),
        text=features["text", "itc"].detach(),
        scale=scales["scale"].detach(),
        by_source=by_source,
    )
