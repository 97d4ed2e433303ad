"""--api-server-count: several API processes before one engine, as clients and operators meet them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .server import Server, children, eventually, serving
from .test_lifecycle import DEMO, LONG, SMALL

TWO = (*SMALL, "--api-server-count", "2")


def apis(server: Server) -> list[int]:
    """The API processes."""
    return children(server.process.pid, "penstock.cli.api_process")


def family(pid: int) -> list[int]:
    """All processes that it has started, and they."""
    return [each for child in children(pid) for each in (child, *family(child))]


def running(pids: list[int]) -> list[int]:
    """Those that have not ended. One whose parent is gone may wait for init to bury it."""
    states = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return [pid for pid, state in states.items() if state != "Z"]


@contextlib.contextmanager
def two(tmp_path: Path, *flags: str) -> Iterator[Server]:
    """A server with two API processes; in the end, no process is left."""
    with serving(*TWO, *flags, log=tmp_path / "log") as server:
        all_of_them = family(server.process.pid)
        yield server
        all_of_them += family(server.process.pid) if server.process.poll() is None else []
    eventually(lambda: not running(all_of_them))


class Stream:
    """A long streamed request whose first chunk is here."""

    def __init__(self, server: Server, **fields: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {"Content-Type": "application/json", "X-Request-Id": "the same for all"}
        self.connection.request("POST", "/v1/completions", json.dumps({**LONG, **fields}), headers)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.readline().startswith(b"data: ")

    def rest(self) -> bytes:
        """Until its end, which may be that of the connection."""
        try:
            return self.answer.read()
        except (http.client.IncompleteRead, ConnectionError):
            return b""
        finally:
            self.connection.close()

    def close(self) -> None:
        """Leave."""
        self.answer.close()
        self.connection.close()


def processes_of(server: Server, streams: list[Stream]) -> dict[int, list[Stream]]:
    """Which process serves which stream, by the sockets that it has open."""
    found: dict[int, list[Stream]] = {}
    for pid in apis(server):
        sockets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, *rest = line.split()
            if local.endswith(f":{server.port:04X}") and f"socket:[{rest[6]}]" in sockets:
                for stream in streams:
                    if remote.endswith(f":{stream.connection.sock.getsockname()[1]:04X}"):
                        found.setdefault(pid, []).append(stream)
    return found


def check_bills(server: Server) -> None:
    """They add up to the device's time, once nothing runs."""
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)

    def exact() -> bool:
        page = server.metrics()
        bills = page.total("penstock:request_device_seconds_sum")
        return bool(
            bills == pytest.approx(page.total("penstock:device_seconds_total", state="busy"), rel=1e-6)
        )

    eventually(exact)


def test_two_processes_serve_the_official_client_and_one_page_counts_it_all(tmp_path: Path) -> None:
    with two(tmp_path, "--api-key", "a-secret") as server:
        assert len(apis(server)) == 2
        tokens: list[int] = []

        def ask(number: int) -> int:
            with openai.OpenAI(
                base_url=f"{server.url}/v1", api_key="a-secret", max_retries=0, timeout=60
            ) as client:
                fields: dict[str, Any] = {
                    "model": "demo",
                    "messages": [{"role": "user", "content": f"What is a Pod? ({number})"}],
                    "max_tokens": 5 + number % 7,
                    "n": 1 + number % 2,
                    "extra_headers": {"X-Request-Id": "the same for all"},
                }
                if number % 3:
                    return client.chat.completions.create(**fields).usage.completion_tokens  # type: ignore
                usage = None
                for chunk in client.chat.completions.create(
                    **fields, stream=True, stream_options={"include_usage": True}
                ):
                    usage = chunk.usage or usage
                assert usage is not None
                return int(usage.completion_tokens)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            tokens += pool.map(ask, range(48))
        check_bills(server)
        pages = [server.metrics() for _ in range(6)]
        for page in pages:  # of whichever process
            assert page.total("vllm:request_success_total") == 72, (
                "48 requests, half of them with two choices"
            )
            assert page.total("vllm:generation_tokens_total") == sum(tokens)
            assert page.total("vllm:request_generation_tokens_sum") == sum(tokens)
            assert page.total("vllm:request_params_n_count") == 48
            assert page.total("vllm:num_requests_running") == 0
            assert page.total("vllm:cache_config_info") == 1
        log = server.log
        for name in ("api 1", "api 2"):
            assert re.search(rf"{name}\[\d+\] 127\.0\.0\.1", log), "each has served"
        assert sum("POST /v1/chat/completions" in line for line in log.splitlines()) == 48
        for once in ("serving demo at", "an API key is required", "Memory (cpu)", "engine ready"):
            assert log.count(once) == 1
        assert "Traceback" not in log
        assert "a-secret" not in "".join(
            Path(f"/proc/{pid}/{file}").read_text() for pid in apis(server) for file in ("cmdline", "environ")
        ), "keys are told to processes in private"
        mapped = Path(f"/proc/{apis(server)[0]}/maps").read_text().split()
        (heartbeat,) = (Path(name) for name in mapped if name.endswith("/heartbeat"))
        server.process.kill()  # all others end with it: `two` looks
        server.process.wait(10)
    assert not heartbeat.exists(), "the engine has tidied up"


