"""Word-patch alignment (WPA): optimal transport of words to image patches (UNITER, ViLT).

The transport plan comes from IPOT (arXiv 1802.04307), an inexact proximal point method: `OUTER` steps of a
Sinkhorn-like scaling. Everything is float32, also under autocast. Padding is excluded by masks instead of large costs:
a caption without words, or an image without patches, costs nothing (the published code divides by zero).

Shapes: n examples, L words, P patches, D width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.batch import Batch
from pipeline.models.forward import ForwardOutput
from pipeline.objectives import Objective
from pipeline.objectives.itm import matched_examples

BETA = 0.5  # proximal step: costs are divided by it
OUTER = 50  # steps of one iteration each
NORM_EPSILON = 1e-5  # smallest norm a feature is divided by


def wpa_cost(words: Tensor, patches: Tensor) -> Tensor:
    """Return 1 - cosine of every word (n, L, D) with every patch (n, P, D): (n, L, P) float32."""
    with torch.autocast(words.device.type, enabled=False):
        unit_words, unit_patches = (F.normalize(x.float(), dim=-1, eps=NORM_EPSILON) for x in (words, patches))
        return 1 - unit_words @ unit_patches.transpose(1, 2)


@torch.no_grad()
def wpa_plan(cost: Tensor, words_keep: Tensor, patches_keep: Tensor, outer: int = OUTER) -> Tensor:
    """Return the transport plan for costs (n, L, P), without gradient: (n, L, P) float32 that sums to 1 per example.

    It is 0 where words_keep (n, L) or patches_keep (n, P) is False: at [CLS], [SEP] and padding.
    """
    with torch.autocast(cost.device.type, enabled=False):
        is_kept = words_keep[:, :, None] & patches_keep[:, None, :]
        kernel = torch.exp(-cost.float() / BETA) * is_kept
        num_words = words_keep.sum(dim=1, keepdim=True).clamp(min=1).float()
        num_patches = patches_keep.sum(dim=1, keepdim=True).clamp(min=1).float()
        plan = is_kept.float()
        word_scale = words_keep / num_words
        for _ in range(outer):
            step = kernel * plan
            mass = num_patches * torch.einsum("blp, bl -> bp", step, word_scale)
            patch_scale = torch.where(patches_keep & (mass > 0), 1 / mass.where(mass > 0, 1), 0)
            mass = num_words * torch.einsum("blp, bp -> bl", step, patch_scale)
            word_scale = torch.where(words_keep & (mass > 0), 1 / mass.where(mass > 0, 1), 0)
            plan = word_scale[:, :, None] * step * patch_scale[:, None, :]
        return plan


def wpa_loss(words: Tensor, patches: Tensor, words_keep: Tensor, patches_keep: Tensor, matched: Tensor) -> Tensor:
    """Return the distances of matched pairs (n,) minus those of mismatched ones, summed (ViLT, section 3.2)."""
    cost = wpa_cost(words, patches)
    distance = (cost * wpa_plan(cost.detach(), words_keep, patches_keep)).sum(dim=(1, 2))
    return torch.where(matched, distance, -distance).sum()


class WPA(Objective):
    """Alignment over the pairs that ITM reads with random negatives: matched pairs are pulled together (ViLT)."""

    source_types = frozenset({"pairs"})
    head = "alignment"

    @staticmethod
    def faults(config: RunConfig, stage: StageConfig) -> Iterator[str]:
        objectives = stage.objectives
        if "itm" not in objectives or stage.negatives != "random":
            yield "objectives: wpa reads the random negatives of itm; add itm and set negatives: random"
        elif objectives["wpa"].every != objectives["itm"].every:
            yield "objectives: wpa reads the examples that itm reads; set the same `every` for both"

    def loss(self, outputs: ForwardOutput, examples: Batch) -> Tensor:
        aligned = {name: outputs["pair"][name] for name in ("words", "patches", "words_keep", "patches_keep")}
        return wpa_loss(**aligned, matched=matched_examples(examples, self.stage).to(aligned["words"].device))
