"""What to do with the files of one machine, in the order in which it is done. For people only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from penstock.deploy.workloads import ENGINE_KEY, Bundle

from .compose import Engine


def compose(bundle: Bundle, engines: Iterable[Engine], proxy: Literal["nginx", "envoy"]) -> str:
    """README.md beside compose.yaml."""
    others = [name for name in bundle.gateway.secrets if name != ENGINE_KEY]
    slices = sorted({each for engine in engines for each in engine.devices if each.startswith("${")})
    lines = [
        f"# {bundle.namespace}: one machine, Docker Compose, {proxy}",
        "",
        "Made by `penstock compile --format compose`. It has no secrets but those that you put there:",
        "",
        "```",
        "umask 077",
        "KEY=$(openssl rand -hex 32)      # between gateway and engines",
        f'printf "{ENGINE_KEY}=%s\\n" "$KEY" > gateway.env',
        *(f'printf "{name}=%s\\n" "…" >> gateway.env' for name in others),
        'printf "PENSTOCK_GATEWAY_KEY=%s\\nVLLM_API_KEY=%s\\n" "$KEY" "$KEY" > engine.env',
        'printf "HF_TOKEN=%s\\n" "…" > weights.env   # for gated weights only',
        "mkdir -p tls && cp …/fullchain.pem tls/tls.crt && cp …/privkey.pem tls/tls.key",
        "chown -R 101:101 tls             # the proxy's user in its container",
        "```",
        "",
    ]
    if slices:
        lines += [
            "Engines on slices of a GPU are told theirs by `.env`; `nvidia-smi -L` lists the UUIDs:",
            "",
            "```",
            *(f"{each[2:].partition(':')[0]}=MIG-…" for each in slices),
            "```",
            "",
        ]
    lines += [
        "```",
        "docker compose config --quiet    # says what is missing",
        "docker compose up --detach",
        "docker compose ps               # until all are healthy",
        "docker compose exec gateway penstock keys create --spec /etc/penstock/penstock.yaml NAME",
        f"curl https://{_host(bundle)}/v1/models -H 'Authorization: Bearer sk-ps-…'",
        "```",
        "",
        "- Only the proxy has ports. Engines are on a network without a way in or out.",
        "- One model is upgraded without the others: change its image, `docker compose up --detach SERVICE`.",
        "- Docker starts again what has ended, not what only hangs: the gateway sends nothing to an engine",
        "  that does not move, and `docker compose ps` shows it. `--format systemd` restarts it.",
        "- `/metrics` and `/admin` are not passed on by the proxy.",
        *_left_out(bundle),
        "",
    ]
    return "\n".join(lines)


def systemd(bundle: Bundle, proxy: Literal["nginx", "envoy"]) -> str:
    """README.md beside the units."""
    secrets = [name for name in bundle.gateway.secrets if name != ENGINE_KEY]
    configs = "nginx.conf" if proxy == "nginx" else "envoy.yaml certificates.yaml"
    lines = [
        f"# {bundle.namespace}: one machine, systemd, {proxy}",
        "",
        "Made by `penstock compile --format systemd`. As root, beside your penstock.yaml:",
        "",
        "```",
        "python3 -m venv /opt/penstock && /opt/penstock/bin/pip install 'penstock[engine]'",
        f"apt-get install nginx-light{'' if proxy == 'nginx' else '    # or Envoy, as /usr/local/bin/envoy'}",
        "install -D -m 644 sysusers.d/penstock.conf /etc/sysusers.d/penstock.conf && systemd-sysusers",
        "install -d -m 755 /etc/penstock",
        "install -m 640 -g penstock penstock.yaml /etc/penstock/penstock.yaml",
        f"install -m 644 -t /etc/penstock {configs}",
        "install -d -m 750 -g penstock-proxy /etc/penstock/tls   # tls.crt, tls.key: readable by the group",
        "install -m 600 /dev/null /etc/penstock/penstock.env        # NAME=value:",
        *(f"#   {name}=…" for name in secrets),
        "install -m 644 -t /etc/systemd/system penstock.service penstock-proxy.service",
        "systemctl daemon-reload && systemctl enable --now penstock penstock-proxy",
        "journalctl -u penstock       # prints the first key, once; gateway.first_key: false keeps it out",
        "```",
        "",
        "- `systemctl reload penstock-proxy` takes a renewed certificate; streams go on."
        if proxy == "nginx"
        else "- Envoy takes a renewed certificate by itself.",
        "- `systemctl stop penstock` waits for requests under way.",
        "- Gateway and engines listen on 127.0.0.1. `/metrics` and `/admin` are not passed on by the proxy.",
        *_left_out(bundle),
        "",
    ]
    return "\n".join(lines)


def _left_out(bundle: Bundle) -> Iterator[str]:
    """What the spec has for clusters, and these files have not."""
    for name, model in bundle.spec.models.items():
        if model.scale is not None:
            yield f"- `scale` of {name} is a cluster's: here are always {model.replicas}."
    for name, job in bundle.spec.jobs.items():
        yield f"- The job {name} is a cluster's. By cron: `penstock batch {job.input} --output FILE`."


def _host(bundle: Bundle) -> str:
    return bundle.spec.cluster.entry.host if bundle.spec.cluster.entry else "llm.example.com"
