"""One machine under Docker Compose: a proxy, the gateway, and a container for each replica of each model.

    outside ──▶ proxy ──front──▶ gateway ──back (no way out)──▶ engines
                                    └──▶ ledger (volume)          └──▶ weights (volume, read-only)

Ports are published by the proxy alone. Engines are on a network without a way out or in; they ask for a key
that the gateway has. Types and their meaning: https://github.com/compose-spec/compose-spec/blob/main/spec.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from penstock.core.errors import StartupError
from penstock.deploy.derive import CONFIG, STATE
from penstock.deploy.workloads import Bundle, Workload

from .systemd import refuse_nodes

NGINX = "nginx:1.28.0-alpine"
ENVOY = "envoyproxy/envoy:v1.40.0"
"""Pinned by tag; write a digest in their place where you mirror them."""
SUBNET = "${PENSTOCK_FRONT_SUBNET:-10.213.64.0/28}"
"""Of the network between proxy and gateway, whose X-Forwarded-For the gateway believes."""
HTTP, HTTPS = 8080, 8443
"""Ports of the proxy in its container: it is not root."""
GATEWAY_PORT = 8080
RESOLVER = "127.0.0.11"
"""Docker's name server, in every container."""
_SPARE = 30
"""Seconds beyond the drain until a container is killed."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One replica's container."""

    service: str
    workload: Workload
    devices: tuple[str, ...]
    """As `--gpus device=` has them; none on a CPU."""

    @property
    def url(self) -> str:
        """Where the gateway finds it."""
        return f"http://{self.service}:{self.workload.port}"


def engines(bundle: Bundle) -> tuple[Engine, ...]:
    """The floor of every model, on the devices of this machine in the order of the pools.

    Raises StartupError for what one machine does not have.
    """
    refuse_nodes(bundle)
    made: list[Engine] = []
    first: dict[str, int] = {}
    number = 0
    for name, pool in bundle.spec.pools.items():
        mine = [each for each in bundle.workloads if each.tier != "burst" and each.pool_name == name]
        if any(each.device.vendor == "nvidia" for each in mine) and pool.mig is None:
            first[name] = number
            number += pool.count
    for workload in bundle.workloads:
        if workload.tier == "burst":
            continue
        for index in range(workload.replicas):
            service = workload.slug if workload.replicas == 1 else f"{workload.slug}-{index}"
            made.append(Engine(service, workload, tuple(_devices(workload, index, first))))
    if number > 16:
        raise StartupError(
            f"The pools have {number} GPUs, more than one machine has.",
            param="pools",
            advice="Compile for a cluster: --format plain.",
        )
    return tuple(made)


def _devices(workload: Workload, index: int, first: dict[str, int]) -> Iterator[str]:
    if workload.devices == 0:
        return
    if workload.pool.mig is not None:
        variable = f"PENSTOCK_{workload.slug}_{index}_DEVICE".upper().replace("-", "_")
        yield f"${{{variable}:?the UUID of a slice {workload.pool.mig}, from nvidia-smi -L}}"
        return
    start = first[workload.pool_name]
    first[workload.pool_name] += workload.devices
    yield from map(str, range(start, start + workload.devices))


def document(bundle: Bundle, found: tuple[Engine, ...], proxy: Literal["nginx", "envoy"]) -> dict[str, Any]:
    """The compose file."""
    services = {"proxy": _nginx(bundle) if proxy == "nginx" else _envoy(bundle), "gateway": _gateway(bundle)}
    # what depends is stopped first. nginx ends after its streams; Envoy at once, and so after the gateway
    first, condition = ("gateway", "service_healthy") if proxy == "nginx" else ("proxy", "service_started")
    second = "proxy" if proxy == "nginx" else "gateway"
    services[second]["depends_on"] = {first: {"condition": condition}}
    weights = _weights(bundle)
    services |= {each.service: _engine(each, weights) for each in found}
    services |= weights
    made: dict[str, Any] = {
        "name": bundle.namespace,
        "services": services,
        "networks": {
            "front": {"ipam": {"config": [{"subnet": SUBNET}]}},
            "back": {"internal": True},
        },
        "volumes": {"ledger": {}},
    }
    if weights:
        made["networks"]["downloads"] = {}
    if any(not each.workload.weights_path.startswith("demo") for each in found):
        made["volumes"]["weights"] = {}
    return made


def _common(bundle: Bundle, image: str) -> dict[str, Any]:
    return {
        "image": image,
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": f"{math.ceil(bundle.spec.cluster.drain) + _SPARE}s",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}},
    }


def _nginx(bundle: Bundle) -> dict[str, Any]:
    return {
        **_common(bundle, NGINX),
        "user": "101:101",
        "read_only": True,
        "tmpfs": ["/tmp:mode=1777"],
        # ends after its streams
        "stop_signal": "SIGQUIT",
        "entrypoint": ["nginx", "-c", f"{CONFIG}/nginx.conf", "-g", "daemon off;"],
        "ports": _ports(),
        "volumes": [f"./nginx.conf:{CONFIG}/nginx.conf:ro", f"./tls:{CONFIG}/tls:ro"],
        "networks": ["front"],
        "healthcheck": _check(
            ["CMD", "wget", "-q", "--spider", "--no-check-certificate", f"https://127.0.0.1:{HTTPS}/readyz"]
        ),
    }


