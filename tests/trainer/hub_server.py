"""A small HTTP server that speaks as much of the Hugging Face hub's interface as fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """One repository, org/model, at 127.0.0.1. token: who has none gets 401; cut: files whose body ends after that many
    bytes, once; away: files that are listed and not found; damaged: files whose bytes come out as others; requests: by path."""

    def __init__(self, files: Mapping[str, bytes], token: str | None = None) -> None:
        self.files, self.token = dict(files), token
        self.cut: dict[str, int] = {}
        self.requests: Counter[str] = Counter()
        self.away: set[str] = set()
        self.damaged: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def commit(self) -> str:
        described = json.dumps({name: _digest(body) for name, body in sorted(self.files.items())})
        return hashlib.sha1(described.encode()).hexdigest()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _large(name: str, body: bytes) -> dict[str, object]:
    """What the hub lists of a file that it keeps outside git."""
    if not name.endswith(".safetensors"):
        return {}
    return {"lfs": {"oid": _digest(body), "size": len(body), "pointerSize": 134}}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests[f"{self.command} {path}"] += 1
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.fail(401, "GatedRepo")
            if path.startswith("/api/models/org/model/revision/"):
                if path.split("/")[-1] not in ("main", hub.commit):
                    return self.fail(404, "RevisionNotFound")
                return self.json({"id": "org/model", "sha": hub.commit, "siblings": []})
            if path == f"/api/models/org/model/tree/{hub.commit}":
                return self.json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": _digest(data)[:40]}
                        | _large(name, data)
                        for name, data in hub.files.items()
                    ]
                )
            start = f"/org/model/resolve/{hub.commit}/"
            if path.removeprefix(start) in hub.away:
                return self.fail(404, "EntryNotFound")
            if path.startswith(start) and path.removeprefix(start) in hub.files:
                return self.file(path.removeprefix(start), body)
            return self.fail(404, "RepoNotFound")

        def json(self, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def file(self, name: str, body: bool) -> None:
            data, begin = hub.files[name], 0
            if wanted := self.headers.get("Range"):
                begin = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{_digest(data)}"')
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            if body:
                data = bytes(len(data)) if name in hub.damaged else data
                end = hub.cut.pop(name, len(data))
                self.wfile.write(data[begin:end])
                if end < len(data):
                    self.close_connection = True

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
