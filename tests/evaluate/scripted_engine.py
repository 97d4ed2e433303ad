"""A stand-in for an engine: the probes and chat completions of `penstock serve`, and an end when told to.

python scripted_engine.py PORT KEY PIDS [DIES_AFTER]     the answer is the question
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, KEY, PIDS = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
DIES_AFTER = int(sys.argv[4]) if len(sys.argv) > 4 else None
answered = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send({})

    def do_POST(self) -> None:
        global answered
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if DIES_AFTER is not None and answered >= DIES_AFTER:
            print("RuntimeError: out of magic smoke", flush=True)
            os._exit(3)
        answered += 1
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self._send({"error": "whose are you?"}, 401)
            return
        message = {"content": body["messages"][-1]["content"]}
        self._send(
            {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"device_seconds": 0.5}}
        )

    def _send(self, payload: object, status: int = 200) -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if DIES_AFTER == -1:
    print("error: --quantization: no such scheme", flush=True)
    sys.exit(2)
with PIDS.open("a") as file:
    file.write(f"{os.getpid()}\n")
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