def _envoy(bundle: Bundle) -> dict[str, Any]:
    drain = math.ceil(bundle.spec.cluster.drain)
    return {
        **_common(bundle, ENVOY),
        "user": "101:101",
        "read_only": True,
        "tmpfs": ["/tmp:mode=1777"],
        "entrypoint": [
            "envoy",
            *("-c", f"{CONFIG}/envoy.yaml"),
            *("--drain-time-s", str(drain)),
            "--disable-hot-restart",
        ],
        "ports": _ports(),
        "volumes": [
            f"./envoy.yaml:{CONFIG}/envoy.yaml:ro",
            f"./certificates.yaml:{CONFIG}/certificates.yaml:ro",
            f"./tls:{CONFIG}/tls:ro",
        ],
        "networks": ["front"],
        # the image has no client; that the port is open says that the certificate was read
        "healthcheck": _check(["CMD", "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{HTTPS}"]),
    }


def _ports() -> list[str]:
    return [f"${{PENSTOCK_HTTP_PORT:-80}}:{HTTP}", f"${{PENSTOCK_HTTPS_PORT:-443}}:{HTTPS}"]


def _gateway(bundle: Bundle) -> dict[str, Any]:
    drain = math.ceil(bundle.spec.cluster.drain)
    return {
        **_common(bundle, bundle.gateway.image),
        "read_only": True,
        "tmpfs": ["/tmp:mode=1777"],
        "working_dir": STATE,
        "entrypoint": ["penstock", "gateway", f"{CONFIG}/penstock.yaml"],
        "command": [
            "--host=0.0.0.0",
            f"--port={GATEWAY_PORT}",
            f"--trusted-proxies={SUBNET}",
            f"--shutdown-timeout={drain}",
            "--log-format=json",
        ],
        "env_file": ["gateway.env"],
        "volumes": [f"./penstock.yaml:{CONFIG}/penstock.yaml:ro", f"ledger:{STATE}"],
        "networks": ["front", "back"],
        "healthcheck": _check(_asked(GATEWAY_PORT, "/readyz"), start="30s"),
    }


def _engine(engine: Engine, weights: Mapping[str, Any]) -> dict[str, Any]:
    workload = engine.workload
    own = workload.engine == "penstock"
    made: dict[str, Any] = {
        "image": workload.image,
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": f"{math.ceil(workload.drain) + _SPARE}s",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}},
        "entrypoint": ["penstock" if own else "vllm", "serve", workload.weights_path],
        "command": [
            "--host=0.0.0.0",
            f"--port={workload.port}",
            f"--served-model-name={workload.model_name}",
            *workload.args,
        ],
        "env_file": ["engine.env"],
        "environment": {"HF_HUB_OFFLINE": "1"},
        # what processes of one engine share; Docker's own 64 MiB are too few
        "shm_size": workload.shm,
        "networks": ["back"],
        "healthcheck": _check(_asked(workload.port, workload.ready_path), start=f"{workload.load_time:.0f}s"),
        "deploy": {"resources": {"limits": {"memory": str(workload.memory)}}},
    }
    if own:
        made |= {"read_only": True, "tmpfs": ["/tmp:mode=1777,exec"]}
    if workload.weights_path.startswith("/models/"):
        made["volumes"] = ["weights:/models:ro"]
        service = f"weights-{workload.slug}"
        if service in weights:
            made["depends_on"] = {service: {"condition": "service_completed_successfully"}}
    if engine.devices:
        made["deploy"]["resources"]["reservations"] = {
            "devices": [{"driver": "nvidia", "device_ids": list(engine.devices), "capabilities": ["gpu"]}]
        }
    return made


def _weights(bundle: Bundle) -> dict[str, Any]:
    """One service for each download. It ends, and engines that need it start then."""
    made: dict[str, Any] = {}
    for workload in bundle.workloads:
        if workload.tier == "burst" or workload.weights.startswith("/") or workload.weights == "demo":
            continue
        made[f"weights-{workload.slug}"] = {
            **_common(bundle, bundle.images["penstock"]),
            "restart": "on-failure:5",
            # goes on where it stopped, compares checksums, and makes current what is whole
            "entrypoint": ["penstock", "models", "pull"],
            "command": [workload.weights, workload.slug, "--store=/models"],
            "env_file": [{"path": "weights.env", "required": False}],
            "environment": {"HF_HOME": "/tmp/huggingface"},
            "volumes": ["weights:/models"],
            "networks": ["downloads"],
        }
    return made


def _asked(port: int, path: str) -> list[str]:
    """Python is in every image of an engine or gateway; curl is not."""
    script = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}{path}', timeout=5)"
    return ["CMD", "python3", "-c", script]


def _check(test: list[str], *, start: str = "10s") -> dict[str, Any]:
    return {"test": test, "interval": "10s", "timeout": "6s", "retries": 3, "start_period": start}
