"""What the gradient table says of a cell; the cells themselves are run by tests/integration/test_world_size.py."""

from __future__ import annotations

import math

import pytest
import torch

from jobs.bench.gradients import LAYOUTS, SHARDINGS, TOLERANCE, as_text, relative_errors, table_config


def test_relative_error_is_one_tolerance_where_c2_is_just_met() -> None:
    expected = {"large": torch.full((4,), 3.0), "small": torch.full((2,), 1e-6)}
    everything = math.sqrt(4 * 9.0 + 2 * 1e-12)
    allowed = 1e-5 * math.sqrt(2) * 1e-6 + 1e-7 * everything
    got = {"large": expected["large"], "small": expected["small"].double() + allowed / math.sqrt(2)}
    errors = relative_errors(expected, got)
    assert errors["large"] == 0
    assert errors["small"] == pytest.approx(TOLERANCE, rel=1e-4)


def test_a_gradient_that_is_missing_or_too_many_or_of_another_shape_is_infinitely_wrong() -> None:
    expected = {"a": torch.ones(3), "b": torch.ones(3)}
    errors = relative_errors(expected, {"b": torch.ones(4), "c": torch.ones(1)})
    assert errors == {"a": math.inf, "b": math.inf, "c": math.inf}


def test_every_cell_is_a_run_that_the_schema_allows_and_has_a_name_of_its_own() -> None:
    for layout in LAYOUTS:
        for sharding in SHARDINGS:
            table_config(
                micro_batch=layout.micro_batch,
                zero_stage=sharding.zero_stage,
                offload_optimizer=sharding.offload_optimizer,
                offload_parameters=sharding.offload_parameters,
            )
    names = [str(layout) for layout in LAYOUTS]
    assert names == ["1x48x1", "2x24x1", "2x8x3", "4x6x2", "3x16x1", "5x10x1"]
    assert len(set(map(str, SHARDINGS))) == len(SHARDINGS) == 8


def test_the_table_says_when_a_cell_is_beyond_the_tolerance() -> None:
    cells = [{"layout": "1x48x1", "sharding": "ZeRO 0", "error": 2e-5, "parameter": "w"}]
    parameters = {"w": {"error": 2e-5, "cell": "1x48x1 ZeRO 0"}}
    told = as_text({"cells": cells, "parameters": parameters, "is_within": False, "tolerance": TOLERANCE})
    assert "ZeRO 0  2.0e-05" in told
    assert "NOT all within 1e-05" in told
