"""The error measure of contract C2 that the gradient tests use."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.gradients import TOLERANCE, relative_errors


def test_error_equals_the_tolerance_where_c2_is_just_met() -> None:
    expected = {"large": torch.full((4,), 3.0), "small": torch.full((2,), 1e-6)}
    total = math.sqrt(4 * 9.0 + 2 * 1e-12)
    allowed = 1e-5 * math.sqrt(2) * 1e-6 + 1e-7 * total
    gradients = {"large": expected["large"], "small": expected["small"].double() + allowed / math.sqrt(2)}
    errors = relative_errors(expected, gradients)
    assert errors["large"] == 0
    assert errors["small"] == pytest.approx(TOLERANCE, rel=1e-4)


def test_missing_extra_or_misshapen_gradient_is_infinite_error() -> None:
    expected = {"a": torch.ones(3), "b": torch.ones(3)}
    errors = relative_errors(expected, {"b": torch.ones(4), "c": torch.ones(1)})
    assert errors == {"a": math.inf, "b": math.inf, "c": math.inf}
