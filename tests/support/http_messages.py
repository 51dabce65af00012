"""Reading and writing of HTTP/1.x messages: headers unchanged, bodies by their framing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

CHUNK = 2**16
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Head:
    """The start line and headers of a request or a response."""

    start: str
    headers: list[tuple[str, str]] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def set(self, name: str, value: str | None) -> None:
        """Replace the value of a header in its position; None removes it."""
        kept = [(key, value if key.lower() == name else old) for key, old in self.headers]
        self.headers = [(key, new) for key, new in kept if new is not None]

    @property
    def length(self) -> int:
        return int(self.get("content-length") or 0)

    @property
    def is_chunked(self) -> bool:
        return (self.get("transfer-encoding") or "").lower() == "chunked"

    def encode(self) -> bytes:
        lines = [self.start, *(f"{key}: {value}" for key, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def ask(store: Streams, request: Head, body: AsyncIterator[bytes]) -> Head | None:
    """Forward a request and return the head of the response, or None if the store closed the connection."""
    reader, writer = store
    writer.write(request.encode())
    async for piece in body:
        writer.write(piece)
        await writer.drain()
    answer = await read_head(reader)
    while answer is not None and answer.start.split()[1] == "100":
        answer = await read_head(reader)
    return answer


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Return the next head, or None if the other side has closed the connection."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    except asyncio.IncompleteReadError:
        return None
    return Head(lines[0], [(key, value.strip()) for key, _, value in (line.partition(":") for line in lines[1:])])


async def read_body(reader: asyncio.StreamReader, head: Head, until_closed: bool = False) -> AsyncIterator[bytes]:
    """Yield the body as transmitted, including chunk framing."""
    while until_closed and (piece := await reader.read(CHUNK)):
        yield piece
    if head.is_chunked:
        size = -1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    remaining = head.length
    while remaining:
        piece = await reader.read(min(remaining, CHUNK))
        if not piece:
            raise asyncio.IncompleteReadError(b"", remaining)
        remaining -= len(piece)
        yield piece


async def no_body() -> AsyncIterator[bytes]:
    return
    yield b""
