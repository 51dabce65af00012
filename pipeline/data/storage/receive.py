"""Reading over a connection that breaks: what came is kept, and only the rest is asked for again."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from pipeline.data.storage.faults import Fault
from pipeline.data.storage.retry import Retry


@dataclass(frozen=True)
class Answer:
    """The end (exclusive) of the bytes an answer brings, the version they belong to, and they themselves, as they come.

    `pieces` may raise a Fault between two pieces; closing it ends the connection.
    """

    stop: int
    etag: str | None
    pieces: Generator[bytes, None, None]


Ask = Callable[[int, int | None, str | None], Answer]


def receive(ask: Ask, url: str, start: int, stop: int | None, etag: str | None, retry: Retry) -> bytes:
    """The bytes [start, stop), all of one version; `stop` None: to the end.

    `ask(start, stop, etag)` begins one answer, or raises. With `etag` it must refuse any other version.
    """
    received, at = io.BytesIO(), start
    patience = retry.patience(url)
    while stop is None or at < stop:
        try:
            answer = ask(at, stop, etag)
            stop, etag = answer.stop, answer.etag
            with closing(answer.pieces) as pieces:
                for piece in pieces:
                    if at + len(piece) > stop:
                        raise Fault(f"more than the bytes up to {stop} came")
                    received.write(piece)
                    at += len(piece)
                    patience.received(len(piece))
            if at != stop:
                raise Fault(f"the body ended at byte {at} and not at {stop}")
        except Exception as error:
            patience.wait(error)
    return received.getvalue()
