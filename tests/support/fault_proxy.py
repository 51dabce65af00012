"""A faulty network between a client and an HTTP store.

    with FaultProxy(endpoint, unavailable=0.02, cut=0.01, latency=0.02, seed=1) as proxy:
        Storage(StorageConfig(endpoint_url=proxy.endpoint, ...)).read(url)
        assert proxy.injected["cut"]

The fault of a request is a function of the seed, the request (method, key and query, range; not the bucket) and how
often it was made before, so neither threads nor timing change it. Headers are forwarded unchanged, `Host` included: a
signature made for the proxy's address is valid at the store.
"""

from __future__ import annotations

import asyncio
import fcntl
import random
import re
import socket
import struct
import termios
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CHUNK = 2**16
SURPLUS = 16  # surplus bytes of a longer body
FAULTS = ("unavailable", "lost", "cut", "short", "stall", "longer", "misplaced")

UNAVAILABLE = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)


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


@dataclass
class Served:
    """One request, and the number of body bytes sent in response."""

    method: str
    target: str
    range: tuple[int, int] | None  # requested [start, stop)
    fault: str | None = None
    status: int = 0
    sent: int = 0

    @property
    def identity(self) -> str:
        """Return the request without the bucket's name."""
        path, _, query = self.target.partition("?")
        return f"{self.method} {'/'.join(path.split('/')[2:])}?{query} {self.range}"


