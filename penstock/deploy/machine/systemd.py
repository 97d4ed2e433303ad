"""One machine under systemd: `penstock up` as a service, and the proxy in front of it as another.

    penstock.service          engines and gateway, on loopback; `up` watches its engines and starts them again
    penstock-proxy.service    nginx or Envoy: TLS, limits by address; reloads without breaking a stream
    penstock.conf             sysusers.d: their users

The spec is used as it is. Hardening and its words: systemd.exec(5); `systemd-analyze security` grades it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.core.errors import StartupError
from penstock.deploy.workloads import ENGINE_KEY, Bundle

PREFIX = "/opt/penstock"
"""A virtual environment with Penstock."""
CONFIG = "/etc/penstock"
STATE = "/var/lib/penstock"
RUN = "/run/penstock-proxy"
GATEWAY_PORT = 8080
_SPARE = 30
"""Seconds beyond the drain, in which engines end."""

Value = str | int | bool | tuple[str, ...]
"""Several: the key is written once for each."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit file: sections with their keys, in order."""

    comment: str
    sections: Mapping[str, Mapping[str, Value]]

    def text(self) -> str:
        """The file."""
        lines = [f"# {line}".rstrip() for line in self.comment.splitlines()]
        for name, entries in self.sections.items():
            lines += ["", f"[{name}]"]
            lines += [f"{key}={_word(each)}" for key, value in entries.items() for each in _each(value)]
        return "\n".join(lines) + "\n"


def _each(value: Value) -> tuple[str | int | bool, ...]:
    return value if isinstance(value, tuple) else (value,)


def _word(value: str | int | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value).replace("\n", " ")


def command(words: Iterable[str]) -> str:
    """ExecStart's way to write a command: `%` and `$` doubled, quotes where there is a space."""
    return " ".join(word if re.fullmatch(r"[^\s\"'\\;$%]+", word) else _quoted(word) for word in words)


def _quoted(word: str) -> str:
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"'


def refuse_nodes(bundle: Bundle) -> None:
    """Raise StartupError for a model whose replicas have several nodes."""
    for workload in bundle.workloads:
        if workload.nodes > 1:
            raise StartupError(
                f"models.{workload.model_name}.nodes is {workload.nodes}, and this is one machine.",
                param=f"models.{workload.model_name}.nodes",
                advice="Leave nodes out, or compile for a cluster: --format plain.",
            )


def penstock_service(bundle: Bundle) -> Unit:
    """Engines and gateway. Its end waits for requests under way."""
    spec = bundle.spec
    drain = math.ceil(spec.cluster.drain)
    gpus = any(each.device.vendor == "nvidia" for each in bundle.workloads)
    secret = bool(set(bundle.gateway.secrets) - {ENGINE_KEY})
    service: dict[str, Value] = {
        "Type": "exec",
        "User": "penstock",
        "Group": "penstock",
        "StateDirectory": "penstock",
        "StateDirectoryMode": "0750",
        "RuntimeDirectory": "penstock",
        # relative paths of the spec, as the ledger's, are there
        "WorkingDirectory": STATE,
        "Environment": (
            f"HOME={STATE}",
            f"HF_HOME={STATE}/huggingface",
            "XDG_RUNTIME_DIR=/run/penstock",
            "PYTHONUNBUFFERED=1",
        ),
        # NAME=value lines, mode 0600: upstreams' keys and their like. Never part of this folder.
        "EnvironmentFile": f"{'' if secret else '-'}{CONFIG}/penstock.env",
        "ExecStart": command(
            [
                f"{PREFIX}/bin/penstock",
                "up",
                f"{CONFIG}/penstock.yaml",
                "--host=127.0.0.1",
                f"--port={GATEWAY_PORT}",
                "--trusted-proxies=127.0.0.1",
                f"--shutdown-timeout={drain}",
            ]
        ),
        # SIGTERM to `up` alone: it ends its engines itself, after the requests
        "KillMode": "mixed",
        "TimeoutStopSec": f"{drain + _SPARE}s",
        "Restart": "always",
        "RestartSec": "5s",
        # 2 says that the spec cannot work; trying again does not help
        "RestartPreventExitStatus": "2",
        # an engine that is killed for memory is started again by `up`
        "OOMPolicy": "continue",
        "LimitNOFILE": 65536,
        "TasksMax": "infinity",
        **_hardening(),
        **(_gpus() if gpus else {"PrivateDevices": True}),
        # compiled kernels, and what torch and Triton compile, are memory that is written and then run
        "MemoryDenyWriteExecute": False,
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "SystemCallFilter": ("@system-service", "~@privileged" if not gpus else "~@obsolete"),
    }
    unit: dict[str, Value] = {
        "Description": "Penstock: engines and gateway",
        "Documentation": "https://github.com/penstock/penstock/tree/main/docs",
        "Wants": "network-online.target",
        "After": "network-online.target nvidia-persistenced.service",
        "StartLimitIntervalSec": 0,
    }
    return Unit(
        "Engines and the gateway of /etc/penstock/penstock.yaml, on loopback only.",
        {"Unit": unit, "Service": service, "Install": {"WantedBy": "multi-user.target"}},
    )


