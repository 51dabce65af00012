"""Commands print one value per line as text, or one JSON object with --json."""

from __future__ import annotations

import json

import pytest

from jobs import cli
from jobs.console import echo, notify, print_result
from pipeline.config.errors import RunFailed

RESULT = {"pairs": 3, "mlm": {"accuracy": 0.123456, "accuracy_text_only": None}, "stages": ["a", "b"]}


def test_text_output_omits_missing_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT, as_json=False)
    assert capsys.readouterr().out == "pairs         3\nmlm.accuracy  0.1235\nstages        a, b\n"


def test_json_output_is_complete_and_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == RESULT


def test_values_from_data_never_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"caption": "\x1b]52;c;eA==\x07\x9b2J\u202e", "key": "\ud83d\x7f"}
    print_result(hostile, as_json=False)
    echo(hostile["caption"], err=True)
    notify(hostile["caption"])
    shown = "".join(capsys.readouterr())
    assert not set(shown) & set("\x1b\x07\x9b\u202e\x7f\ud83d")
    print_result(hostile, as_json=True)
    assert json.loads(capsys.readouterr().out) == hostile


@pytest.mark.parametrize("message", [r"C:\[/bold]", "[red]", "[/]", "a [link=http://x]b[/link]", r"\[x]"])
def test_error_text_with_markup_is_printed_verbatim(
    message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RunFailed(message)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: {message}\n"
