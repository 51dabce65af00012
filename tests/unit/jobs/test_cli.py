"""The command line: fast and complete help, local paths, plain results, and errors that are printed verbatim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from jobs import cli
from jobs.cli import app
from jobs.console import echo, local_file, notify, print_result
from pipeline.config.errors import RunFailed


def commands() -> Iterator[tuple[str, Any]]:
    pending = [("mome", get_command(app))]
    while pending:
        path, command = pending.pop()
        pending += [(f"{path} {name}", inner) for name, inner in getattr(command, "commands", {}).items()]
        yield path, command


# ---- help


def test_every_command_and_parameter_has_a_help_text_without_markup() -> None:
    """Rich would drop `[word …]`."""
    texts = {}
    for path, command in commands():
        texts[path] = command.help
        texts |= {f"{path} {parameter.name}": getattr(parameter, "help", None) for parameter in command.params}
    assert len(texts) > 100
    assert [path for path, text in texts.items() if not text] == []
    wrong = [path for path, text in texts.items() if Text.from_markup(text).plain != text.replace("\\[", "[")]
    assert not wrong, "write \\[ for a bracket"


HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "numpy", "yaml", "botocore", "pyarrow")


def test_help_imports_no_heavy_library() -> None:
    program = (
        "import sys; from jobs.cli import app\n"
        "for command in ([], ['shards'], ['bench'], ['jobs'], ['train']):\n"
        "    app([*command, '--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("mome ")


# ---- local paths: pathlib would create a folder named `s3:` for a URL


def test_every_path_argument_is_parsed_as_a_local_file() -> None:
    described = [parameter.type_descriptor for _, command in commands() for parameter in command.params
                 if hasattr(parameter, "type_descriptor")]  # fmt: skip
    paths = [each.parameter_info for each in described if "Path" in str(each.annotation)]
    assert len(paths) > 15
    assert all(info.parser is local_file for info in paths)


@pytest.mark.parametrize("value", ["s3://bucket/page.html", "s3:/bucket/page.html", "${SCRATCH}/page.html", "file:/x"])
@pytest.mark.parametrize("command", [["report", "run", "--out"], ["train"]])
def test_url_is_rejected_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, value])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def test_local_paths_are_accepted() -> None:
    assert local_file("~/x") == Path.home() / "x"
    assert local_file("file:///a/b") == Path("/a/b")
    assert local_file("a/b") == Path("a/b")


# ---- results and errors

RESULT = {"pairs": 3, "mlm": {"accuracy": 0.123456, "accuracy_text_only": None}, "stages": ["a", "b"]}


@pytest.mark.parametrize(
    ("as_json", "expected"),
    [(False, "pairs         3\nmlm.accuracy  0.1235\nstages        a, b\n"), (True, json.dumps(RESULT) + "\n")],
)
def test_text_omits_missing_values_and_json_is_complete(
    as_json: bool, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(RESULT, as_json)
    assert capsys.readouterr().out == expected


def test_values_from_data_never_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"caption": "\x1b]52;c;eA==\x07\x9b2J\u202e", "key": "\ud83d\x7f"}
    print_result(hostile, as_json=False)
    echo(hostile["caption"], err=True)
    notify(hostile["caption"])
    shown = "".join(capsys.readouterr())
    assert not set(shown) & set("\x1b\x07\x9b\u202e\x7f\ud83d")
    print_result(hostile, as_json=True)
    assert json.loads(capsys.readouterr().out) == hostile


@pytest.mark.parametrize("message", [r"C:\[/bold]", "[red]", "a [link=http://x]b[/link]", r"\[x]"])
def test_error_text_with_markup_is_printed_verbatim(
    message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RunFailed(message)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: {message}\n"
