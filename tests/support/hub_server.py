"""A small local Hub that answers huggingface_hub's requests, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000
"""Files from this size on have a sha256, as in LFS."""


class Hub:
    """Repositories by their name (data sets as `datasets/owner/name`): content by path."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.cut: dict[str, int] = {}
        """Path: byte of the file after which every connection breaks."""
        self.spoilt: dict[str, bytes] = {}
        """Path: what is sent instead."""
        self.sent: dict[str, int] = {}
        """Bytes of content sent, by path."""
        self.url = ""

    def info(self, name: str) -> dict:
        siblings = []
        for path, data in self.repositories[name].items():
            entry: dict = {"rfilename": path, "size": len(data)}
            entry["blobId"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            if len(data) >= LARGE:
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        return {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The Hub on a free port, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/[^/]+", path):
                name = match[2] if match[1] == "models" else f"datasets/{match[2]}"
                if name in hub.repositories:
                    self.answer(200, json.dumps(hub.info(name)).encode(), {"Content-Type": "application/json"})
                    return
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.content(match[3], hub.spoilt.get(match[3]) or hub.repositories[match[1]][match[3]])
            else:
                self.answer(404, b"", {})

        def content(self, path: str, data: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(wanted[1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data) - first))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            last = min(len(data), hub.cut.get(path, len(data)))
            if last > first:
                self.wfile.write(data[first:last])
                hub.sent[path] = hub.sent.get(path, 0) + last - first
            self.close_connection = last < len(data)

        def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
