"""The registry contains every objective module, and its declarations validate the configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import SourceType, objective_names
from pipeline.objectives import (
    SOURCE_INPUTS,
    check_objectives,
    evaluated_source_types,
    evaluation_tasks,
    objective_type,
)

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


@pytest.mark.parametrize("name", objective_names())
def test_every_module_registers_an_objective(name: str) -> None:
    objective = objective_type(name)
    assert objective.__module__ == f"pipeline.objectives.{name}"
    assert objective.source_types


def test_schema_knows_the_objectives_without_importing_torch() -> None:
    code = "import sys, pipeline.config.schema as s; assert s.objective_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.language.objectives={mim: {}}", "mim needs sources of type images or pairs"),
        ("stages.vision_language.objectives={itm: {}}", "add itc, or set negatives: random"),
        ("stages.vision_language.objectives={wpa: {}}", "add itm and set negatives: random"),
        ("stages.vision.image_target=visual_tokens", "image_tokenizer: required"),
        ("evaluation.source=pictures", "expected a source of type pairs, labelled"),
    ],
)
def test_unsupported_objective_is_rejected(override: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        check_objectives(load_config(DEMO, [override]))


def test_evaluations_are_derived_from_the_objectives() -> None:
    assert evaluated_source_types() == ("pairs", "labelled", "questions", "statements")
    stage = load_config(DEMO).stage_named("vision_language")
    assert evaluation_tasks(stage, "pairs") == {"retrieval", "matching", "mlm"}
    assert evaluation_tasks(stage, "labelled") == {"zero_shot"}
    assert not evaluation_tasks(stage, "questions")


def test_every_source_type_states_its_inputs() -> None:
    assert SOURCE_INPUTS.keys() == set(get_args(SourceType))
