"""`mome objectives`: the table is what the models say, and a trial that learns nothing is told."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.objectives import as_text, objectives
from pipeline.config.model import MODEL_SECTIONS
from pipeline.config.schema import Objective
from pipeline.training.collectives import Collectives
from pipeline.training.trial import Cell, Trial, cells


def test_the_table_holds_every_cell_and_nothing_else() -> None:
    told = CliRunner().invoke(app, ["objectives", "--json"])
    assert told.exit_code == 0, told.output
    table = json.loads(told.stdout.splitlines()[-1])["objectives"]
    assert list(table) == list(get_args(Objective))
    listed = {(objective, kind, use) for objective, row in table.items() for kind, uses in row.items() for use in uses}
    assert listed == {(cell.objective, cell.kind, cell.use) for cell in cells()}


def test_the_text_has_a_column_for_each_kind_and_a_line_for_each_objective() -> None:
    lines = as_text(objectives(False, lambda message: None)).splitlines()
    assert lines[0].split() == ["objective", *MODEL_SECTIONS]
    assert [line.split()[0] for line in lines[1:]] == list(get_args(Objective))
    assert next(line for line in lines if line.startswith("reasoning")).split()[1:] == ["statements"] * 2 + ["·"] * 3


def test_a_trial_that_learnt_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(cell: Cell, collectives: Collectives) -> Trial:
        return Trial(cell, [4.0, 3.9 if cell.kind == "vit" else 0.1])

    monkeypatch.setattr("jobs.objectives.train", stuck)
    found = objectives(True, lambda message: None)
    assert len(found["trials"]) == len(list(cells()))
    assert all(trial["is_learnt"] == (trial["kind"] != "vit") for trial in found["trials"])
    stated = [line for line in as_text(found).splitlines() if line.endswith("not learnt")]
    assert len(stated) == sum(not trial["is_learnt"] for trial in found["trials"])
