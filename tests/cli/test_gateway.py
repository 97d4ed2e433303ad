"""`penstock gateway`: what the spec says of its listener, and how its log begins."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from penstock.cli.gateway import admin_config, http_config
from penstock.spec.load import loads


def test_the_listener_is_the_specs() -> None:
    spec = loads("gateway: {port: 1, trusted_proxies: [10.0.0.0/8, unix], admin: {key_env: X, port: 2}}")
    config = http_config(spec)
    assert config.trusted_proxies == ("10.0.0.0/8", "unix")
    assert config.enable_ssl_refresh
    admin = admin_config(spec, config)
    assert admin is not None
    assert (admin.host, admin.port, admin.trusted_proxies) == ("127.0.0.1", 2, config.trusted_proxies)
    assert admin_config(loads("gateway: {admin: {key_env: X}}"), config) is None


def test_its_first_warning_is_a_line_of_its_log(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "penstock.yaml").write_text(
            "pools: {here: {}}\nmodels: {demo: {weights: demo, pool: here}}\n"
            "upstreams: {ours: {url: 'http://127.0.0.1:9', models: {tiny: {}}}}\n"
            f"gateway: {{port: {taken.getsockname()[1]}}}\n"
        )
        done = subprocess.run(
            [sys.executable, "-m", "penstock", "gateway"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    first, *_ = done.stderr.splitlines()
    assert " WARNING  gateway[" in first
    assert first.endswith("are started by `penstock up`, and are not served here: demo")
