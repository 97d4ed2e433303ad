"""A real control plane on this machine: etcd, kube-apiserver, kube-scheduler and kube-controller-manager.

There is no package of them for Python, npm or Debian's stable (which builds kubectl alone from its source
package `kubernetes`); whoever has the binaries names their folder in PENSTOCK_TEST_KUBERNETES, or has them in
PATH. There is no kubelet: nodes are objects, and a test says what became of a pod, as a kubelet would.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.ports import free_port

NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "openssl")
_TOKEN = "test-0123456789"
_PATIENCE = 120.0


def binaries() -> dict[str, str] | None:
    """Where they are; None where one is missing."""
    path = os.pathsep.join((os.environ.get("PENSTOCK_TEST_KUBERNETES", ""), os.environ["PATH"]))
    found = {name: shutil.which(name, path=path) for name in NAMES}
    return {name: str(path) for name, path in found.items()} if all(found.values()) else None


class Cluster:
    """One; its end is `stop`."""

    def __init__(self, folder: Path) -> None:
        found = binaries()
        assert found is not None
        self._binaries, self._folder = found, folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.kubeconfig = folder / "kubeconfig"
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        folder = self._folder
        clients, peers, api = free_port(), free_port(), free_port()
        etcd = f"http://127.0.0.1:{clients}"
        peer = f"http://127.0.0.1:{peers}"
        self._run(
            "etcd", "--data-dir", f"{folder}/etcd", "--unsafe-no-fsync",
            "--listen-client-urls", etcd, "--advertise-client-urls", etcd, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
        )  # fmt: skip
        key = folder / "sa.key"
        subprocess.run(
            [self._binaries["openssl"], "genrsa", "-out", str(key), "2048"], check=True, capture_output=True
        )
        (folder / "tokens.csv").write_text(f'{_TOKEN},admin,1,"system:masters"\n')
        self._run(
            "kube-apiserver", "--etcd-servers", etcd, "--cert-dir", f"{folder}/certs",
            "--secure-port", str(api), "--bind-address", "127.0.0.1",
            "--service-cluster-ip-range", "10.0.0.0/24", "--service-account-issuer", "https://k8s",
            "--service-account-key-file", str(key), "--service-account-signing-key-file", str(key),
            "--token-auth-file", f"{folder}/tokens.csv", "--authorization-mode", "RBAC",
            "--disable-admission-plugins", "ServiceAccount,TaintNodesByCondition",
        )  # fmt: skip
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
                    "users": [{"name": "admin", "user": {"token": _TOKEN}}],
                    "clusters": [
                        {
                            "name": "test",
                            "cluster": {
                                "server": f"https://127.0.0.1:{api}",
                                "insecure-skip-tls-verify": True,
                            },
                        }
                    ],
                }
            )
        )
        end = time.monotonic() + _PATIENCE
        while self.kubectl("get", "--raw", "/readyz", check=False) is None:
            if time.monotonic() > end or any(each.poll() is not None for each in self._processes):
                raise RuntimeError((folder / "kube-apiserver.log").read_text()[-2000:])
        common = ("--kubeconfig", str(self.kubeconfig), "--leader-elect=false")
        # nodes of which no kubelet tells are left as they are
        self._run("kube-controller-manager", *common, "--controllers", "*,-nodelifecycle,-tokencleaner",
                  "--pvclaimbinder-sync-period", "1s")  # fmt: skip
        self._run("kube-scheduler", *common)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

    def kubectl(self, *words: str, stdin: Any = None, check: bool = True) -> str | None:
        """What it says; None where it fails and that is no error."""
        done = subprocess.run(
            [self._binaries["kubectl"], f"--kubeconfig={self.kubeconfig}", "--request-timeout=20s", *words],
            input=None if stdin is None else json.dumps(stdin),
            capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode and check:
            raise AssertionError(f"kubectl {' '.join(words)}: {done.stderr}")
        return None if done.returncode else done.stdout

    def get(self, *words: str) -> Any:
        """Objects."""
        return json.loads(self.kubectl("get", *words, "-o", "json") or "null")

    def add_node(self, name: str, capacity: Mapping[str, str], **more: Any) -> None:
        """A node that is ready; nothing runs on it."""
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": more,
        }
        self.kubectl("create", "-f", "-", stdin=node)
        told = {"cpu": "16", "memory": "128Gi", "pods": "110", **capacity}
        self.patch_status(f"nodes/{name}", {
            "capacity": told,
            "allocatable": told,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        })  # fmt: skip

    def patch_status(self, name: str, status: Mapping[str, Any], namespace: str | None = None) -> None:
        """Say what became of something, as who runs it would."""
        kind, _, name = name.partition("/")
        base = f"/api/v1/namespaces/{namespace}" if namespace else "/api/v1"
        path = f"{base}/{kind}/{name}/status"
        found = json.loads(self.kubectl("get", "--raw", f"{base}/{kind}/{name}") or "{}")
        found["status"] = {**found.get("status", {}), **status}
        self.kubectl("replace", "--raw", path, "-f", "-", stdin=found)

    def _run(self, name: str, *flags: str) -> None:
        with open(self._folder / f"{name}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen([self._binaries[name], *flags], stdout=log, stderr=log, cwd=self._folder)
            )
