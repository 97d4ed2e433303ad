"""Real nginx and real Envoy before a real gateway: chunks arrive one by one, and nothing else passes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.deploy.machine import envoy, nginx
from penstock.deploy.machine.proxy import Proxy, proxy
from penstock.deploy.objects import dump
from penstock.spec import loads
from tests.e2e.server import eventually
from tests.gateway.process import Process, gateway
from tests.gateway.upstream import TOKENS, Upstream, Wire, events
from tests.ports import free_port

from . import tools
from .conftest import make_certificate

SPEC = """
upstreams: {{fake: {{url: "{url}", kind: openai, models: {{m: {{}}}}}}}}
routes: {{m: {{targets: [{{model: m, upstream: fake}}], retries: 0}}}}
gateway:
  {{port: 0, trusted_proxies: [127.0.0.1], max_body_bytes: 100000, tag_headers: {{address: x-forwarded-for}}}}
"""
ASK = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True}


async def one_by_one(wire: Wire) -> None:
    """The first token; the others when the client has it."""
    first, *rest = events(wire.asked)
    await wire.stream()
    await wire.chunk(first)
    await wire.read_by_client()
    for each in rest:
        await wire.chunk(each)
    await wire.send(b"0\r\n\r\n")


@dataclasses.dataclass
class Rig:
    """A proxy, and the gateway behind it."""

    proxy: Proxy
    gateway: Process
    upstream: Upstream
    process: subprocess.Popen[bytes]
    log: Path

    @contextlib.contextmanager
    def connected(self) -> Iterator[ssl.SSLSocket]:
        context = ssl.create_default_context(cafile=self.proxy.certificate)
        plain = socket.create_connection(("127.0.0.1", self.proxy.https_port), 30)
        with context.wrap_socket(plain, server_hostname="localhost") as wrapped:
            yield wrapped

    def send(self, to: socket.socket, path: str, body: Any = None, *fields: str) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
            "Host: localhost",
            "Connection: close",
        ]
        lines += [f"Authorization: Bearer {self.gateway.key}", f"Content-Length: {len(data)}", *fields]
        to.sendall("\r\n".join([*lines, "", ""]).encode() + data)

    def ask(self, path: str, body: Any = None, *fields: str) -> tuple[int, str, str]:
        """(status, head, body)"""
        with self.connected() as connection:
            self.send(connection, path, body, *fields)
            return parts(rest(connection))


def rest(connection: socket.socket) -> bytes:
    """All until it is closed, or until as much as was announced is here: Envoy closes only a second later."""
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # closed without a last word
        while not whole(found) and (piece := connection.recv(65536)):
            found += piece
    return found


def whole(data: bytes) -> bool:
    """Whether this is an answer with a length, and all of it."""
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: *(\d+)\r?$", head, re.MULTILINE)
    return bool(end and length and len(body) >= int(length[1]))


def parts(data: bytes) -> tuple[int, str, str]:
    head, _, body = data.decode().partition("\r\n\r\n")
    return int(head.split(" ", 2)[1]), head.lower(), body


def until(connection: socket.socket, text: bytes) -> bytes:
    """What has come when this is there."""
    found = b""
    while text not in found:
        piece = connection.recv(65536)
        assert piece, found
        found += piece
    return found


def start(kind: str, task: Proxy, folder: Path) -> subprocess.Popen[bytes]:
    """A proxy with its own configuration, and nothing of this machine's."""
    if kind == "nginx":
        (folder / "nginx.conf").write_text(nginx.configuration(task, run=str(folder)))
        # as root, workers would be somebody who cannot enter the folder; in a container, nobody is root
        own = "daemon off; user root;"
        command = [tools.nginx(), "-c", str(folder / "nginx.conf"), "-g", own]
        assert subprocess.run([*command[:-1], own, "-t"], capture_output=True).returncode == 0
    else:
        secrets = folder / "certificates.yaml"
        secrets.write_text(dump(envoy.secrets(task)))
        (folder / "envoy.yaml").write_text(dump(envoy.bootstrap(task, certificates=str(secrets))))
        command = [
            tools.envoy(),
            "-c",
            str(folder / "envoy.yaml"),
            "--disable-hot-restart",
            "--concurrency",
            "1",
        ]
        command += ["--log-level", "warning"]
    with (folder / "proxy.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@dataclasses.dataclass
class Behind:
    """A gateway and its upstream."""

    spec: str
    gateway: Process
    upstream: Upstream


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    upstream = Upstream().start()
    try:
        text = SPEC.format(url=upstream.url)
        with gateway(tmp_path_factory.mktemp("gateway"), text) as process:
            yield Behind(text, process, upstream)
    finally:
        upstream.stop()


@contextlib.contextmanager
def running(kind: str, folder: Path, certificate: Path, behind: Behind, **changes: Any) -> Iterator[Rig]:
    """A proxy before it, for the length of a with block."""
    http, https = free_port(), free_port()
    task = proxy(
        loads(behind.spec, "spec"),
        gateway=("127.0.0.1", behind.gateway.port),
        ports=(http, https),
        public_port=https,
        certificate=str(certificate / "tls.crt"),
        key=str(certificate / "tls.key"),
        ipv6=False,
    )
    task = dataclasses.replace(task, **changes)
    process = start(kind, task, folder)
    try:
        rig = Rig(task, behind.gateway, behind.upstream, process, folder / "proxy.log")
        eventually(lambda: process.poll() is not None or listens(https))
        assert process.poll() is None, rig.log.read_text()
        yield rig
    finally:
        process.terminate()
        process.wait(20)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


@pytest.fixture(scope="module", params=["nginx", "envoy"])
def kind(request: pytest.FixtureRequest) -> str:
    {"nginx": tools.nginx, "envoy": tools.envoy}[request.param]()
    return str(request.param)


@pytest.fixture(scope="module")
def rig(
    kind: str, certificate: Path, behind: Behind, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    # tests here ask often; that there is a limit has a test of its own
    with running(kind, tmp_path_factory.mktemp(kind), certificate, behind, rate=1000) as made:
        yield made


def test_chunks_arrive_one_by_one(rig: Rig) -> None:
    rig.upstream.hold()
    rig.upstream.script = [one_by_one]
    with rig.connected() as connection:
        rig.send(connection, "/v1/chat/completions", ASK)
        # the upstream sends nothing more until this has come: whoever buffers waits for ever
        first = until(connection, TOKENS[0].encode())
        assert TOKENS[1].encode() not in first
        rig.upstream.go()
        status, _, body = parts(first + rest(connection))
    assert status == 200
    assert all(token in body for token in TOKENS)
    assert "data: [DONE]" in body


def test_what_is_not_for_clients_stays_inside(rig: Rig) -> None:
    for path in ("/metrics", "/admin/v1/keys", "/admin", "//metrics", "/v1/../metrics", "/%6detrics"):
        status, _, body = rig.ask(path)
        assert status in (301, 307, 404), path
        assert "penstock:" not in body, path
    assert rig.ask("/readyz")[0] == 200
    status, _, body = rig.ask("/v1/models")
    assert status == 200
    assert '"m"' in body


def test_what_a_client_says_of_its_address_is_not_believed(rig: Rig) -> None:
    before = len(rig.gateway.rows())
    status, _, _ = rig.ask("/v1/chat/completions", ASK, "X-Forwarded-For: 203.0.113.9")
    assert status == 200
    eventually(lambda: len(rig.gateway.rows()) > before)
    row = rig.gateway.rows()[-1]
    assert "203.0.113.9" not in str(row)
    assert "127.0.0.1" in str(row["tags"]), "what the gateway was told"


def test_plain_http_is_sent_to_https(rig: Rig) -> None:
    with socket.create_connection(("127.0.0.1", rig.proxy.http_port), 30) as connection:
        rig.send(connection, "/v1/chat/completions", ASK)
        status, head, _ = parts(rest(connection))
    assert status == 308, "a POST stays a POST"
    assert f"location: https://localhost:{rig.proxy.https_port}/v1/chat/completions" in head


def test_a_body_that_is_too_large(rig: Rig) -> None:
    status, _, body = rig.ask("/v1/chat/completions", {**ASK, "user": "x" * 200_000})
    assert status == 413
    assert json.loads(body)["error"]["message"]


def test_one_address_does_not_take_all(kind: str, certificate: Path, behind: Behind, tmp_path: Path) -> None:
    with running(kind, tmp_path, certificate, behind, rate=1) as rig:
        answers = [rig.ask("/v1/models") for _ in range(12)]
    assert answers[0][0] == 200
    head, body = next((head, body) for status, head, body in answers if status == 429)
    assert "retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"


def test_a_gateway_that_is_gone_is_an_error_in_openais_shape(
    kind: str, certificate: Path, behind: Behind, tmp_path: Path
) -> None:
    with running(kind, tmp_path, certificate, behind, gateway=("127.0.0.1", free_port())) as rig:
        status, _, body = rig.ask("/v1/chat/completions", ASK)
    assert status in (502, 503)
    assert json.loads(body)["error"]["code"] == "unavailable"


def test_nginx_is_reloaded_in_the_middle_of_a_stream(
    certificate: Path, behind: Behind, tmp_path: Path
) -> None:
    with running("nginx", tmp_path, certificate, behind) as rig:
        rig.upstream.hold()
        rig.upstream.script = [one_by_one]
        with rig.connected() as connection:
            rig.send(connection, "/v1/chat/completions", ASK)
            first = until(connection, TOKENS[0].encode())
            workers = children(rig.process.pid)
            rig.process.send_signal(signal.SIGHUP)
            eventually(lambda: children(rig.process.pid) - workers)
            rig.upstream.go()
            assert b"[DONE]" in first + rest(connection)
        assert rig.ask("/v1/models")[0] == 200


def test_envoy_takes_a_renewed_certificate(certificate: Path, behind: Behind, tmp_path: Path) -> None:
    tls = tmp_path / "tls"
    tls.mkdir()
    for name in ("tls.crt", "tls.key"):
        (tls / name).write_bytes((certificate / name).read_bytes())
    with running("envoy", tmp_path, tls, behind) as rig:
        address = ("127.0.0.1", rig.proxy.https_port)
        before = ssl.get_server_certificate(address)
        renewed = tmp_path / "renewed"
        renewed.mkdir()
        make_certificate(renewed)
        for name in ("tls.key", "tls.crt"):
            (renewed / name).rename(tls / name)  # moved into place, as those do who renew it
        eventually(lambda: ssl.get_server_certificate(address) != before)


def children(pid: int) -> set[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {int(each) for each in listed.split()}
