"""`mome --help`: fast to start, complete, and free of rich markup (rich would drop `[word …]`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from jobs.cli import app


def commands() -> Iterator[tuple[str, Any]]:
    pending = [("mome", get_command(app))]
    while pending:
        path, command = pending.pop()
        pending += [(f"{path} {name}", inner) for name, inner in getattr(command, "commands", {}).items()]
        yield path, command


def test_help_texts_contain_no_markup() -> None:
    texts = [
        (path, text)
        for path, command in commands()
        for text in (command.help, *(getattr(parameter, "help", None) for parameter in command.params))
        if text
    ]
    assert len(texts) > 100
    wrong = [(path, text) for path, text in texts if Text.from_markup(text).plain != text.replace("\\[", "[")]
    assert not wrong, "write \\[ for a bracket"


def test_every_command_and_parameter_has_a_help_text() -> None:
    for path, command in commands():
        assert command.help, path
        missing = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
        assert not missing, f"{path}: {missing}"


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
