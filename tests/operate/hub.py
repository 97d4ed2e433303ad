"""A small server that speaks the endpoints of Hugging Face's hub that a pull asks for, and can fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories: id → file → content. Files that end in .safetensors are in large storage."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = {id: dict(files) for id, files in repositories.items()}
        self.commit = COMMIT
        self.asked: list[tuple[str, str | None]] = []
        """(path, Range) of each GET."""
        self.refusals: list[tuple[int, dict[str, str]]] = []
        """Status and headers of the answers to the next GETs of files."""
        self.cut: int | None = None
        """After how many bytes the next answer with a file breaks off."""
        self.damage = False
        """Whether contents are other ones than the checksums say."""
        self.hold: threading.Event | None = None
        """What answers with weights wait for, half of them sent."""
        self.half_sent = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, name: str) -> int:
        return sum(path.endswith(f"/{name}") for path, _ in self.asked)

    def answer(self, it: BaseHTTPRequestHandler) -> None:
        path = it.path.partition("?")[0]
        if path.startswith("/api/models/"):
            id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if id == "secret/gated":
                return self._say(it, 403, b"", {"X-Error-Code": "GatedRepo"})
            if id not in self.repositories:
                return self._say(it, 401, b"", {"X-Error-Code": "RepoNotFound"})
            if revision not in ("", "main", self.commit):
                return self._say(it, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self._say(it, 200, json.dumps(self._info(id)).encode())
        id, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        self.asked.append((path, it.headers.get("Range")))
        if self.refusals:
            status, headers = self.refusals.pop(0)
            return self._say(it, status, b"", headers)
        assert commit == self.commit
        content = self.repositories[id][name]
        if self.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._file(it, content)

    def _info(self, id: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.repositories[id].items():
            each: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                each["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(each)
        return {"_id": "1", "id": id, "modelId": id, "sha": self.commit, "siblings": siblings,
                "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def _file(self, it: BaseHTTPRequestHandler, content: bytes) -> None:
        begin = 0
        if range_ := it.headers.get("Range"):
            begin = int(range_.removeprefix("bytes=").partition("-")[0])
        it.send_response(206 if begin else 200)
        if begin:
            it.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        part = content[begin:]
        it.send_header("Content-Length", str(len(part)))
        it.end_headers()
        if self.cut is not None and len(part) > self.cut:
            part, self.cut = part[: self.cut], None
            it.wfile.write(part)
            it.wfile.flush()
            it.close_connection = True
            return
        if self.hold is not None and it.path.endswith(".safetensors"):
            it.wfile.write(part[: len(part) // 2])
            it.wfile.flush()
            self.half_sent.set()
            self.hold.wait(20)
            part = part[len(part) // 2 :]
        it.wfile.write(part)

    def _say(
        self, it: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        it.send_response(status)
        for name, value in (headers or {}).items():
            it.send_header(name, value)
        it.send_header("Content-Type", "application/json")
        it.send_header("Content-Length", str(len(body)))
        it.end_headers()
        it.wfile.write(body)
