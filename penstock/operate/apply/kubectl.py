"""kubectl, as the user has it: contexts, credentials and plugins are its own, and nothing else reaches the
cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from penstock.core.errors import PenstockError, StartupError

from .bundle import Object

_LONGEST = 2000
_SECONDS = 120.0


class Refused(PenstockError):
    """The API server, or kubectl, does not do it."""

    done: tuple[str, ...] = ()
    """What was done all the same, a line each: of several objects it applies those that it can."""


class Kubectl:
    """One cluster, through one context."""

    def __init__(
        self,
        *,
        program: str = "kubectl",
        context: str | None = None,
        kubeconfig: str | None = None,
        namespace: str | None = None,
    ) -> None:
        """Raises StartupError where there is no such program."""
        found = shutil.which(program)
        if found is None:
            raise StartupError(
                f"There is no {program} here.",
                param="--kubectl",
                advice="Install it, or apply from where it is: kubectl apply --server-side -f DIR",
            )
        self._program = found
        self._flags = [
            *(("--kubeconfig", kubeconfig) if kubeconfig else ()),
            *(("--context", context) if context else ()),
            *(("--namespace", namespace) if namespace else ()),
        ]

    def apply(
        self, objects: Sequence[Object], *, manager: str, force: bool, dry_run: str = "none"
    ) -> list[str]:
        """Server-side; what became of each, a line each. Raises Refused, with the server's words."""
        words = ["apply", "--server-side", f"--field-manager={manager}", "-f", "-"]
        words += ["--force-conflicts"] if force else []
        words += [f"--dry-run={dry_run}"] if dry_run != "none" else []
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        return self._run(words, json.dumps(listed)).splitlines()

    def kustomize(self, folder: str) -> str:
        """A folder, rendered."""
        return self._run(["kustomize", folder])

    def get(self, kinds: str, namespace: str | None) -> list[Object]:
        """Objects of these kinds; none of a kind that the cluster does not know. Raises Refused."""
        words = ["get", kinds, "-o", "json", *(("-n", namespace) if namespace else ()), "--ignore-not-found"]
        text = self._run(words)
        found: Any = json.loads(text) if text.strip() else {}
        items: list[Object] = found.get("items", [])
        return items

    def log(self, pod: str, container: str, namespace: str, *, previous: bool) -> str:
        """The end of what a container has said; empty where it has said nothing."""
        words = [
            "logs",
            pod,
            "-c",
            container,
            "-n",
            namespace,
            "--tail=200",
            *(["--previous"] if previous else []),
        ]
        try:
            return self._run(words)
        except Refused:
            return ""

    def _run(self, words: Sequence[str], stdin: str | None = None) -> str:
        try:
            done = subprocess.run(
                [self._program, *self._flags, *words],
                input=stdin,
                stdin=None if stdin is not None else subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            raise Refused(f"kubectl {words[0]} has not ended after {_SECONDS:g} s.") from None
        if done.returncode:
            error = _refused(words[0], (done.stderr or done.stdout).strip())
            error.done = tuple(done.stdout.splitlines()) if done.stderr else ()
            raise error
        return done.stdout


def _refused(what: str, said: str) -> Refused:
    """kubectl's words, and what to do about those that are common."""
    advice = ""
    for pattern, then in _ADVICE:
        if re.search(pattern, said):
            advice = then
            break
    return Refused(f"kubectl {what}: {said[:_LONGEST]}".rstrip(".") + ".", advice=advice)


_ADVICE = (
    (
        r"conflict with \"|Apply failed with \d+ conflict",
        "Somebody else manages these fields (an autoscaler, `kubectl edit`, another field manager): take "
        "them out of the bundle, or take them over with --force-conflicts.",
    ),
    (
        r"no matches for kind \"(?P<kind>\w+)\"|the server doesn't have a resource type",
        "The cluster does not know that kind: install what brings it (KEDA, the Prometheus operator, "
        "LeaderWorkerSet, cert-manager, the Gateway API) first.",
    ),
    (
        r"namespaces \".*\" not found",
        "Apply the Namespace first; a dry run cannot look behind one that is not there.",
    ),
    (r"violates PodSecurity", "The namespace's Pod Security level forbids it: change the pod, or the level."),
    (r"exceeded quota", "A ResourceQuota of the namespace is used up: `kubectl describe quota`."),
    (r"(?i)forbidden|unauthorized", "Look at who you are and what you may: `kubectl auth can-i --list`."),
    (
        r"connection refused|no such host|i/o timeout|Unable to connect|was refused",
        "The cluster does not answer: look at `kubectl config current-context`, or say --context.",
    ),
    (r"context .* does not exist|no context exists", "`kubectl config get-contexts` lists them."),
    (
        r"field not declared in schema|unknown field",
        "The cluster's Kubernetes does not know that field: it is older than what this was written for, or "
        "the field is misspelt, and `penstock check` names file and line.",
    ),
)
