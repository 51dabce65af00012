"""Comparison of gradients with a reference (contract C2)."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5  # largest allowed error, as defined by `relative_errors`


def relative_errors(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Return |g - g*| / (|g*| + 0.01 |all g*|) of each parameter; infinite for a missing or misshapen gradient.

    A value of at most 1e-5 is contract C2's |g - g*| <= 1e-5 |g*| + 1e-7 |all g*|.
    """
    everything = torch.stack([g.double().norm() for g in expected.values()]).norm()
    errors = {}
    for name, gradient in expected.items():
        if name not in got or got[name].shape != gradient.shape:
            errors[name] = float("inf")
            continue
        difference = (got[name].double() - gradient.double()).norm()
        errors[name] = float(difference / (gradient.double().norm() + 0.01 * everything))
    return errors | {name: float("inf") for name in got.keys() - expected.keys()}