def test_a_killed_process_is_replaced_and_what_it_had_is_billed(tmp_path: Path) -> None:
    with two(tmp_path) as server:
        done = Stream(server, max_tokens=3)
        assert b"[DONE]" in done.rest()
        streams = [Stream(server, max_tokens=150) for _ in range(6)]
        with server.held():  # or the first ones would have ended
            whose = processes_of(server, streams)
            assert sorted(map(len, whose.values())) == [3, 3], "equal shares"
            victim, other = whose
            os.kill(victim, signal.SIGKILL)
            for stream in whose[victim]:
                assert not stream.rest().endswith(b"data: [DONE]\n\n")
            eventually(lambda: f"(process {victim}) ended by SIGKILL" in server.log)
        for stream in whose[other]:
            rest = stream.rest()
            assert b'"finish_reason":"length"' in rest
            assert rest.endswith(b"data: [DONE]\n\n")
        eventually(lambda: len(set(apis(server)) - {victim}) == 2)
        eventually(lambda: server.log.count("Started server process") == 3)
        check_bills(server)
        page = server.metrics()
        assert page.total("vllm:request_success_total", finished_reason="length") == 4
        assert page.total("vllm:request_success_total", finished_reason="abort") == 3
        assert page.total("vllm:kv_cache_usage_perc") == 0
        assert json.loads(server.get("/load")[1])["server_load"] == 0
        again = [Stream(server, max_tokens=20) for _ in range(6)]
        assert sorted(map(len, processes_of(server, again).values())) == [3, 3], "the new one takes its share"
        assert all(stream.rest().endswith(b"data: [DONE]\n\n") for stream in again)
        check_bills(server)
        assert server.metric("vllm:request_success_total") == 13
        assert f"(process {victim}) ended by SIGKILL" in server.log
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_status() == 0


def test_the_end_of_the_engine_is_told_by_all(tmp_path: Path) -> None:
    with two(tmp_path) as server:
        streams = [Stream(server) for _ in range(4)]
        assert len(processes_of(server, streams)) == 2
        os.kill(server.engine_pid(), signal.SIGKILL)
        for stream in streams:
            assert b"SIGKILL" in stream.rest()
        for _ in range(4):
            status, body = server.get("/health")
            assert (status, "SIGKILL" in body) == (503, True)
        assert server.exit_status() == 1
        assert len(re.findall(r"engine process \d+ ended", server.log)) == 1


def test_a_signal_drains_all_of_them(tmp_path: Path) -> None:
    """Terminals and systemd signal all processes of a group: that is one signal, not two."""
    with two(tmp_path) as server:
        streams = [Stream(server, max_tokens=150) for _ in range(4)]
        with server.held():
            assert len(processes_of(server, streams)) == 2
            for pid in (server.process.pid, *family(server.process.pid)):
                os.kill(pid, signal.SIGINT)
            eventually(lambda: server.get("/readyz")[0] == 503)
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
                with pytest.raises(openai.InternalServerError) as caught:
                    client.completions.create(model="demo", prompt="x")
                assert caught.value.body["reason"] == "draining"  # type: ignore[index]
        for stream in streams:
            assert stream.rest().endswith(b"data: [DONE]\n\n")
        assert server.exit_status() == 0


def test_limits_of_the_engine_hold_for_all_together(tmp_path: Path) -> None:
    flags = ("--max-num-seqs", "1", "--max-num-queued-reqs", "3")
    with two(tmp_path, *flags) as server:
        first = Stream(server)
        statuses: list[int] = []

        def ask(_: int) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            with contextlib.closing(connection):
                body = json.dumps({"prompt": "x", "max_tokens": 1})
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                return connection.getresponse().status

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, number) for number in range(12)]
            eventually(lambda: sum(answer.done() for answer in answers) == 9)
            assert server.metric("vllm:num_requests_waiting") == 3
            first.close()
            statuses += [answer.result() for answer in answers]
        assert sorted(statuses) == [200] * 3 + [503] * 9
        assert server.metric("vllm:admission_rejections_total") == 9
        check_bills(server)
        stream = Stream(server)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.log.count("Draining:") == 2)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_status() == 1, "a second signal aborts what runs"
        stream.close()


def test_nobody_answers_before_all_are_ready_and_sighup_reaches_all(tmp_path: Path) -> None:
    server = Server(*TWO, log=tmp_path / "log")
    try:
        eventually(lambda: len(apis(server)) == 2, 90)
        slow = apis(server)[1]
        os.kill(slow, signal.SIGSTOP)
        eventually(lambda: "engine ready" in server.log, 90)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 5)
        os.kill(slow, signal.SIGCONT)
        server.wait()
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: server.log.count("SIGHUP: there is nothing to read again") == 2)
        assert server.get("/readyz")[0] == 200
    finally:
        server.close()


def test_what_stops_the_start_is_said_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO, broken)
    (broken / "tokenizer.json").write_text("{")
    server = Server(str(broken), *TWO, log=tmp_path / "log")
    try:
        assert server.exit_status() == 2
        assert server.log.count("tokenizer.json") == 1, server.log
        assert "Traceback" not in server.log
    finally:
        server.close()


def test_processes_that_die_again_and_again_end_the_server(tmp_path: Path) -> None:
    with two(tmp_path) as server:
        for number in range(6):
            eventually(lambda: apis(server) or server.process.poll() is not None)
            victim = apis(server)[0]
            os.kill(victim, signal.SIGKILL)
            eventually(lambda number=number: server.log.count("ended by SIGKILL") == number + 1)
        assert server.exit_status() == 1
        assert "6 API processes have died within 60 s" in server.log


def test_a_count_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for count, message in (("0", "must be at least 1"), ("1000", "must be at most 128")):
        done = subprocess.run(
            [sys.executable, "-m", "penstock", "serve", "-asc", count],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert f"--api-server-count {message}" in done.stderr
