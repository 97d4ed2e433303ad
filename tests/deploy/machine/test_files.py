"""The files of one machine: their readers take them, and they say what the spec says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.check import run
from penstock.core.errors import StartupError
from penstock.deploy.derive import plain_spec
from penstock.deploy.machine import Format, Kind, files
from penstock.deploy.machine.nginx import Directive, text
from penstock.deploy.machine.systemd import Unit, command
from penstock.spec import loads
from penstock.spec.model import Spec

from . import tools
from .specs import SPECS, TWO, bundle


def write(folder: Path, made: dict[str, str]) -> None:
    for path, content in made.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def document(spec: str, kind: Kind = "nginx") -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(files(bundle(spec), "compose", kind)["compose.yaml"])
    return made


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["nginx", "envoy"])
def test_docker_compose_takes_it(tmp_path: Path, spec: str, kind: Kind) -> None:
    compose = tools.docker_compose()
    write(tmp_path, files(bundle(SPECS[spec]), "compose", kind))
    for name in ("gateway.env", "engine.env"):
        (tmp_path / name).write_text("A=b\n")
    devices = {"PENSTOCK_SMALL_0_DEVICE": "MIG-1", "PENSTOCK_SMALL_1_DEVICE": "MIG-2"}
    run = [compose, "config", "--format", "json"]
    done = subprocess.run(run, cwd=tmp_path, env={**os.environ, **devices}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "there was something to warn of"
    read = yaml.safe_load(done.stdout)
    assert set(read["services"]) == set(document(SPECS[spec], kind)["services"])
    if spec == "two":
        (asked,) = read["services"]["small-1"]["deploy"]["resources"]["reservations"]["devices"]
        assert asked["device_ids"] == ["MIG-2"]
        assert asked["capabilities"] == ["gpu"]


def test_a_slice_that_nobody_named_is_said(tmp_path: Path) -> None:
    compose = tools.docker_compose()
    write(tmp_path, files(bundle(TWO)))
    for name in ("gateway.env", "engine.env"):
        (tmp_path / name).touch()
    done = subprocess.run([compose, "config", "-q"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "the UUID of a slice 3g.40gb, from nvidia-smi -L" in done.stderr


@pytest.mark.parametrize("spec", SPECS)
def test_only_the_proxy_is_reached_from_outside(spec: str) -> None:
    made = document(SPECS[spec])
    services = made["services"]
    assert [name for name, each in services.items() if "ports" in each] == ["proxy"]
    assert not any("network_mode" in each or each.get("privileged") for each in services.values())
    engines = {name for name, each in services.items() if each["entrypoint"][1:2] == ["serve"]}
    assert engines
    for name in engines:
        assert services[name]["networks"] == ["back"]
    assert made["networks"]["back"] == {"internal": True}
    assert services["proxy"]["networks"] == ["front"]
    for name, each in services.items():
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert re.fullmatch(r"\S+:[^:]+", each["image"]), name
        assert not each["image"].endswith(":latest")
        if not name.startswith("weights-"):
            assert each["restart"] == "unless-stopped", name
            assert each["healthcheck"]["test"][0] == "CMD", name


def test_engines_get_their_devices_memory_and_time() -> None:
    services = document(TWO)["services"]
    large = services["meta-llama-70b"]
    (asked,) = large["deploy"]["resources"]["reservations"]["devices"]
    assert asked["device_ids"] == ["0", "1", "2", "3"]
    assert large["shm_size"] == 16 << 30
    assert "--tensor-parallel-size=4" in large["command"]
    assert large["entrypoint"][:2] == ["vllm", "serve"]
    assert large["depends_on"] == {"weights-meta-llama-70b": {"condition": "service_completed_successfully"}}
    assert large["volumes"] == ["weights:/models:ro"]
    start = int(large["healthcheck"]["start_period"].rstrip("s"))
    assert start > 140e9 / 1e9, "140 GB take their time"
    assert services["gateway"]["stop_grace_period"] == "270s"
    assert "--shutdown-timeout=240" in services["gateway"]["command"]
    assert services["proxy"]["stop_grace_period"] == "270s"


@pytest.mark.parametrize("format", ["compose", "systemd"])
@pytest.mark.parametrize("kind", ["nginx", "envoy"])
def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch, format: Format, kind: Kind) -> None:
    for name in ("CLOUD_API_KEY", "PENSTOCK_ADMIN_KEY", "PENSTOCK_ENGINE_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret-value-of-the-environment")
    made = files(bundle(TWO), format, kind)
    assert not any("s3cret" in content for content in made.values())
    assert "*.env" in made[".gitignore"].split()
    # and which there must be is said
    assert "CLOUD_API_KEY" in made["README.md"]
    assert "PENSTOCK_ADMIN_KEY" in made["README.md"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_gateway_of_the_containers_has_a_spec_without_faults(spec: str) -> None:
    original = loads(SPECS[spec], "penstock.yaml")
    made = loads(files(bundle(SPECS[spec]))["penstock.yaml"], "gateway")
    assert made.models == {}
    assert set(original.models) <= set(made.routes)
    assert made.teams == original.teams
    assert made.limits == original.limits
    for name, pool in original.pools.items():
        assert made.pools[name].price_per_hour == pool.price_per_hour
    for route in made.routes.values():
        assert all(target.upstream for target in (*route.targets, *route.fallback))
    names = bundle(SPECS[spec]).slugs
    for name, model in original.models.items():
        upstream = made.upstreams[names[name]]
        assert len(upstream.replicas) == model.replicas
        assert upstream.in_house
        assert upstream.api_key_env == "PENSTOCK_ENGINE_KEY"
    assert made.ledger.url == "sqlite:////var/lib/penstock/penstock.db"
    if spec == "two":
        assert made.upstreams["cloud"] == original.upstreams["cloud"]
        assert made.upstreams["small"].replicas == ("http://small-0:8000", "http://small-1:8000")
        assert made.upstreams["meta-llama-70b"].devices == 4
        assert made.routes["chat"].escalate is not None
        assert made.routes["chat"].escalate.to[0].upstream == "meta-llama-70b"


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_that_is_written_out_is_the_same_when_read_again(spec: str) -> None:
    original = loads(SPECS[spec], "penstock.yaml")
    assert loads(yaml.safe_dump(plain_spec(original)), "again") == original


def test_money_is_written_in_dollars() -> None:
    spec = Spec.model_validate({"limits": {"dollars_per_day": "0.000000001"}})
    assert float(plain_spec(spec)["limits"]["dollars_per_day"]) == 1e-9


def test_what_one_machine_does_not_have() -> None:
    several = TWO.replace("devices: 4, engine", "devices: 4, nodes: 2, engine")
    for format in ("compose", "systemd"):
        with pytest.raises(StartupError, match=r"models.meta/Llama-70B.nodes is 2, and this is one machine"):
            files(bundle(several), format)
    with pytest.raises(StartupError, match="The pools have 32 GPUs"):
        files(bundle(TWO.replace("count: 4", "count: 32")))


# ---------------------------------------------------------------------------------------------- systemd


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["nginx", "envoy"])
def test_systemd_takes_the_units(tmp_path: Path, spec: str, kind: Kind) -> None:
    analyze = tools.systemd_analyze()
    made = files(bundle(SPECS[spec]), "systemd", kind)
    programs = {word for unit in made.values() for word in re.findall(r"^Exec\w+=(/\S+)", unit, re.MULTILINE)}
    for name in ("penstock.service", "penstock-proxy.service"):
        content = made[name]
        for program in programs:  # which are not on this machine
            content = content.replace(f"={program} ", "=/bin/true ")
        (tmp_path / name).write_text(content)
    done = subprocess.run(
        [
            analyze,
            "verify",
            "--man=no",
            *(str(tmp_path / f"{name}.service") for name in ("penstock", "penstock-proxy")),
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("penstock.service", "penstock-proxy.service"):
        # an exposure of 2.0 of 10; what systemd calls OK begins at 4.9
        grade = [analyze, "security", "--offline=yes", "--threshold=20", "--no-pager", str(tmp_path / name)]
        done = subprocess.run(grade, capture_output=True, text=True)
        if "nvidia" in made[name]:  # devices are let through, for it needs them
            grade[3] = "--threshold=30"
            done = subprocess.run(grade, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-400:]


def test_the_service_drains_and_asks_for_what_it_names() -> None:
    made = files(bundle(TWO), "systemd")
    unit = made["penstock.service"].splitlines()
    assert "TimeoutStopSec=270s" in unit
    assert "KillMode=mixed" in unit
    assert "EnvironmentFile=/etc/penstock/penstock.env" in unit
    assert "RestartPreventExitStatus=2" in unit
    assert "DeviceAllow=char-nvidia-uvm rw" in unit
    assert any("--host=127.0.0.1" in line and "--shutdown-timeout=240" in line for line in unit)
    small = files(bundle(SPECS["init"]), "systemd")["penstock.service"].splitlines()
    assert "EnvironmentFile=-/etc/penstock/penstock.env" in small, "it names none, and needs none"
    assert "PrivateDevices=yes" in small
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "CapabilityBoundingSet="):
        assert line in unit
        assert line in small


def test_a_unit_is_written_as_systemd_reads_it() -> None:
    assert command(["/a", "b c", '100%"', "$X"]) == '/a "b c" "100%%\\"" "$$X"'
    unit = Unit("Two\nlines.", {"Service": {"A": True, "B": ("x", "y"), "C": 3}})
    assert unit.text() == "# Two\n# lines.\n\n[Service]\nA=yes\nB=x\nB=y\nC=3\n"


# ---------------------------------------------------------------------------------------------- nginx


def test_directives_are_quoted_where_they_must_be() -> None:
    made = text(
        [
            Directive("return", 429, '{"a": "b;c"}'),
            Directive("set", "$x", ""),
            Directive("server", block=[Directive("listen", 80), Directive("add_header", "A", "b c\\")]),
            Directive("return", 308, "https://$host:8443$request_uri"),
        ]
    )
    assert made == (
        'return 429 "{\\"a\\": \\"b;c\\"}";\n'
        'set $x "";\n'
        "server {\n    listen 80;\n"
        '    add_header A "b c\\\\";\n}\n'
        "return 308 https://$host:8443$request_uri;\n"
    )


@pytest.mark.parametrize("format", ["compose", "systemd"])
def test_the_proxys_time_outs_and_limits_follow_the_spec(format: Format) -> None:
    conf = files(bundle(TWO), format)["nginx.conf"]
    # a request may wait 120 s for its model, or 300 s of a route that says nothing; then 900 s for its answer
    assert "proxy_read_timeout 1020s;" in conf
    assert "proxy_buffering off;" in conf
    assert "rate=100r/s;" in conf, "6,000 requests a minute of one key"
    assert "server_name llm.example.com;" in conf
    envoy = yaml.safe_load(files(bundle(TWO), format, "envoy")["envoy.yaml"])
    (chain,) = envoy["static_resources"]["listeners"][1]["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    assert manager["stream_idle_timeout"] == "1020s"
    assert manager["route_config"]["virtual_hosts"][0]["routes"][-1]["route"]["timeout"] == "0s"


@pytest.mark.parametrize("format", ["compose", "systemd"])
def test_three_hundred_seconds_at_least(format: Format) -> None:
    conf = files(bundle(SPECS["init"]), format)["nginx.conf"]
    (seconds,) = set(re.findall(r"proxy_read_timeout (\d+)s;", conf))
    assert int(seconds) >= 300


@pytest.mark.parametrize("format", ["compose", "systemd"])
@pytest.mark.parametrize("kind", ["nginx", "envoy"])
@pytest.mark.parametrize("spec", SPECS)
def test_penstock_check_finds_no_error(tmp_path: Path, spec: str, kind: Kind, format: Format) -> None:
    write(tmp_path, files(bundle(SPECS[spec]), format, kind))
    found = run.check([tmp_path])
    assert [f"{each.path}:{each.line}: {each.what}" for each in found if each.rule.severity == "error"] == []


def test_nginx_takes_the_configurations(tmp_path: Path, certificate: Path) -> None:
    program = tools.nginx()
    for format in ("compose", "systemd"):
        conf = files(bundle(SPECS["init"]), format)["nginx.conf"]
        conf = conf.replace("/etc/penstock/tls", str(certificate)).replace(
            "/run/penstock-proxy", str(tmp_path)
        )
        conf = conf.replace("listen [::]:", "listen 127.0.0.1:")  # where a machine has no IPv6
        (tmp_path / "nginx.conf").write_text(conf)
        done = subprocess.run(
            [program, "-t", "-c", str(tmp_path / "nginx.conf")], capture_output=True, text=True
        )
        assert "syntax is ok" in done.stderr, done.stderr


def test_the_proxy_is_stopped_when_nothing_goes_through_it_any_more() -> None:
    """What depends on another is stopped before it. nginx ends after its streams, Envoy at once."""
    nginx, envoy = (document(SPECS["init"], kind)["services"] for kind in ("nginx", "envoy"))
    assert nginx["proxy"]["depends_on"] == {"gateway": {"condition": "service_healthy"}}
    assert nginx["proxy"]["stop_signal"] == "SIGQUIT"
    assert envoy["gateway"]["depends_on"] == {"proxy": {"condition": "service_started"}}
    assert "depends_on" not in envoy["proxy"]
    assert (
        "After=network-online.target penstock.service"
        in files(bundle(SPECS["init"]), "systemd")["penstock-proxy.service"]
    )
    assert (
        "Before=penstock.service"
        in files(bundle(SPECS["init"]), "systemd", "envoy")["penstock-proxy.service"]
    )


def test_a_gateway_that_is_made_anew_is_found_under_its_name() -> None:
    conf = files(bundle(SPECS["init"]))["nginx.conf"]
    assert "resolver 127.0.0.11 valid=5s" in conf
    assert "proxy_pass $gateway;" in conf


@pytest.mark.parametrize("format", ["compose", "systemd"])
def test_what_is_left_out_is_said(format: Format) -> None:
    job = "jobs: {nightly: {input: /d/in.jsonl, output: /d/out.jsonl, volume: v, key_secret: k}}\n"
    text = files(bundle(TWO + job), format)["README.md"]
    assert "`scale` of small is a cluster's: here are always 2." in text
    assert "`penstock batch /d/in.jsonl --output FILE`" in text
