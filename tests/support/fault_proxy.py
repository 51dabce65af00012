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
import http.client
import random
import re
import socket
import struct
import termios
import threading
from collections import Counter, deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

CHUNK = 2**16
SURPLUS = 16  # surplus bytes of a longer body
FAULTS = ("unavailable", "lost", "cut", "short", "stall", "longer", "misplaced")
UNAVAILABLE = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Served:
    """One request, and the number of body bytes sent in response."""

    method: str
    target: str
    range: tuple[int, int] | None  # requested [start, stop)
    fault: str | None = None
    status: int = 0
    sent: int = 0


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
        self._upstream = upstream.removeprefix("http://")
        self.rates = dict.fromkeys(FAULTS, 0.0) | rates
        self.latency, self.retry_after, self._seed = latency, retry_after, seed
        self.served: list[Served] = []
        self.injected: Counter[str] = Counter()  # count of each kind; "away": connections broken by an absence
        self.impatient = 0  # requests repeated before their Retry-After had passed
        self._next: deque[tuple[str, str]] = deque()  # kind, of which requests
        self._repeats: Counter[str] = Counter()
        self._spared: dict[str, float] = {}  # request -> time from which it may be repeated
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
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
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _bind(self, port: int) -> None:
        """Take the port without listening on it, so that connections are refused."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._port = self._socket.getsockname()[1]

    async def _start(self) -> None:
        self._loop.set_default_executor(ThreadPoolExecutor(32))
        self._web = web.Server(self._serve, access_log=None, auto_decompress=False)
        await self._listen()

    async def _listen(self, delay: float = 0.0) -> None:
        await asyncio.sleep(delay)
        self._server = await self._loop.create_server(self._web, sock=self._socket)

    async def _leave(self, seconds: float) -> None:
        # Shut down, not only closed: a forked child may hold the listening socket too.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.injected["away"] += len(self._web.connections)
        for connection in self._web.connections:
            _reset(connection.transport)
        self._bind(self._port)
        self._return = self._loop.create_task(self._listen(seconds))

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server.close()
        self._socket.close()
        await self._web.shutdown(0)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Forward one request and its response, with the fault that was drawn for it."""
        method, target = request.method, request.raw_path
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        served = Served(method, target, (int(requested[1]), int(requested[2]) + 1) if requested else None)
        path, _, query = target.partition("?")
        identity = f"{method} {'/'.join(path.split('/')[2:])}?{query} {served.range}"
        chance = random.Random(f"{self._seed} {identity} {self._repeats[identity]}")
        self._repeats[identity] += 1
        self.impatient += self._loop.time() < self._spared.get(identity, 0.0)
        self.served.append(served)
        if self._next:
            fault = self._take(served) if self._next[0][0] in ("unavailable", "lost") else None
        else:
            fault = chance.choices([*self.rates, None], [*self.rates.values(), 1 - sum(self.rates.values())])[0]
        if self._leaving is not None:
            remaining, seconds = self._leaving
            self._leaving = (remaining - 1, seconds) if remaining > 1 else None
            if self._leaving is None:
                await self._leave(seconds)
                return web.Response()  # not sent: the connection has been reset
        body = await request.content.read()
        await asyncio.sleep(self.latency)
        if fault == "unavailable":
            self.injected[fault] += 1
            served.fault, served.status = fault, 503
            refusal = web.Response(status=503, text=UNAVAILABLE, content_type="application/xml")
            if self.retry_after is not None:
                refusal.headers["Retry-After"] = str(self.retry_after)
                self._spared[identity] = self._loop.time() + self.retry_after
            return refusal
        status, reason, headers, answer = await asyncio.to_thread(self._forward, request, body)
        served.status = status
        if fault != "lost" and (method != "GET" or status not in (200, 206) or not answer):
            fault = None
        elif fault != "lost":
            fault = self._take(served) if self._next else fault
            if fault in ("longer", "misplaced") and "Content-Range" not in headers:
                fault = None  # undetectable in a body of unknown length
        if fault is not None:
            served.fault = fault
            self.injected[fault] += 1
        if fault == "lost":
            _reset(request.transport)
            return web.Response()  # not sent
        response = web.StreamResponse(status=status, reason=reason, headers=headers)
        return await self._answer(request, response, answer, served, chance.random())

    def _forward(self, request: web.BaseRequest, body: bytes) -> tuple[int, str, CIMultiDict[str], bytes]:
        """Return the store's status, reason, headers and body. Swift's responses are not valid for aiohttp's client."""
        connection = http.client.HTTPConnection(self._upstream)
        connection.putrequest(request.method, request.raw_path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() not in ("connection", "expect", "transfer-encoding"):
                connection.putheader(name, value)
        with closing(connection):
            connection.endheaders(body)
            answer = connection.getresponse()
            headers = CIMultiDict(answer.getheaders())
            for name in ("Connection", "Keep-Alive", "Transfer-Encoding"):
                headers.popall(name, None)
            return answer.status, answer.reason, headers, answer.read()

    def _take(self, served: Served) -> str | None:
        """Return the next injected fault and remove it, if it affects this request."""
        kind, of = self._next[0]
        if not re.search(of, f"{served.method} {served.target}"):
            return None
        self._next.popleft()
        return kind

    async def _answer(
        self, request: web.BaseRequest, response: web.StreamResponse, body: bytes, served: Served, where: float
    ) -> web.StreamResponse:
        """Send the response with its fault, which is at fraction `where` of the body."""
        fault, headers, transport = served.fault, response.headers, request.transport
        assert transport is not None
        ends_at = int(where * len(body)) if fault in ("cut", "short", "stall") else len(body)
        if fault == "longer":
            headers["Content-Length"] = str(len(body) + SURPLUS)
        if fault == "misplaced":  # by one byte
            first, last, size = map(int, re.findall(r"\d+", headers["Content-Range"]))
            headers["Content-Range"] = f"bytes {first + 1}-{last + 1}/{size + 1}"
        await response.prepare(request)
        for start in range(0, ends_at, CHUNK):
            piece = body[start : min(start + CHUNK, ends_at)]
            served.sent += len(piece)  # counted first, because the client may check the count at once
            await response.write(piece)
        if fault == "longer":
            await response.write(bytes(SURPLUS))
        if fault == "cut":
            # The client must receive what was sent, so that tests can count it.
            while not transport.is_closing() and (transport.get_write_buffer_size() or _unacknowledged(transport)):
                await asyncio.sleep(0.001)
            _reset(transport)
        if fault == "short":
            transport.close()
        while fault == "stall" and not transport.is_closing():
            await asyncio.sleep(0.02)  # until the client gives up
        return response


def _reset(transport: asyncio.BaseTransport | None) -> None:
    if transport is not None:
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()  # type: ignore[attr-defined]


def _unacknowledged(transport: asyncio.BaseTransport) -> int:
    """Return the number of sent bytes that the client's kernel has not acknowledged."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return struct.unpack("i", answer)[0]
