"""Command-line arguments for local files reject URLs, from which pathlib would create local folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs.cli import app
from jobs.options import local_file


def _parameters(command):
    for inner in getattr(command, "commands", {}).values():
        yield from _parameters(inner)
    yield from command.params


def test_every_path_argument_is_parsed_as_a_local_file():
    parameters = _parameters(typer.main.get_command(app))
    described = [each.type_descriptor for each in parameters if hasattr(each, "type_descriptor")]
    paths = [each.parameter_info for each in described if "Path" in str(each.annotation)]
    assert len(paths) > 15
    assert all(info.parser is local_file for info in paths)


@pytest.mark.parametrize("value", ["s3://bucket/page.html", "s3:/bucket/page.html", "${SCRATCH}/page.html", "file:/x"])
@pytest.mark.parametrize("command", [["report", "run", "--out"], ["shards", "show", "x", "--sheet"], ["train"]])
def test_url_is_rejected_and_nothing_is_written(tmp_path: Path, monkeypatch, command: list[str], value: str):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, value])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def test_local_paths_are_accepted():
    assert local_file("~/x") == Path.home() / "x"
    assert local_file("file:///a/b") == Path("/a/b")
    assert local_file("a/b") == Path("a/b")