class FaultProxy:
    """An HTTP proxy on a port of 127.0.0.1 (`endpoint`), in a thread of its own while its `with` block runs.

    Each rate is the probability of one of FAULTS; a request meets at most one:
    `unavailable`  503 SlowDown, with Retry-After if `retry_after` gives its seconds; the store is not asked
    `lost`         the store handles the request, and the connection is reset instead of a response
    `cut`          the connection is reset in the middle of a body
    `short`        the connection is closed properly before the body reaches its Content-Length
    `stall`        the connection stays open in the middle of a body, and no more data is sent
    `longer`       the body and its Content-Length are longer than requested
    `misplaced`    Content-Range names another range than requested
    `latency` (seconds) precedes every response. Body faults apply to GET responses with a body, the last two to those
    with a Content-Range.
    """

    def __init__(
        self, upstream: str, *, latency: float = 0.0, retry_after: int | None = None, seed: int = 0, **rates: float
    ):
        assert rates.keys() <= set(FAULTS), rates
        address = urlsplit(upstream)
        self._upstream = (address.hostname or "127.0.0.1", address.port or 80)
        self.rates = dict.fromkeys(FAULTS, 0.0) | rates
        self.latency, self.retry_after, self._seed = latency, retry_after, seed
        self.served: list[Served] = []
        self.injected: Counter[str] = Counter()  # count of each kind; "away": connections broken by an absence
        self.impatient = 0  # requests repeated before their Retry-After had passed
        self._next: deque[tuple[str, str]] = deque()  # kind, of which requests
        self._asked: Counter[str] = Counter()
        self._spared: dict[str, float] = {}  # identity -> time from which it may be repeated
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._connections: set[asyncio.StreamWriter] = set()
        self._leaving: tuple[int, float] | None = None  # requests until then, and for how long
        self._bind(0)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def bytes_sent(self) -> int:
        """Return the number of body bytes sent to clients."""
        return sum(served.sent for served in self.served)

    def inject(self, *kinds: str, of: str = "") -> None:
        """Give the next requests these faults, one each, before any random fault; body faults wait for a body.

        `of`: regular expression of the affected requests, matched against "METHOD target".
        """
        self._next.extend((kind, of) for kind in kinds)

    def away(self, seconds: float, after: int = 0) -> None:
        """Refuse connections for `seconds` and reset open ones: at once, or from the `after`th request on."""
        if after:
            self._leaving = (after, seconds)
        else:
            self._run(self._leave(seconds))

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _bind(self, port: int) -> None:
        """Take the port without listening on it, so that connections are refused."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._port = self._socket.getsockname()[1]

    async def _listen(self, delay: float = 0.0) -> None:
        await asyncio.sleep(delay)
        self._server = await asyncio.start_server(self._serve, sock=self._socket, limit=4 * CHUNK)

    async def _leave(self, seconds: float) -> None:
        # Shut down, not only closed: a forked child may hold the listening socket too.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.injected["away"] += len(self._connections)
        for writer in list(self._connections):
            _reset(writer)
        self._bind(self._port)
        self._return = self._loop.create_task(self._listen(seconds))

    async def _stop(self) -> None:
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server.close()
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # `drain` returns when the kernel has everything
        self._connections.add(writer)
        store = None
        try:
            while (request := await _read_head(reader)) is not None:
                store = store or await asyncio.open_connection(*self._upstream, limit=4 * CHUNK)
                if not await self._relay(request, (reader, writer), store):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side has closed; the other is closed below
        finally:
            self._connections.discard(writer)
            for end in (writer, store and store[1]):
                if end is not None:
                    end.close()

    async def _relay(self, request: Head, client: Streams, store: Streams) -> bool:
        """Forward one request and its response; return False when the connection has ended."""
        reader, writer = client
        method, target, _ = request.start.split(" ", 2)
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", request.get("range") or "")
        served = Served(method, target, (int(requested[1]), int(requested[2]) + 1) if requested else None)
        chance = random.Random(f"{self._seed} {served.identity} {self._asked[served.identity]}")
        self._asked[served.identity] += 1
        self.impatient += self._loop.time() < self._spared.get(served.identity, 0.0)
        fault = None
        if self._next:
            fault = self._take(served) if self._next[0][0] in ("unavailable", "lost") else None
        else:
            drawn = chance.random()
            for kind, rate in self.rates.items():
                if drawn < rate:
                    fault = kind
                    break
                drawn -= rate
        self.served.append(served)
        if self._leaving is not None:
            remaining, seconds = self._leaving
            self._leaving = (remaining - 1, seconds) if remaining > 1 else None
            if self._leaving is None:
                await self._leave(seconds)
                return False
        if request.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.set("expect", None)  # not covered by the signature
        body = _read_body(reader, request)
        await asyncio.sleep(self.latency)
        if fault == "unavailable":
            async for _ in body:
                pass
            self.injected["unavailable"] += 1
            served.fault, served.status = "unavailable", 503
            text = UNAVAILABLE if method != "HEAD" else b""
            refusal = Head("HTTP/1.1 503 Slow Down", [("Content-Type", "application/xml")])
            refusal.headers.append(("Content-Length", str(len(text))))
            if self.retry_after is not None:
                refusal.headers.append(("Retry-After", str(self.retry_after)))
                self._spared[served.identity] = self._loop.time() + self.retry_after
            writer.write(refusal.encode() + text)
            await writer.drain()
            return True
        store[1].write(request.encode())
        async for piece in body:
            store[1].write(piece)
            await store[1].drain()
        answer = await _read_head(store[0])
        while answer is not None and answer.start.split()[1] == "100":
            answer = await _read_head(store[0])
        if answer is None:
            return False
        served.status = int(answer.start.split()[1])
        if fault != "lost":
            fault = self._body_fault(fault, served, answer)
        if fault:
            served.fault = fault
            self.injected[fault] += 1
        if fault == "lost":
            _reset(writer)
            return False
        is_open = await self._answer(answer, store[0], writer, served, chance.random())
        if fault == "cut":
            while _unacknowledged(writer):  # the client must receive what was sent, so that tests can count it
                await asyncio.sleep(0.001)
            _reset(writer)
        while fault == "stall" and not (reader.at_eof() or reader.exception()):
            await asyncio.sleep(0.02)  # until the client gives up
        return is_open and fault not in ("cut", "short", "stall")

    def _take(self, served: Served) -> str | None:
        """Return the next injected fault and remove it, if it affects this request."""
        kind, of = self._next[0]
        if not re.search(of, f"{served.method} {served.target}"):
            return None
        self._next.popleft()
        return kind

    def _body_fault(self, fault: str | None, served: Served, answer: Head) -> str | None:
        """Return the fault of this response: an injected one that applies, or the drawn one."""
        if served.method != "GET" or served.status not in (200, 206) or not answer.length:
            return None
        if self._next:
            fault = self._take(served)
        needs_range = fault in ("longer", "misplaced")  # undetectable in a body of unknown length
        return None if needs_range and answer.get("content-range") is None else fault

    async def _answer(
        self, answer: Head, store: asyncio.StreamReader, client: asyncio.StreamWriter, served: Served, where: float
    ) -> bool:
        """Send the response with its fault at fraction `where` of the body; return False if the store closes then."""
        has_body = served.method != "HEAD" and served.status not in (204, 304)
        until_closed = has_body and answer.get("content-length") is None and not answer.is_chunked
        body = _read_body(store, answer, until_closed, has_body)
        ends_at = int(where * answer.length) if served.fault in ("cut", "short", "stall") else None
        if served.fault == "longer":
            answer.set("content-length", str(answer.length + SURPLUS))
        if served.fault == "misplaced":  # by one byte
            first, last, size = map(int, re.findall(r"\d+", answer.get("content-range") or ""))
            answer.set("content-range", f"bytes {first + 1}-{last + 1}/{size + 1}")
        client.write(answer.encode())
        async for piece in body:
            piece = piece if ends_at is None else piece[: ends_at - served.sent]
            served.sent += len(piece)  # counted first, because the client may check the count at once
            client.write(piece)
            await client.drain()
            if served.sent == ends_at:
                break
        if served.fault == "longer":
            client.write(bytes(SURPLUS))
        await client.drain()
        return not until_closed


async def _read_head(reader: asyncio.StreamReader) -> Head | None:
    """Return the next head, or None if the other side has closed the connection."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    except asyncio.IncompleteReadError:
        return None
    return Head(lines[0], [(key, value.strip()) for key, _, value in (line.partition(":") for line in lines[1:])])


async def _read_body(
    reader: asyncio.StreamReader, head: Head, until_closed: bool = False, has_body: bool = True
) -> AsyncIterator[bytes]:
    """Yield the body as transmitted, including chunk framing."""
    while until_closed and (piece := await reader.read(CHUNK)):
        yield piece
    size = -1 if head.is_chunked and has_body else 0
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2)
    remaining = head.length if has_body and not head.is_chunked else 0
    while remaining:
        piece = await reader.read(min(remaining, CHUNK))
        if not piece:
            raise asyncio.IncompleteReadError(b"", remaining)
        remaining -= len(piece)
        yield piece


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _unacknowledged(writer: asyncio.StreamWriter) -> int:
    """Return the number of sent bytes that the client's kernel has not acknowledged."""
    try:
        answer = fcntl.ioctl(writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return struct.unpack("i", answer)[0]
