"""Deviations of VLMo's release from its paper, reproduced when `reproduce_vlmo_release` is set.

Four quirks, all from one switch, `RunConfig.reproduce_vlmo_release`; without it a run does what the second column says:

    the release                                                                         by default
    contrast: each rank's features get 1 / world size of their gradient, because the    the whole gradient (C2)
      gather cuts it and DDP then averages it; the two scales get theirs whole
    masked words of pairs: their loss counts a quarter, besides any weight given        the weight given
    logit scales: their clamp is commented out                                          at most 100
    weight decay: spared by pieces of names, which miss the experts' norms, gammas,     matrices decay, nothing else
      logit scales, [CLS] and absolute positions, and hit the relative table

Words to mask are chosen by `pipeline.data.examples.masking` in reproduce_vlmo_release runs too: the release's
collator skips words
that exceed what is left of its budget of tokens, which masks words of several pieces less often, and counts padding.

The gradient of such a run depends on its world size, so contract C2 does not hold for it. That the release lets equal
pictures be each other's negatives, and draws negatives from a micro-batch's ranks only, is not reproduced.

Nor are three differences that no setting removes:

    RandAugment: AutoContrast and Sharpness of the release overflow uint8, so that bright pixels turn dark; ours clip
    AdamW: transformers' adds epsilon before it corrects the second moment's bias, so that epsilon is larger by
      1 / sqrt(1 - beta2^t), 7 times at the first step and 1.00 from step 300 on; ours, torch's, adds it after
    retrieval: the release scores by the first contrast alone; ours by the mean of both where a model has two
      (`model.contrasts: 1`, as fine-tuned for retrieval, scores by the first)
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.schema import Objective, SourceType
from pipeline.models.checkpoints.vlmo import published_name
from pipeline.training.contrast import Contrast

MASKED_LANGUAGE_FACTOR = 0.25
NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")


def factor(objective: Objective, source_type: SourceType) -> float:
    """What the release multiplies a loss by, besides the weight that a config gives it."""
    return MASKED_LANGUAGE_FACTOR if (objective, source_type) == ("mlm", "pairs") else 1.0


def cut(contrast: Contrast, world_size: int) -> Contrast:
    """The contrast with the gradient that the release's gather and DDP leave of it."""
    return replace(contrast, gradients={key: g / world_size for key, g in contrast.gradients.items()})


def decays(name: str) -> bool:
    """Whether the release decays one of our parameters. Ours that it has not go by our own names."""
    published = published_name(name)
    return not any(piece in (published or name) for piece in NO_DECAY)
