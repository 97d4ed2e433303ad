"""A spec on one machine: containers (Docker Compose) or services (systemd), behind nginx or Envoy.

    Bundle ─┬─ compose.py   proxy, gateway and engines as containers; the gateway's spec is derived
            ├─ systemd.py   `penstock up`, and the proxy, as services
            └─ proxy.py ─┬─ nginx.py   TLS, limits by address; streams pass as they come
                         └─ envoy.py   the same
    files(bundle, "compose", "nginx") ─▶ path in the folder → text

Secrets are in files that these name and that are not among them. Nothing is published but the proxy's ports.
"""

from __future__ import annotations

import math
from typing import Literal

from penstock.deploy.derive import CONFIG, derived
from penstock.deploy.objects import dump
from penstock.deploy.workloads import Bundle

from . import compose, envoy, nginx, readme, systemd
from .proxy import Proxy, proxy

Format = Literal["compose", "systemd"]
Kind = Literal["nginx", "envoy"]

__all__ = ["Format", "Kind", "files"]


def files(bundle: Bundle, format: Format = "compose", kind: Kind = "nginx") -> dict[str, str]:
    """Path → text. Raises StartupError, naming the field, for what one machine cannot be."""
    return _compose(bundle, kind) if format == "compose" else _systemd(bundle, kind)


def _compose(bundle: Bundle, kind: Kind) -> dict[str, str]:
    found = compose.engines(bundle)
    urls: dict[str, list[str]] = {}
    for engine in found:
        urls.setdefault(engine.workload.model_name, []).append(engine.url)
    task = proxy(
        bundle.spec,
        gateway=("gateway", compose.GATEWAY_PORT),
        resolver=compose.RESOLVER,
        ports=(compose.HTTP, compose.HTTPS),
        public_port=443,
        certificate=f"{CONFIG}/tls/tls.crt",
        key=f"{CONFIG}/tls/tls.key",
        ipv6=False,  # Docker's own proxy takes it from outside
    )
    made = {
        "compose.yaml": dump(compose.document(bundle, found, kind)),
        "penstock.yaml": derived(bundle, urls),
        **_proxy(task, kind, run="/tmp", folder=CONFIG),
        "README.md": readme.compose(bundle, found, kind),
        # whoever puts this folder under version control keeps secrets out of it
        ".gitignore": "*.env\n.env\ntls/\n",
    }
    return made


def _systemd(bundle: Bundle, kind: Kind) -> dict[str, str]:
    task = proxy(
        bundle.spec,
        gateway=("127.0.0.1", systemd.GATEWAY_PORT),
        ports=(80, 443),
        public_port=443,
        certificate=f"{systemd.CONFIG}/tls/tls.crt",
        key=f"{systemd.CONFIG}/tls/tls.key",
        ipv6=True,
    )
    drain = math.ceil(bundle.spec.cluster.drain)
    systemd.refuse_nodes(bundle)
    return {
        "penstock.service": systemd.penstock_service(bundle).text(),
        "penstock-proxy.service": systemd.proxy_service(kind, drain=drain).text(),
        "sysusers.d/penstock.conf": systemd.sysusers(),
        **_proxy(task, kind, run=systemd.RUN, folder=systemd.CONFIG),
        "README.md": readme.systemd(bundle, kind),
        ".gitignore": "*.env\n.env\ntls/\n",
    }


def _proxy(task: Proxy, kind: Kind, *, run: str, folder: str) -> dict[str, str]:
    if kind == "nginx":
        return {"nginx.conf": nginx.configuration(task, run=run)}
    return {
        "envoy.yaml": dump(envoy.bootstrap(task, certificates=f"{folder}/certificates.yaml")),
        "certificates.yaml": dump(envoy.secrets(task)),
    }
