"""`penstock gateway` with several workers: one port, one ledger, and nobody missed who dies."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.http.live import PATIENCE, exchange
from tests.http.test_tls import certificate

from .conftest import BODY, CHAT, STREAM
from .upstream import Upstream, stall

SPEC = """
upstreams: {{ours: {{url: {url}, kind: openai, models: {{tiny: {{}}}}}}}}
routes: {{small: {{targets: [{{model: tiny, upstream: ours}}]}}}}
gateway: {{port: 0, workers: 2}}
"""


def children(pid: int) -> set[int]:
    return {int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def ask(port: int, key: str, count: int) -> list[int]:
    headers = {"Authorization": f"Bearer {key}"}
    return [exchange(port, "POST", CHAT, BODY, headers).status for _ in range(count)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
def test_workers_share_a_port_and_are_replaced(tmp_path: Path) -> None:
    upstream = Upstream().start()
    (tmp_path / "penstock.yaml").write_text(SPEC.format(url=upstream.url))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "gateway"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url, key = (process.stdout.readline().split()[-1] for _ in range(2))
        port = int(url.removesuffix("/v1").rpartition(":")[2])
        assert key.startswith("sk-ps-")
        assert ask(port, key, 10) == [200] * 10
        before = children(process.pid)
        assert len(before) == 2
        os.kill(next(iter(before)), signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while len(children(process.pid) - before) < 1:
            assert time.monotonic() < end
            assert ask(port, key, 1) == [200]  # the other one goes on
        assert ask(port, key, 10) == [200] * 10
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        assert "has ended with -9; another starts" in log
        with sqlite3.connect(tmp_path / "penstock.db") as ledger:
            assert ledger.execute("select count(*) from ledger").fetchone() == (len(upstream.asked),)
        ledger.close()
    finally:
        process.kill()
        process.communicate()
        upstream.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_tells_all_processes_is_heard_once(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to a whole group, systemd's SIGTERM too; a second one would cut running requests off."""
    upstream = Upstream(default=stall).start()
    spec = SPEC.format(url=upstream.url).replace("models: {tiny", "timeout_idle: 0.5, models: {tiny")
    (tmp_path / "penstock.yaml").write_text(spec)
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "gateway"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        url, key = (process.stdout.readline().split()[-1] for _ in range(2))
        connection = http.client.HTTPConnection(
            "127.0.0.1", int(url.split(":")[2].split("/")[0]), timeout=PATIENCE
        )
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", CHAT, json.dumps(STREAM), headers)
        answer = connection.getresponse()
        os.killpg(process.pid, number)
        assert b"upstream_stalled" in answer.read()  # it went on to its own end
        connection.close()
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        assert "Second signal" not in log
    finally:
        process.kill()
        process.communicate()
        upstream.stop()


def test_the_admin_api_of_all_workers_has_a_port_of_its_own(tmp_path: Path) -> None:
    upstream = Upstream().start()
    spec = SPEC.format(url=upstream.url).replace(
        "workers: 2", "workers: 2, admin: {key_env: PENSTOCK_ADMIN_KEY, port: 0}"
    )
    (tmp_path / "penstock.yaml").write_text(spec)
    secret = "admin-0123456789abcdef"
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "gateway"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "PENSTOCK_ADMIN_KEY": secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stderr.readline()
        admin = int(said.rpartition(":")[2].removesuffix("/admin/v1\n"))
        url = process.stdout.readline().split()[-1]
        port = int(url.removesuffix("/v1").rpartition(":")[2])
        headers = {"Authorization": f"Bearer {secret}"}
        assert exchange(port, "GET", "/admin/v1/keys", None, headers).status == 404
        made = exchange(admin, "POST", "/admin/v1/keys", {"name": "x"}, headers).json
        assert ask(port, made["value"], 10) == [200] * 10
        path = f"/admin/v1/keys/{made['id']}/revoke"
        assert exchange(admin, "POST", path, None, headers).status == 200
        end = time.monotonic() + PATIENCE
        while ask(port, made["value"], 10) != [401] * 10:  # at whichever worker
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.communicate()
        upstream.stop()


