"""An S3 store in this process, in memory, that deviates from AWS in one chosen way, at `endpoint` while in `with`.

QUIRKS names the deviations and what to expect of a client: "works" (every operation gives its usual result), "lasts"
(every operation the quirk concerns fails at once, by a StorageError) or "passes" (the store may recover, so a client
retries until its deadline). Any bucket exists. Signatures are not checked; `unsigned_only` refuses requests with one.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import time
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

Expectation = Literal["works", "lasts", "passes"]


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012


class Request(NamedTuple):
    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


def _error(status: int, code: str, message: str = "Said by the store.") -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml"})


def _endless(xml: str) -> tuple[Expectation, str, Callable[[Request], Answer]]:
    """Return listings that never end: each page contains `xml` and names another page."""
    page = f"<ListBucketResult>{xml}<IsTruncated>true</IsTruncated><NextContinuationToken>%d</NextContinuationToken>"
    numbers = itertools.count()
    return "lasts", "listing", lambda _: Answer(200, f"{page}</ListBucketResult>".encode() % next(numbers))


CONCERNED: dict[str, Callable[[Request], bool]] = {
    "any": lambda request: True,
    "condition": lambda request: "if-none-match" in request.headers,
    "write": lambda request: request.method == "PUT",
    "listing": lambda request: request.method == "GET" and "list-type" in request.query,
}
# Response to the concerned requests instead of executing them.
REFUSALS: dict[str, tuple[Expectation, str, Answer | Callable[[Request], Answer]]] = {
    "no_conditions_400": ("works", "condition", _error(400, "InvalidArgument")),
    "no_conditions_501": ("works", "condition", _error(501, "NotImplemented")),
    "redirect_nowhere": ("lasts", "any", Answer(301)),
    "bad_request": ("lasts", "any", _error(400, "InvalidRequest", "\x1b[2J\n" * 1000)),
    "denied_in_html": ("lasts", "any", Answer(403, b"<html>No", {"Content-Type": "text/html"})),
    "echo": ("lasts", "any", lambda request: _error(403, "SignatureDoesNotMatch", f"You sent: {request.headers}")),
    "proxy_login": ("lasts", "any", Answer(407)),
    "quota_413": ("lasts", "write", _error(413, "EntityTooLarge", "Upload exceeds quota.")),
    "endless_listing": _endless("<Contents><Key>folder/a.tar</Key><Size>9</Size></Contents>"),
    "endless_empty_listing": _endless(""),
    "endless_folders": _endless("<CommonPrefixes><Prefix>folder/in/</Prefix></CommonPrefixes>"),
    "listing_in_html": ("passes", "listing", Answer(200, b"<html>Log in</html>")),
    "listing_of_nothing": ("passes", "listing", Answer(200)),
    "gateway": ("passes", "any", Answer(502, b"<html>Bad gateway")),
}
_CODES: dict[str, tuple[Expectation, str, int, str]] = {
    "denied": ("lasts", "any", 403, "AccessDenied"), "clock_skew": ("lasts", "any", 403, "RequestTimeTooSkewed"),
    "expired": ("lasts", "any", 400, "ExpiredToken"), "not_implemented": ("lasts", "any", 501, "NotImplemented"),
    "old_http": ("lasts", "any", 505, "HTTPVersionNotSupported"), "full": ("lasts", "write", 507, "XMinioStorageFull"),
    "quota_403": ("lasts", "write", 403, "QuotaExceeded"), "quota_507": ("lasts", "write", 507, "InsufficientStorage"),
    "broken": ("passes", "any", 500, "InternalError"), "unavailable": ("passes", "any", 503, "SlowDown"),
    "throttled": ("passes", "any", 429, "TooManyRequests"),
}  # fmt: skip
REFUSALS |= {name: (expected, of, _error(status, code)) for name, (expected, of, status, code) in _CODES.items()}
AWAY = {"Location": "https://store.example/other"}
REFUSALS |= {f"redirect_{n}": ("lasts", "any", Answer(n, b"", AWAY)) for n in (301, 302, 303, 307, 308)}
# Modification of the response to an executed request. `no_length`: every body is chunked, and HEAD has no size;
# `no_length_closing`: the end of the connection ends the body; `no_ranges`: every GET returns the whole object;
# `no_prefix`: every listing covers the whole bucket.
MANNERS = (
    "none", "no_etag", "no_length", "no_length_closing", "no_key_count", "no_ranges", "deleting_absent_is_404",
    "no_prefix", "pages_of_one", "unsigned_only",
)  # fmt: skip
QUIRKS: dict[str, Expectation] = {name: expected for name, (expected, _, _) in REFUSALS.items()}
QUIRKS |= dict.fromkeys(MANNERS, "works")


class Server(ThreadingHTTPServer):
    """Server of a store or of a proxy on a port of 127.0.0.1."""

    daemon_threads = True
    request_queue_size = 128
    rig: Any  # for the handlers

    def handle_error(self, *_: Any) -> None:
        pass  # the client has gone


class QuirkyStore(Server):
    def __init__(self, quirk: str = "none"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.reset(quirk)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    def reset(self, quirk: str) -> None:
        """Forget all objects, uploads and requests, and take another quirk."""
        assert quirk in QUIRKS, quirk
        self.quirk = quirk
        self.objects: dict[tuple[str, str], bytes] = {}
        self.uploads: dict[str, tuple[tuple[str, str], dict[int, bytes]]] = {}
        self.requests: list[Request] = []
        self.edit: Callable[[bytes], bytes] | None = None  # applied to each response as transmitted
        self.clock = 0.0  # seconds by which the store's clock is ahead

    def answer(self, request: Request) -> Answer:
        with self.lock:
            self.requests.append(request)
            if self.quirk in REFUSALS:
                _, concerned, refusal = REFUSALS[self.quirk]
                if CONCERNED[concerned](request):
                    return refusal if isinstance(refusal, Answer) else refusal(request)
            if self.quirk == "unsigned_only" and "authorization" in request.headers:
                return _error(403, "InvalidAccessKeyId")
            if "uploads" in request.query or "uploadId" in request.query:
                return self._of_upload(request)
            return self._of_object(request) if request.key else self._listing(request.bucket, request.query)

    def _listing(self, bucket: str, query: dict[str, str]) -> Answer:
        if self.quirk == "no_prefix":
            query = {name: value for name, value in query.items() if name not in ("prefix", "delimiter")}
        prefix, delimiter, after = (query.get(name, "") for name in ("prefix", "delimiter", "continuation-token"))
        names: dict[str, bytes | None] = {}
        for where, key in sorted(self.objects):
            if where == bucket and key.startswith(prefix):
                rest, mark, _ = key[len(prefix) :].partition(delimiter or "\0")
                names[prefix + rest + mark] = None if mark else self.objects[where, key]
        rest = [name for name in names if name > after]
        shown = rest[: 1 if self.quirk == "pages_of_one" else int(query.get("max-keys", "1000"))]
        more = shown and len(rest) > len(shown)
        xml = "" if self.quirk == "no_key_count" else f"<KeyCount>{len(shown)}</KeyCount>"
        for name in shown:
            if (data := names[name]) is None:
                xml += f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
            else:
                tags = "".join(f"<ETag>{escape(tag)}</ETag>" for tag in self._tag(data).values())
                xml += f"<Contents><Key>{quote(name)}</Key>{tags}<Size>{len(data)}</Size></Contents>"
        xml += f"<IsTruncated>{'true' if more else 'false'}</IsTruncated><EncodingType>url</EncodingType>"
        xml += f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if more else ""
        return Answer(200, f"<ListBucketResult>{xml}</ListBucketResult>".encode())

    def _of_object(self, request: Request) -> Answer:
        where = request.bucket, request.key
        if "if-none-match" in request.headers and where in self.objects:
            return _error(412, "PreconditionFailed")
        if request.method == "PUT":
            self.objects[where] = request.body
            return Answer(200, headers=self._tag(request.body))
        if where not in self.objects and (request.method != "DELETE" or self.quirk == "deleting_absent_is_404"):
            return _error(404, "NoSuchKey")
        if request.method == "DELETE":
            self.objects.pop(where, None)
            return Answer(204)
        data = self.objects[where]
        if request.headers.get("if-match") not in (None, _md5(data)):
            return _error(412, "PreconditionFailed")
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if requested is None or self.quirk == "no_ranges":
            return Answer(200, data, self._tag(data))
        start, stop = int(requested[1]), min(int(requested[2]) + 1, len(data))
        if start >= len(data):
            return _error(416, "InvalidRange")
        place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return Answer(206, data[start:stop], place | self._tag(data))

    def _of_upload(self, request: Request) -> Answer:
        name, where = request.query.get("uploadId"), (request.bucket, request.key)
        if not request.key:
            keys = [(name, key) for name, ((bucket, key), _) in self.uploads.items() if bucket == request.bucket]
            xml = "".join(f"<Upload><Key>{escape(key)}</Key><UploadId>{name}</UploadId></Upload>" for name, key in keys)
            return Answer(200, f"<ListMultipartUploadsResult>{xml}</ListMultipartUploadsResult>".encode())
        if name is None:
            name = f"upload-{len(self.uploads)}-{len(self.requests)}"
            self.uploads[name] = (where, {})
            return Answer(200, f"<X><UploadId>{name}</UploadId></X>".encode())
        if name not in self.uploads:
            return _error(404, "NoSuchUpload")
        if request.method == "PUT":
            self.uploads[name][1][int(request.query["partNumber"])] = request.body
            return Answer(200, headers=self._tag(request.body))
        parts = self.uploads.pop(name)[1]
        if request.method == "DELETE":
            return Answer(204)
        self.objects[where] = b"".join(data for _, data in sorted(parts.items()))
        return Answer(200, b"<X></X>")

    def _tag(self, data: bytes) -> dict[str, str]:
        return {} if self.quirk == "no_etag" else {"ETag": _md5(data)}


def _md5(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QuirkyStore

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body, store = self.rfile.read(int(headers.get("content-length", "0"))), self.server
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        status, body, more = store.answer(Request(self.command, bucket, key, query, headers, body))
        head = f"HTTP/1.1 {status} Said\r\nDate: {formatdate(time() + store.clock, usegmt=True)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in more.items())
        if store.quirk == "no_length" and body and self.command == "GET":
            head += "Transfer-Encoding: chunked\r\n"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        elif store.quirk == "no_length_closing" and self.command == "GET":
            head += "Connection: close\r\n"
            self.close_connection = True
        elif not (store.quirk.startswith("no_length") and self.command == "HEAD"):
            head += f"Content-Length: {len(body)}\r\n"
        travels = head.encode() + b"\r\n" + (body if self.command != "HEAD" else b"")
        if store.edit is not None:
            travels = store.edit(travels)
            self.close_connection = True
        self.wfile.write(travels)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def babbler(says: bytes) -> Iterator[tuple[str, list[Any]]]:
    """Yield the address of a port that sends `says` on every connection and closes it, and the list of its clients."""
    clients: list[Any] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            clients.append(self.client_address)
            self.request.recv(2**16)
            self.request.sendall(says)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", clients
        server.shutdown()
