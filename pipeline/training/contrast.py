"""The contrastive loss of a whole global batch, and its gradient brought back into each rank's own backward.

Every rank gathers all features, differentiates the whole loss with respect to them, and feeds its own rows' feature
gradients into its own backward ("injection"). Under accumulation the features come from a first forward without
gradient, and each micro-batch is then read again with the same drop-path masks.

Shapes: B global batch, n this rank's rows, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.objectives.contrastive import contrastive_loss
from pipeline.training.collectives import Collectives, share
from pipeline.training.terms.term import Keeps

# A contrast's feature, and its scale. A model has the first, or both (VLMo): the loss is then their mean.
CONTRASTS = {"itc": "scale", "itc_vl": "scale_vl"}


def tower_passes(rows: Batch, keeps: Keeps) -> dict[str, ForwardInput]:
    """Pictures and texts, each read by themselves."""
    image = ForwardInput(
        heads=("itc",), image=rows.image, image_size=rows.image_size, drop_path_mask=keeps(rows, "image")
    )
    text = ForwardInput(heads=("itc",), text=rows.text, text_keep=rows.text_keep, drop_path_mask=keeps(rows, "text"))
    return {"image": image, "text": text}


@dataclass(frozen=True)
class Contrast:
    """The whole batch's loss, and what flows back into this rank's rows. Detached."""

    loss: Tensor  # mean over the global batch, not weighted
    weight: float
    gradients: dict[tuple[str, str], Tensor]  # (pass, feature) -> (n, D) of the weighted loss
    scale_gradients: dict[str, Tensor]
    image: Tensor  # (B, D) of the first contrast, which negatives are drawn by
    text: Tensor
    scale: Tensor
    by_source: Tensor | None = None  # (S, 2): the loss summed over each source's pairs, and their number; if asked for

    def injected(self, outputs: ForwardOutput, piece: slice, parts: int) -> Tensor:
        """A scalar whose gradient in the rows of `piece` is the whole batch's contrastive gradient.

        `parts` is how many of these scalars are summed over ranks and micro-batches: each carries its share of the
        scales' gradient.
        """
        rows = [(outputs[name][head].float() * g[piece]).sum() for (name, head), g in self.gradients.items()]
        scales = [outputs["image"][name].float() * g / parts for name, g in self.scale_gradients.items()]
        return torch.stack([*rows, *scales]).sum()


def contrast_of(
    outputs: ForwardOutput, batch: Batch, size: int, weight: float, collectives: Collectives, num_sources: int = 0
) -> Contrast:
    """The loss over all B x B pairs, from this rank's features of all its rows. All ranks call it together.

    `num_sources`: S, where each source's own share is asked for.
    """
    heads = [head for head in CONTRASTS if head in outputs["image"]]
    with torch.enable_grad():
        features = {
            (name, head): collectives.gather_rows(outputs[name][head].float(), size).requires_grad_()
            for head in heads
            for name in ("image", "text")
        }
        scales = {CONTRASTS[h]: outputs["image"][CONTRASTS[h]].detach().float().requires_grad_() for h in heads}
        image_id = collectives.gather_rows(batch.image_id, size)
        losses = [
            contrastive_loss(features["image", head], features["text", head], scales[CONTRASTS[head]], image_id)
            for head in heads
        ]
        loss = torch.stack(losses).sum() / (len(heads) * size)
        found = torch.autograd.grad(loss * weight, [*features.values(), *scales.values()])
    by_source = None
    if num_sources:
        source = collectives.gather_rows(batch.source, size)
        chosen = [torch.nonzero(source == number).flatten() for number in range(num_sources)]
        by_source = torch.stack([_share(features, scales, image_id, pairs) for pairs in chosen])
    rows = slice(*share(size, collectives.rank, collectives.world_size))
    return Contrast(
        loss=loss.detach(),
        weight=weight,
        gradients={key: g[rows] for key, g in zip(features, found[: len(features)], strict=True)},
        scale_gradients=dict(zip(scales, found[len(features) :], strict=True)),
        image=features["image", "itc"].detach(),
        text=features["text", "itc"].detach(),
        scale=scales["scale"].detach(),
        by_source=by_source,
    )


@torch.no_grad()
def _share(
    features: dict[tuple[str, str], Tensor], scales: dict[str, Tensor], image_id: Tensor, pairs: Tensor
) -> Tensor:
    """(2,) the loss summed over the chosen pairs of the batch, the mean of the contrasts; and the number of pairs."""
    heads = [head for head in CONTRASTS if ("image", head) in features]
    losses = [
        contrastive_loss(features["image", head], features["text", head], scales[CONTRASTS[head]], image_id, pairs)
        for head in heads
    ]
    return torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(float(len(pairs)))])
