"""Parts of training that do not depend on DeepSpeed: fragments of the state, learning rate and parameter groups."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import OptimizerConfig
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.models.model import Model

NO_DECAY_IN_RELEASE = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")  # parts of names


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len) of the flattened parameter `name`: what checkpoints store (contract C5).

    `values` has its float32 "weight" and, unless the parameter is frozen, Adam's "exp_avg" and "exp_avg_sq" and (if the
    stage keeps one) the moving average "ema": 1-d, on the engine's device, maybe views of what the next step changes.
    """

    name: str
    start: int
    values: dict[str, Tensor]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`: linear warm-up, then decay to `min_lr`.

    The exponential schedule rises from `min_lr` to `lr` by the same factor in every step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    if config.lr_schedule == "exponential":
        return config.min_lr * (config.lr / config.min_lr) ** progress
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def parameter_groups(model: Model, config: OptimizerConfig, reproduce_release: bool = False) -> list[dict[str, Any]]:
    """Group the trainable parameters by whether they decay and whether they belong to a head with its own rate.

    Matrices decay; biases, norms, scales and embedding rows do not. The VLMo release lists names instead. The pooler is
    no head: the published recipes train it at the base rate. Raises ConfigError if no parameter is trainable.
    """
    heads = set(model.HEAD_PARTS) - {"pooler"}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2
            if reproduce_release:
                released_name = "".join(FORMATS["vlmo"].names(name)) or name
                decays = not any(part in released_name for part in NO_DECAY_IN_RELEASE)
            is_head = config.head_lr_multiplier != 1 and model.part_of(name) in heads
            decay, factor = config.weight_decay * decays, config.head_lr_multiplier if is_head else 1.0
            empty_group = {"params": [], "weight_decay": decay, "rate_factor": factor}
            groups.setdefault((decays, is_head), empty_group)["params"].append(parameter)
    if not groups:
        raise ConfigError("no parameter is left to train: the stage's `freeze` covers all that its objectives use")
    return [groups[key] for key in sorted(groups, reverse=True)]
