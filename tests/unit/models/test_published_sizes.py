"""The recipes in configs/ have the published model sizes, and all of their stages can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.models import skeleton
from pipeline.training.stages import check_stages

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
BERT_VOCABULARY = 30522
MILLIONS = {"vlmo_base": 176.0, "vlmo_base_plus": 166.9, "vlmo_large": 562.6}  # without task heads, with the pooler
# Rows and columns of the relative table: (2 * 14 - 1)² + 3 + 2 * 196 + 2, layers x heads (unilm#1256 shows base's).
TABLES = {"vlmo_base": (1126, 144), "vlmo_large": (1126, 384)}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    model = skeleton(load_config(CONFIGS / f"{name}.yaml").model, BERT_VOCABULARY)
    heads = set(model.HEAD_PARTS) - {"pooler"}
    count = sum(p.numel() for n, p in model.named_parameters() if model.part_of(n) not in heads)
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=1e-3)


@pytest.mark.parametrize("name", TABLES)
def test_relative_table_has_the_published_shape(name: str) -> None:
    positions = dict(skeleton(load_config(CONFIGS / f"{name}.yaml").model).named_parameters())
    parts = [positions[f"positions.{part}"] for part in ("image", "cross", "text")]
    assert (sum(len(part) for part in parts), parts[0].shape[1]) == TABLES[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_every_stage_can_be_built_in_both_modes(name: str) -> None:
    check_stages(load_config(CONFIGS / f"{name}.yaml"))
    check_stages(load_config(CONFIGS / f"{name}.yaml", ["reproduce_vlmo_release=true"]))