@pytest.mark.parametrize("own", ["key_env: PENSTOCK_NO_SUCH_KEY", "key_env: HOME, port: {taken}"])
def test_an_admin_api_that_cannot_be_had_ends_the_start(tmp_path: Path, own: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        admin = own.format(taken=taken.getsockname()[1])
        spec = SPEC.format(url="http://127.0.0.1:9").replace("workers: 2", f"workers: 2, admin: {{{admin}}}")
        (tmp_path / "penstock.yaml").write_text(spec)
        done = subprocess.run(
            [sys.executable, "-m", "penstock", "gateway"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "HOME": "x" * 20},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert "PENSTOCK_NO_SUCH_KEY is not set" in done.stderr or "The admin API cannot listen" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_all_workers_take_a_renewed_certificate(tmp_path: Path) -> None:
    certificate(tmp_path, "first")
    spec = SPEC.format(url="http://127.0.0.1:9").replace(
        "workers: 2", "workers: 2, ssl_certfile: cert.pem, ssl_keyfile: key.pem"
    )
    (tmp_path / "penstock.yaml").write_text(spec)
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "gateway", "--log-format", "json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().split()[-1]
        port = int(url.removesuffix("/v1").rpartition(":")[2])
        assert url.startswith("https://")
        first = ssl.get_server_certificate(("127.0.0.1", port), timeout=PATIENCE)
        told: set[int] = set()
        obeyed: set[int] = set()
        strange: list[str] = []
        log = process.stderr

        def read() -> None:
            for line in log:
                try:
                    entry = json.loads(line)
                except ValueError:
                    strange.append(line)
                    continue
                if "They have changed: new connections get the certificate" in entry["message"]:
                    told.add(entry["pid"])
                elif entry["message"].startswith("SIGHUP: new connections"):
                    obeyed.add(entry["pid"])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        end = time.monotonic() + PATIENCE
        while len(told) < 2:  # one may have started with a renewed one already, and waits for the next
            assert time.monotonic() < end, strange
            # whoever starts while it is written is refused, and another takes its place
            certificate(tmp_path, "second")
            reader.join(1.1)
        assert told == children(process.pid)
        process.send_signal(signal.SIGHUP)
        while obeyed != told:
            assert time.monotonic() < end
            reader.join(0.02)
        for _ in range(8):
            assert ssl.get_server_certificate(("127.0.0.1", port), timeout=PATIENCE) != first
        assert strange == []
    finally:
        process.kill()
        reader.join(PATIENCE)
        process.communicate()


STARTS = """
import os, pathlib, signal
from penstock.core.errors import StartupError
from penstock.gateway import workers
from penstock.observe import logs

def serve():
    here = pathlib.Path("begun")
    before = len(here.read_text()) if here.exists() else 0
    here.write_text("x" * (before + 1))
    if before == 0:
        raise StartupError("half a certificate", param="--ssl-certfile")
    if before == 1:
        raise ValueError("a mistake of ours")
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()

logs.configure("gateway", format="json")
raise SystemExit(workers.run(1, serve))
"""


def test_a_start_that_fails_is_told_in_the_logs_form_and_made_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    said = [entry["message"] for entry in entries]
    assert said[0].startswith("half a certificate")
    assert "has ended with 2; another starts" in said[1]
    assert said[2] == "a process of the gateway has failed"
    assert "ValueError: a mistake of ours" in str(entries[2])
    assert "has ended with 1; another starts" in said[3]


def test_what_is_wrong_is_said_before_a_worker_starts(tmp_path: Path) -> None:
    spec = SPEC.format(url="http://127.0.0.1:9") + "ledger: {url: 'sqlite:////proc/nothing/penstock.db'}\n"
    (tmp_path / "penstock.yaml").write_text(spec)
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "gateway"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") <= 3
    assert "Traceback" not in done.stderr
