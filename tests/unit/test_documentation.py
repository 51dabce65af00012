"""The guides match the code: commands and options exist, links and named functions resolve, the README stays short."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs.cli import app

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted(
    [*ROOT.glob("*.md"), *(path for f in ("pipeline", "jobs", "infra", "tests") for path in ROOT.glob(f"{f}/**/*.md"))]
)
WALKED = re.compile(r"\| `([\w/]+\.py)`: `([\w.]+)` \|")


def test_readme_is_short_and_walked_functions_exist() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
    walked = WALKED.findall((ROOT / "pipeline/README.md").read_text(encoding="utf-8"))
    assert len(walked) > 30
    for file, name in walked:
        nodes: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            matches = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
            assert matches, f"{file}: {name}"
            nodes = matches[0].body


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve_and_commands_and_options_exist(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (guide.parent / link).exists(), link
    if guide.name == "CHANGELOG.md":  # names commands of earlier versions
        return
    joined = re.sub(r"\\\n +", "", text)  # continued lines
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", text)
    for line in (line.split("  #")[0].removeprefix(".venv/bin/") for line in lines):
        if not re.match(r"mome [a-z]", line):
            continue
        command: Any = typer.main.get_command(app)
        rest = shlex.split(line.replace("|", " "))[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            command = command.commands.get(rest.pop(0))
            assert command is not None, line
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.split("=")[0].strip("[]…") for word in rest if re.match(r"\[?--\w", word)}
        assert options <= known | {"--help"}, line
