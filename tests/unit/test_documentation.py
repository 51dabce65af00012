"""The guides match the code: commands and options exist, links and named functions resolve, the README stays short."""

from __future__ import annotations

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
MOME: Any = typer.main.get_command(app)
WALKED = re.compile(r"\| `([\w/]+\.py)`: `([\w.]+)` \|")


def test_readme_has_at_most_1200_words() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(guide: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", guide.read_text(encoding="utf-8")):
        assert "://" in link or (guide.parent / link).exists(), link


def test_walked_functions_exist() -> None:
    walked = WALKED.findall((ROOT / "pipeline/README.md").read_text(encoding="utf-8"))
    assert len(walked) > 30
    for file, name in walked:
        nodes: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            matches = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
            assert matches, f"{file}: {name}"
            nodes = matches[0].body


def commands_of(guide: Path) -> list[list[str]]:
    """Return the words of every `mome …` command in code blocks and inline code, without comments."""
    text = guide.read_text(encoding="utf-8")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", text)
    commands = [line.split("  #")[0].removeprefix(".venv/bin/") for line in lines]
    return [shlex.split(line.replace("|", " ")) for line in commands if re.match(r"mome [a-z]", line)]


@pytest.mark.parametrize(
    "guide", [guide for guide in GUIDES if guide.name != "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_and_options_exist(guide: Path) -> None:
    for words in commands_of(guide):
        command = MOME
        rest = words[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            subcommand = command.commands.get(rest.pop(0))
            assert subcommand is not None, words
            command = subcommand
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help"}
        options = {word.split("=")[0].strip("[]…") for word in rest if re.match(r"\[?--\w", word)}
        assert options <= known, (words, options - known)
