"""`mome objectives`: the table agrees with the models."""

from __future__ import annotations

import json
from typing import get_args

from typer.testing import CliRunner

from jobs.cli import app
from jobs.objectives import as_text, objectives
from pipeline.config.schema import MODEL_SECTIONS, Objective
from tests.support.trial import cells


def test_table_holds_every_trainable_combination() -> None:
    result = CliRunner().invoke(app, ["objectives", "--json"])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout.splitlines()[-1])["objectives"]
    assert list(table) == list(get_args(Objective))
    listed = {
        (objective, kind, source_type)
        for objective, row in table.items()
        for kind, source_types in row.items()
        for source_type in source_types
    }
    assert listed == {(cell.objective, cell.kind, cell.source_type) for cell in cells()}


def test_text_has_a_column_per_kind_and_a_line_per_objective() -> None:
    lines = as_text(objectives()).splitlines()
    assert lines[0].split() == ["objective", *MODEL_SECTIONS]
    assert [line.split()[0] for line in lines[1:]] == list(get_args(Objective))
    assert next(line for line in lines if line.startswith("nlvr2")).split()[1:] == ["statements"] * 2 + ["·"] * 3