def proxy_service(kind: Literal["nginx", "envoy"], *, drain: int) -> Unit:
    """The proxy. A reload takes a new configuration and a renewed certificate."""
    service: dict[str, Value] = {
        "Type": "exec",
        "User": "penstock-proxy",
        "Group": "penstock-proxy",
        "RuntimeDirectory": "penstock-proxy",
        "AmbientCapabilities": "CAP_NET_BIND_SERVICE",
        **_hardening(),
        "CapabilityBoundingSet": "CAP_NET_BIND_SERVICE",
        "PrivateDevices": True,
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
        "SystemCallFilter": ("@system-service", "~@privileged @resources"),
        "TimeoutStopSec": f"{drain + _SPARE}s",
        "Restart": "always",
        "RestartSec": "2s",
        "LimitNOFILE": 65536,
    }
    if kind == "nginx":
        conf = f"{CONFIG}/nginx.conf"
        service |= {
            "MemoryDenyWriteExecute": True,
            "ExecStartPre": command(["/usr/sbin/nginx", "-t", "-q", "-c", conf]),
            "ExecStart": command(["/usr/sbin/nginx", "-c", conf, "-g", "daemon off;"]),
            "ExecReload": (
                command(["/usr/sbin/nginx", "-t", "-q", "-c", conf]),
                "/bin/kill -s HUP $MAINPID",
            ),
            # SIGQUIT ends it after its streams
            "KillSignal": "SIGQUIT",
            "KillMode": "mixed",
        }
    else:
        conf = f"{CONFIG}/envoy.yaml"
        service |= {
            "ExecStartPre": command(["/usr/local/bin/envoy", "--mode", "validate", "-c", conf]),
            "ExecStart": command(
                ["/usr/local/bin/envoy", "-c", conf, "--drain-time-s", str(drain), "--disable-hot-restart"]
            ),
        }
    unit: dict[str, Value] = {
        "Description": f"Penstock: {kind} in front of the gateway",
        # stopped in the other order: nginx ends after its streams; Envoy at once, and so after the gateway
        **({"After": "network-online.target penstock.service"} if kind == "nginx" else {}),
        **({"After": "network-online.target", "Before": "penstock.service"} if kind == "envoy" else {}),
        "Wants": "network-online.target penstock.service",
        "StartLimitIntervalSec": 0,
    }
    return Unit(
        "TLS, limits by address, streams passed on as they come.",
        {"Unit": unit, "Service": service, "Install": {"WantedBy": "multi-user.target"}},
    )


def sysusers() -> str:
    """Users without a shell, for sysusers.d(5). The proxy's reads the certificate, nothing of Penstock's."""
    return (
        "# Users of penstock.service and penstock-proxy.service\n"
        f'u penstock - "Penstock" {STATE}\n'
        'u penstock-proxy - "Proxy in front of Penstock" /\n'
    )


def _hardening() -> dict[str, Value]:
    return {
        "NoNewPrivileges": True,
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": True,
        "PrivateTmp": True,
        "PrivateMounts": True,
        "ProtectClock": True,
        "ProtectHostname": True,
        "ProtectKernelLogs": True,
        "ProtectKernelModules": True,
        "ProtectKernelTunables": True,
        "ProtectControlGroups": True,
        "ProtectProc": "invisible",
        "LockPersonality": True,
        "RemoveIPC": True,
        "RestrictNamespaces": True,
        "RestrictRealtime": True,
        "RestrictSUIDSGID": True,
        "SystemCallArchitectures": "native",
        "SystemCallErrorNumber": "EPERM",
        "UMask": "0077",
    }


def _gpus() -> dict[str, Value]:
    """NVIDIA's devices and no others. The driver's modules are loaded before: this service cannot."""
    kinds = ("nvidia", "nvidia-frontend", "nvidia-uvm", "nvidia-caps", "nvidiactl")
    return {
        "DevicePolicy": "closed",
        "DeviceAllow": tuple(f"char-{kind} rw" for kind in kinds),
    }
