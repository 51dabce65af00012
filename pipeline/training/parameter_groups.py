"""Which parameters decay, and which are a head's: the groups that every engine's AdamW steps."""

from __future__ import annotations

from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.schema import OptimizerConfig
from pipeline.models.model import Model
from pipeline.training import release


def parameter_groups(
    model: Model, config: OptimizerConfig, reproduce_vlmo_release: bool = False
) -> list[dict[str, Any]]:
    """Trainable parameters by two questions: does it decay, and is it a head's, with a learning rate of its own.

    Matrices decay; biases, norms, gammas, scales and embeddings' rows do not. They are told by their number of
    dimensions: a list of names, as with `reproduce_vlmo_release`, misses the experts' norms. The
    pooler is no head here: it comes from pretraining, and the published recipes give it the plain rate.
    """
    heads = set(model.HEAD_PARTS) - {"pooler"}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = release.decays(name) if reproduce_vlmo_release else parameter.dim() >= 2
            is_head = config.head_lr_multiplier != 1 and model.part_of(name) in heads
            fresh = {
                "params": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "rate_factor": config.head_lr_multiplier if is_head else 1.0,
            }
            groups.setdefault((decays, is_head), fresh)["params"].append(parameter)
    if not groups:
        raise ConfigError("no parameter is left to train: the stage's `freeze` covers all that its objectives use")
    return [groups[key] for key in sorted(groups, reverse=True)]
