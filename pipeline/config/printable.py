"""Text from data made safe to print: no caption, key or error text may control the reader's terminal."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType
from typing import Any

from pipeline.config.redaction import redact

# C0 and C1 controls except newline and tab, DEL, line separators, bidirectional overrides and isolates, and lone
# surrogates, which no UTF-8 stream can take.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with every character that could control a terminal written as JSON writes it, such as `\u001b`."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


class _PrintableRecord(logging.LogRecord):
    """A log record whose message and traceback are printable and hold no secret, whichever handler writes them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = printable(redact("".join(traceback.format_exception(*self.exc_info)).rstrip("\n")))

    def getMessage(self) -> str:
        return printable(redact(super().getMessage()))


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that ends the process, as `sys.excepthook`, printable and without secrets."""
    sys.stderr.write(printable(redact("".join(traceback.format_exception(kind, error, trace)))))


def configure_logging() -> None:
    """Log warnings, and what ends this process, to standard error, printable and without secrets.

    Call it once, where a process starts.
    """
    sys.excepthook = show_exception
    logging.setLogRecordFactory(_PrintableRecord)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
