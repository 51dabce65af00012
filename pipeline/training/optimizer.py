"""The optimizer's parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from pipeline.config.errors import ConfigError
from pipeline.config.schema import OptimizerConfig
from pipeline.models.model import Model
from pipeline.training import release


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`: linear warm-up, then decay to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def parameter_groups(
    model: Model, config: OptimizerConfig, reproduce_vlmo_release: bool = False
) -> list[dict[str, Any]]:
    """Group the trainable parameters by whether they decay and whether they belong to a head with its own rate.

    Matrices decay; biases, norms, scales and embedding rows (fewer than two dimensions) do not. The VLMo release lists
    names instead, which misses the experts' norms. The pooler does not count as a head: it comes from pretraining, and
    the published recipes train it at the base rate. Raises ConfigError if no parameter is trainable.
    """
    heads = set(model.HEAD_PARTS) - {"pooler"}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = release.decays(name) if reproduce_vlmo_release else parameter.dim() >= 2
            is_head = config.head_lr_multiplier != 1 and model.part_of(name) in heads
            empty_group = {
                "params": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "rate_factor": config.head_lr_multiplier if is_head else 1.0,
            }
            groups.setdefault((decays, is_head), empty_group)["params"].append(parameter)
    if not groups:
        raise ConfigError("no parameter is left to train: the stage's `freeze` covers all that its objectives use")
    return [groups[key] for key in sorted(groups, reverse=True)]
