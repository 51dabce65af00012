"""Rendering replaces every variable, each of which has a value and an explanation, or fails."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.rendered_infra import EXAMPLE, INFRA, example_settings, render

FILES = sorted([*INFRA.glob("kuberay/*.yaml"), *INFRA.glob("ray/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_example_sets_every_variable(path: Path) -> None:
    assert "${" not in render.render(path, example_settings())


def test_every_setting_of_the_example_is_used_and_explained() -> None:
    """A comment, or another setting explained by the same comment, is directly above."""
    assert set(example_settings()) == set().union(*(render.variables(path) for path in FILES))
    for above, line in itertools.pairwise(EXAMPLE.read_text().splitlines()):
        assert "=" not in line or line.startswith("#") or above.startswith("#") or "=" in above, line


def test_values_replace_their_variables(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("a: ${ONE}\nb: ${TWO}-${ONE}\nc: $RAY_HEAD_IP $(date)\n")
    assert render.render(file, {"ONE": "1", "TWO": "2", "THREE": "3"}) == "a: 1\nb: 2-1\nc: $RAY_HEAD_IP $(date)\n"


@pytest.mark.parametrize(
    ("settings", "arguments", "status", "out", "error"),
    [
        ("ONE=1", [], 2, "", "no value for TWO"),
        ("ONE=1\nTWO=", [], 2, "", "no value for TWO"),
        ("# mine\n\nONE=1\nTWO=2", ["ONE=3"], 0, "a: 3\nb: 2\n", ""),
    ],
)
def test_arguments_override_settings_and_missing_values_are_named(
    settings: str,
    arguments: list[str],
    status: int,
    out: str,
    error: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, env = tmp_path / "file.yaml", tmp_path / "my.env"
    file.write_text("a: ${ONE}\nb: ${TWO}\n")
    env.write_text(settings)
    assert render.main([str(file), str(env), *arguments]) == status
    output = capsys.readouterr()
    assert output.out == out
    assert error in output.err


@pytest.mark.parametrize("line", ["export ONE=1", "ONE", "one=1"])
def test_an_invalid_setting_is_rejected_with_its_line(line: str) -> None:
    with pytest.raises(render.SettingsError, match=r"my\.env, line 2"):
        render.read_settings(f"TWO=2\n{line}\n", "my.env")
