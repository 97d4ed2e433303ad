"""An engine's server as a process, scripted: what a supervisor may meet. Standard library only: starts fast.

    python engine.py FOLDER … --host H --port P …

Files in FOLDER say what it does, and tell what it did:

    refuse      exit with status 2 at once, after saying its text     starts     one line for each start
    crash       exit with status 1 at once                            key        PENSTOCK_API_KEY as it was
    mute        do not listen                                         arguments  of each start
    unready     answer /readyz with 503 while it is there
    stuck       answer /livez with 503 while it is there
    deaf        ignore SIGTERM
    orphan      start a process in a session of its own, and write its id there
"""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ANSWER = b"""{"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m",
"choices": [{"index": 0, "text": "yes", "finish_reason": "stop", "logprobs": null}],
"usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, "device_seconds": 0.25}}"""
folder = Path(sys.argv[1])
port = int(sys.argv[sys.argv.index("--port") + 1])


class Handler(http.server.BaseHTTPRequestHandler):
    """Probes; POST /STATUS ends it; any other POST is a completion."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        bad = {"/readyz": "unready", "/livez": "stuck"}.get(self.path)
        self._answer(503 if bad is not None and (folder / bad).exists() else 200, b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.strip("/").isdigit():
            os._exit(int(self.path.strip("/")))
        self._answer(200, ANSWER)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main() -> None:
    """Do as the files say."""
    before = (folder / "starts").read_text().split() if (folder / "starts").exists() else []
    if any(Path(f"/proc/{pid}").exists() for pid in before):
        (folder / "overlap").write_text("there are two")
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    with (folder / "arguments").open("a") as arguments:
        arguments.write(" ".join(sys.argv[2:]) + "\n")
    (folder / "key").write_text(os.environ.get("PENSTOCK_API_KEY", ""))
    if (folder / "refuse").exists():
        print((folder / "refuse").read_text(), flush=True)
        sys.exit(2)
    if (folder / "crash").exists():
        sys.exit(1)
    if (folder / "orphan").exists():
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        (folder / "orphan").write_text(str(child.pid))
    stop = threading.Event()
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN if (folder / "deaf").exists() else lambda number, frame: stop.set()
    )
    print(f"listening on {port}", flush=True)
    if not (folder / "mute").exists():
        http.server.ThreadingHTTPServer.allow_reuse_address = True
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    stop.wait()
    print("drained", flush=True)


main()
