"""Sizes of a published model that follow from its tensors, and those that no tensor tells and that are assumed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.errors import CheckpointError

log = logging.getLogger(__name__)

HEAD_WIDTH = 64  # of nearly every published model


def layer_count(names: Iterable[str], pattern: str) -> int:
    """Return how many layers there are; `pattern` finds a layer's number at the beginning of a name.

    Raises CheckpointError unless they are numbered from 0 without a gap.
    """
    layers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if gaps := [number for number in range(len(layers)) if number not in layers]:
        raise CheckpointError(f"the checkpoint has {len(layers)} layers, but none numbered {gaps[0]}; it is not whole")
    return len(layers)


def assumed(key: str, value: int, reason: str, given: Mapping[str, Any]) -> int:
    """Return `value` for a key that no tensor tells, and say so unless the key was given."""
    if key not in given:
        log.warning("%s=%s assumed (%s); give %s=N if that is wrong", key, value, reason, key)
    return value


def assumed_heads(width: int, given: Mapping[str, Any]) -> int:
    """Return the number of attention heads of a model whose tensors do not tell it."""
    return assumed("heads", max(1, width // HEAD_WIDTH), f"width/{HEAD_WIDTH}", given)
