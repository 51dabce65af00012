"""The registry contains every objective module, and its declarations validate the configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pipeline import objectives
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from pipeline.config.schema import SourceType, objective_names

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


def test_every_module_registers_an_objective_which_the_schema_knows_without_torch() -> None:
    for name in objective_names():
        objective = objectives.objective_type(name)
        assert objective.__module__ == f"pipeline.objectives.{name}"
        assert objective.source_types
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
        objectives.check_objectives(load_config(DEMO, [override]))


def test_evaluations_and_inputs_are_derived_from_source_types() -> None:
    assert objectives.SOURCE_INPUTS.keys() == set(get_args(SourceType))
    assert objectives.evaluated_source_types() == ("pairs", "labelled", "questions", "statements")
    stage = load_config(DEMO).stage_named("vision_language")
    expected = {"pairs": {"retrieval", "matching", "mlm"}, "labelled": {"zero_shot"}, "questions": set()}
    for source_type, tasks in expected.items():
        assert objectives.evaluation_tasks(stage, source_type) == tasks
