"""Untrusted text is printed without control characters, and logs contain no secrets."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pipeline.config.redaction import printable

HOSTILE = {
    "clear screen": "\x1b[2J",
    "clipboard (OSC 52)": "\x1b]52;c;ZXZpbA==\x07",
    "C1 introducer": "\x9b2J",
    "bidirectional override": "abc\u202egpj.exe",
    "isolate": "\u2066x\u2069",
    "carriage return": "all is well\rerror",
    "backspace": "no\b\bok",
    "delete": "a\x7f",
    "lone surrogate": "cat \ud83d",
    "line separator": "a\u2028b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_control_characters_are_escaped(text: str) -> None:
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    shown.encode("utf-8")
    assert "\\" in shown


@pytest.mark.parametrize("text", ["plain", "a\tb\nc", "größe 猫 🐈", "عربى \u200f", "[bold]\\[/bold]"])
def test_text_without_control_characters_is_unchanged(text: str) -> None:
    assert printable(text) == text


def test_messages_and_tracebacks_of_any_handler_are_printable() -> None:
    program = (
        "import logging, sys\n"
        "from pipeline.config.redaction import configure_logging\n"
        "configure_logging()\n"
        "logging.getLogger('x').warning('key %s', '\\x1b[2J')\n"
        "try:\n    raise ValueError('\\x1b]52;c;\\x07')\n"
        "except ValueError:\n    logging.getLogger('x').exception('failed')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"\x1b" not in finished.stderr
    assert b"key \\u001b[2J" in finished.stderr
    assert b"ValueError: \\u001b]52;c;\\u0007" in finished.stderr


def test_messages_and_tracebacks_of_any_handler_hold_no_secret() -> None:
    program = (
        "import logging\n"
        "from pipeline.config.redaction import configure_logging\n"
        "configure_logging()\n"
        "logging.getLogger('x').warning('at %s', 'http://me:hunter2@server/')\n"
        "try:\n    raise ValueError('postgresql://me:a/hunter2@db/x')\n"
        "except ValueError:\n    logging.getLogger('x').exception('failed')\n"
        "raise RuntimeError('https://me:hunter2@other')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert finished.returncode == 1
    assert b"at http://server/" in finished.stderr
    assert b"RuntimeError: https://other" in finished.stderr
    assert b"hunter2" not in finished.stderr
