"""A Hugging Face hub on loopback: the requests of `huggingface_hub`'s file system, answered from local folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"  # of the only revision
REVISIONS = ("main", "v1", COMMIT)  # its names


@dataclass
class Hub:
    """Repositories by name (`owner/name`), those that need a token, by the token, and those that are refused with a
    status and an error code; the next `outages` requests fail.
    """

    repositories: dict[str, Path]
    gated: dict[str, str] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    outages: int = 0
    requests: list[str] = field(default_factory=list)  # method and path
    endpoint: str = ""


@contextmanager
def hub(repositories: dict[str, Path], gated: dict[str, str] | None = None) -> Iterator[Hub]:
    """Serve repositories on a free port; set HF_ENDPOINT to the yielded hub's endpoint."""
    served = Hub(repositories, gated or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            served.requests.append(f"{self.command} {self.path}")
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[0] == "api"
            name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
            if served.outages > 0:
                served.outages -= 1
                self.answer(503, b"overloaded")
            elif name in served.refused:
                status, code = served.refused[name]
                self.answer(status, b'{"error": "refused"}', {"X-Error-Code": code} if code else {})
            elif name not in served.repositories:
                self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            elif (token := served.gated.get(name)) and self.headers.get("Authorization") != f"Bearer {token}":
                fault = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted."}
                self.answer(401, b'{"error": "Access is restricted"}', fault)
            elif rest[1:] and rest[1] not in REVISIONS:
                self.answer(404, b'{"error": "no such revision"}', {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"] and not (served.repositories[name] / "/".join(rest[2:])).is_dir():
                self.answer(404, b'{"error": "no such folder"}', {"X-Error-Code": "EntryNotFound"})
            elif rest[:1] == ["tree"]:
                self.tree(served.repositories[name], "/".join(rest[2:]))
            elif rest[:1] == ["resolve"]:
                self.file(served.repositories[name] / "/".join(rest[2:]))
            else:
                self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())

        do_HEAD = do_GET

        def tree(self, folder: Path, inside: str) -> None:
            entries = []
            for path in sorted((folder / inside).iterdir()):
                kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
                oid = "0" * 40 if path.is_dir() else hashlib.sha1(path.read_bytes()).hexdigest()
                entries.append({"oid": oid, "size": 0, "path": str(path.relative_to(folder)), **kind})
            self.answer(200, json.dumps(entries).encode())

        def file(self, path: Path) -> None:
            data, headers, status = path.read_bytes(), {"ETag": '"1"', "X-Repo-Commit": COMMIT}, 200
            if bounds := self.headers.get("Range", "").removeprefix("bytes="):
                first, _, last = bounds.partition("-")
                whole, data, status = len(data), data[int(first) : int(last) + 1 if last else None], 206
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
            self.answer(status, data, headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
