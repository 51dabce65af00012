"""The learning rate of a step: linear warm-up, then linear or cosine decay (VLMo: linear to 0)."""

from __future__ import annotations

import math

from pipeline.config.schema import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step `step` (from 0) of a stage of `steps` steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    left = max(steps - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / left, 1.0)
    remaining = (1 + math.cos(math.pi * done)) / 2 if config.lr_schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * remaining
