"""What commands print: for people a line a value, for machines one JSON object."""

from __future__ import annotations

import json

import pytest

from jobs.console import print_result

RESULT = {"pairs": 3, "mlm": {"accuracy": 0.123456, "accuracy_text_only": None}, "stages": ["a", "b"]}


def test_people_read_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT, as_json=False)
    assert capsys.readouterr().out == "pairs         3\nmlm.accuracy  0.1235\nstages        a, b\n"


def test_machines_read_everything_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == RESULT
