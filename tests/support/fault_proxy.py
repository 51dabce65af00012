"""A faulty network between a client and an HTTP store.

    with FaultProxy(endpoint, unavailable=0.02, cut=0.01, latency=0.02, seed=1) as proxy:
        Storage(StorageConfig(endpoint_url=proxy.endpoint, ...)).read(url)
        assert proxy.injected["cut"]

The fault of a request is a function of the seed, the request (method, key and query, range; not the bucket) and how
often it was made before, so threads and timing do not change it. Headers are forwarded unchanged, `Host` included: a
signature made for the proxy's address is valid at the store.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import socket
import struct
import termios
import threading
import time
from collections import Counter, deque
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler

from tests.support.quirky_store import Server

CHUNK = 2**16
SURPLUS = 16  # surplus bytes of a longer body
FAULTS = ("unavailable", "lost", "cut", "short", "stall", "longer", "misplaced")
UNAVAILABLE = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Served:
    """One request, and the number of body bytes sent in response."""

    method: str
    target: str
    range: tuple[int, int] | None  # requested [start, stop)
    sent: int = 0


class FaultProxy:
    """An HTTP proxy on a port of 127.0.0.1 (`endpoint`), in threads of its own while its `with` block runs.

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
        self.upstream = upstream.removeprefix("http://")
        self.rates = dict.fromkeys(FAULTS, 0.0) | rates
        self.latency, self.retry_after, self.seed = latency, retry_after, seed
        self.served: list[Served] = []
        self.injected: Counter[str] = Counter()  # count of each kind; "away": connections broken by an absence
        self.impatient = 0  # requests repeated before their Retry-After had passed
        self.next: deque[tuple[str, str]] = deque()  # kind, of which requests
        self.repeats: Counter[str] = Counter()
        self.spared: dict[str, float] = {}  # request -> time from which it may be repeated
        self.leaving: tuple[int, float] | None = None  # requests until then, and for how long
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()
        self._return: threading.Timer | None = None  # from an absence
        self._is_listening = False
        self._bind(0)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def bytes_sent(self) -> int:
        """The number of body bytes sent to clients."""
        return sum(served.sent for served in self.served)

    def inject(self, *kinds: str, of: str = "") -> None:
        """Give the next requests these faults, one each, before any random fault; body faults wait for a body.

        `of`: regular expression of the affected requests, matched against "METHOD target".
        """
        self.next.extend((kind, of) for kind in kinds)

    def take(self, served: Served) -> str | None:
        """Return the next injected fault and remove it, if it affects this request."""
        is_affected = re.search(self.next[0][1], f"{served.method} {served.target}")
        return self.next.popleft()[0] if is_affected else None

    def away(self, seconds: float, after: int = 0) -> None:
        """Refuse connections for `seconds` and end open ones: at once, or from the `after`th request on."""
        with self.lock:
            self.leaving = (after, seconds) if after else None
            if after:
                return
            self.injected["away"] += len(self.connections)
            self._close()
            self._bind(self._server.server_address[1])
            self._return = threading.Timer(seconds, self.__enter__)
            self._return.start()

    def __enter__(self) -> FaultProxy:
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self._is_listening = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._return is not None:
            self._return.cancel()
            self._return.join()
        self._close()

    def _bind(self, port: int) -> None:
        """Take the port without listening on it, so that connections are refused."""
        self._server = Server(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self._server.rig = self
        self._server.server_bind()

    def _close(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._server.shutdown()
            self._server.socket.shutdown(socket.SHUT_RDWR)  # a forked child may hold the listening socket too
        self._server.server_close()
        for connection in list(self.connections):  # a copy: each handler removes its own
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        self.server.rig.connections.add(self.connection)
        try:
            super().handle()
        finally:
            self.server.rig.connections.discard(self.connection)

    def _serve(self) -> None:
        """Forward one request and its response, with the fault that was drawn for it."""
        proxy: FaultProxy = self.server.rig
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        served = Served(self.command, self.path, (int(requested[1]), int(requested[2]) + 1) if requested else None)
        path, _, query = self.path.partition("?")
        identity = f"{self.command} {'/'.join(path.split('/')[2:])}?{query} {served.range}"
        with proxy.lock:
            chance = random.Random(f"{proxy.seed} {identity} {proxy.repeats[identity]}")
            proxy.repeats[identity] += 1
            proxy.impatient += time.monotonic() < proxy.spared.get(identity, 0.0)
            proxy.served.append(served)
            if proxy.next:
                fault = proxy.take(served) if proxy.next[0][0] in ("unavailable", "lost") else None
            else:
                rates = [*proxy.rates.values(), 1 - sum(proxy.rates.values())]
                fault = chance.choices([*proxy.rates, None], rates)[0]
            if proxy.leaving is not None:
                remaining, seconds = proxy.leaving
                proxy.away(seconds, after=remaining - 1)
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        time.sleep(proxy.latency)
        if fault == "unavailable":
            status, headers, body = 503, HTTPMessage(), UNAVAILABLE if self.command != "HEAD" else b""
            if proxy.retry_after is not None:
                headers["Retry-After"] = str(proxy.retry_after)
                proxy.spared[identity] = time.monotonic() + proxy.retry_after
        else:
            with closing(HTTPConnection(proxy.upstream)) as connection:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect", "transfer-encoding"):
                        connection.putheader(name, value)
                connection.endheaders(data)
                answer = connection.getresponse()
                status, headers, body = answer.status, answer.headers, answer.read()
            for name in ("Connection", "Keep-Alive", "Transfer-Encoding"):
                del headers[name]
            if fault != "lost" and (self.command != "GET" or status not in (200, 206) or not body):
                fault = None
            elif fault != "lost":
                with proxy.lock:
                    fault = proxy.take(served) if proxy.next else fault
                if fault in ("longer", "misplaced") and "Content-Range" not in headers:
                    fault = None  # undetectable in a body of unknown length
        proxy.injected.update([fault] if fault else [])
        if fault == "longer":
            body += bytes(SURPLUS)
        if fault == "misplaced":  # by one byte
            first, last, size = map(int, re.findall(r"\d+", headers["Content-Range"]))
            headers.replace_header("Content-Range", f"bytes {first + 1}-{last + 1}/{size + 1}")
        if self.command != "HEAD":
            del headers["Content-Length"]
            headers["Content-Length"] = str(len(body))
        end = int(chance.random() * len(body)) if fault in ("cut", "short", "stall") else len(body)
        if fault != "lost":
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.wfile.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode("latin-1"))
        for start in range(0, end if fault != "lost" else 0, CHUNK):
            piece = body[start : min(start + CHUNK, end)]
            served.sent += len(piece)  # counted first, because the client may check the count at once
            self.wfile.write(piece)
        if fault == "stall":
            self.connection.recv(1)  # until the client gives up
        if fault in ("cut", "lost"):  # reset, after the client has received what was sent and tests count
            while any(fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, bytes(4))):
                time.sleep(0.001)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection |= fault in ("cut", "lost", "short", "stall")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def log_message(self, *_: object) -> None: ...
