"""HTTP server on the loopback interface whose answers a test chooses, and the requests it received."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[Any]:
    """Yield a server with its `url`, and the method, path and token of each request that it has `seen`."""

    def handle_any(handler: BaseHTTPRequestHandler) -> None:
        server.seen.append((handler.command, handler.path, handler.headers.get("Authorization")))
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        answer(handler)

    methods = {f"do_{method}": handle_any for method in ("GET", "POST", "PUT")}
    handler = type("Handler", (BaseHTTPRequestHandler,), {**methods, "log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def give(body: object, status: int = 200, **headers: str) -> Answer:
    """Return an answer with this text, or value as JSON."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        handler.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer
