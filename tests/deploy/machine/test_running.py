"""What the containers and services run does run: their commands, with ports and folders of this machine."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.cli import gateway as gateway_command
from penstock.cli import models, serve, up
from penstock.cli.flags import Parser
from penstock.deploy.machine import files
from tests.e2e.server import eventually
from tests.gateway.process import gateway
from tests.ports import free_port

from .specs import SPECS, bundle

PARSERS: dict[str, Any] = {"serve": serve, "gateway": gateway_command, "up": up, "models": models}


def parsed(words: list[str]) -> None:
    """Ends the test where `penstock` would end with its usage."""
    program, command, *arguments = words
    assert program.endswith("penstock")
    parser = Parser(prog=f"penstock {command}")
    PARSERS[command].add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize("spec", SPECS)
def test_every_flag_is_known(spec: str) -> None:
    services = yaml.safe_load(files(bundle(SPECS[spec]))["compose.yaml"])["services"]
    own = [each for each in services.values() if each["entrypoint"][0] == "penstock"]
    assert len(own) >= 2
    for each in own:
        words = [*each["entrypoint"], *each["command"]]
        parsed([word.replace("${PENSTOCK_FRONT_SUBNET:-", "").replace("}", "") for word in words])
    unit = files(bundle(SPECS[spec]), "systemd")["penstock.service"]
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    parsed(start.removeprefix("ExecStart=").split(" "))


@pytest.mark.slow
def test_gateway_and_engine_as_the_containers_have_them(tmp_path: Path) -> None:
    made = files(bundle(SPECS["init"]))
    services = yaml.safe_load(made["compose.yaml"])["services"]
    key, port = secrets.token_hex(32), free_port()
    engine = services["demo"]
    words = [*engine["entrypoint"][1:], *engine["command"]]
    words = [word.replace("0.0.0.0", "127.0.0.1").replace("--port=8000", f"--port={port}") for word in words]
    with (tmp_path / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock", *words, "--dtype=float32"],
            env={**os.environ, "PENSTOCK_GATEWAY_KEY": key, "VLLM_API_KEY": key},
            stdout=log,
            stderr=log,
        )

    def ready() -> bool:
        assert process.poll() is None, (tmp_path / "engine.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return True
        except OSError:
            return False

    spec = made["penstock.yaml"].replace("http://demo:8000", f"http://127.0.0.1:{port}")
    spec = spec.replace("/var/lib/penstock", str(tmp_path))
    flags = ["--host=127.0.0.1", f"--port={free_port()}", "--trusted-proxies=10.213.64.0/28"]
    try:
        # it says its address, and no key: logs of containers are kept
        with gateway(tmp_path, spec, *flags, environment={"PENSTOCK_ENGINE_KEY": key}, says=1) as door:
            _, own = door.new_key()
            eventually(ready, 90)
            ask = {"model": "assistant", "messages": [{"role": "user", "content": "What is a Pod?"}]}
            answer = door.post("/v1/chat/completions", {**ask, "max_tokens": 8}, own)
            assert answer.status == 200, answer.body
            eventually(lambda: bool(door.rows()))
            (row,) = door.rows()
            assert (row["route"], row["model"], row["output_tokens"]) == ("assistant", "demo", 8)
            # the pool's price went along, and the engine tells its device-seconds to a gateway with its key
            assert row["device_seconds"] > 0
            assert row["dollars"] > 0
        body = json.dumps({"model": "demo", "prompt": "?", "max_tokens": 1}).encode()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body, timeout=30)
    finally:
        process.terminate()
        process.wait(60)
