"""A server to be started by the start-up tests: `startup_server.py PORT [MODE]`, standard library only.

MODE: "ok"; "dies" prints a line and exits with 3; "deaf" listens and ignores SIGTERM;
"refuses" answers every request for tokens with 500.
"""

import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

port, mode = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "ok"
health_checks = 0


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, content_type: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        global health_checks
        if self.path == "/health":
            health_checks += 1
            # The first look comes too early, as it does at a model that is still loading.
            self.answer(b"{}", status=200 if health_checks > 1 else 503)
        else:
            self.answer(b'{"data": [{"id": "tiny"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if mode == "refuses":
            self.answer(b'{"error": {"message": "no weights"}}', status=500)
        else:
            chunk = b'data: {"choices": [{"text": "a", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
            self.answer(chunk, "text/event-stream")


if mode == "dies":
    print("out of memory", flush=True)
    sys.exit(3)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
