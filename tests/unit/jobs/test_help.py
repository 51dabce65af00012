"""Help texts reach the terminal whole: rich takes `[word …]` for markup and drops it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text
from typer.main import get_command

from jobs.cli import app


def help_texts() -> Iterator[tuple[str, str]]:
    pending = [("mome", get_command(app))]
    while pending:
        path, command = pending.pop()
        pending += [(f"{path} {name}", each) for name, each in getattr(command, "commands", {}).items()]
        texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
        yield from ((path, text) for text in texts if text)


def test_no_part_of_a_help_text_is_taken_for_markup() -> None:
    texts = list(help_texts())
    assert len(texts) > 100
    eaten = [(command, text) for command, text in texts if Text.from_markup(text).plain != text.replace("\\[", "[")]
    assert not eaten, "write \\[ for a bracket"
