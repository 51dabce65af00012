"""Quirks of VLMo's released code that runs with `reproduce_vlmo_release` reproduce.

    in the release                                                                      by default
    ITC: features get 1 / world size of their gradient, because the gather detaches     the whole gradient (C2)
      other ranks and DDP averages; the logit scales get theirs whole
    MLM on pairs: the loss has a factor 1/4 besides its weight                          the weight alone
    logit scales: their clamp is commented out                                          at most 100
    weight decay: parameters are exempted by substrings of their names, which miss      matrices decay, nothing else
      the experts' norms, gammas, logit scales, [CLS] and absolute positions, and
      match the relative position table

The gradient of such a run depends on its world size, so that contract C2 does not hold.

Not reproduced: equal images may be each other's negatives; negatives are drawn from one micro-batch of all ranks only;
the MLM collator skips words that exceed the rest of its token budget (which masks words of several tokens less often)
and counts padding; RandAugment's AutoContrast and Sharpness overflow uint8; transformers' AdamW adds epsilon before the
bias correction of the second moment (a factor 1 / sqrt(1 - beta2^t): 7 at step 1, 1.00 from step 300); retrieval
scores by the first contrast alone (here the mean of both, unless `model.contrasts` is 1).
"""

from dataclasses import replace

from pipeline.config.schema import SourceType
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.objectives.itc import Contrast

MLM_FACTOR = 0.25
NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")


def factor(objective: str, source_type: SourceType) -> float:
    """Return the factor by which the release multiplies a loss besides its weight."""
    return MLM_FACTOR if (objective, source_type) == ("mlm", "pairs") else 1.0


def scale_gradients(contrast: Contrast, world_size: int) -> Contrast:
    """Return the contrast with the feature gradients that remain after the release's gather and DDP."""
    return replace(contrast, gradients={key: g / world_size for key, g in contrast.gradients.items()})


def decays(name: str) -> bool:
    """Return True if the release decays the parameter; names that the release does not have are matched as they are."""
    name = "".join(FORMATS["vlmo"].names(name)) or name
    return not any(part in name for part in NO_DECAY)
