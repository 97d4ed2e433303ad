"""A compiled bundle as plain data, to be broken at one place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from penstock.check.finding import Finding
from penstock.check.run import Options, check_text
from penstock.deploy import formats, monitoring
from penstock.deploy.objects.yaml import dump_all
from penstock.deploy.resolve import resolve
from penstock.spec import loads

SPECS = {
    "hub": """
pools:
  realtime: {hardware: A100-80GB, count: 5}
  cheap: {hardware: L4, count: 8, purchase: spot}
models:
  chat: {weights: Qwen/Qwen3-8B, pool: realtime, replicas: 2, scale: {max: 4, burst: cheap},
         slo: {ttft_p95: 1s}}
  vision: {weights: Qwen/Qwen3-VL-8B-Instruct, engine: vllm, pool: realtime, replicas: 2, max_model_len: 8192}
ledger: {url: "postgresql://penstock@db.example.com/penstock"}
cluster: {provider: aks, entry: {host: llm.example.com, class_name: nginx, tls: {issuer: letsencrypt}},
          storage: {token_secret: hf}}
""",
    "mig": """
pools: {slices: {hardware: A100-80GB, mig: 3g.40gb, count: 4}}
models:
  text: {weights: Qwen/Qwen2.5-7B-Instruct, engine: vllm, pool: slices, replicas: 2, max_model_len: 4096}
""",
    "tp4": """
pools: {a100: {hardware: A100-80GB, count: 20}}
models:
  large: {weights: meta-llama/Llama-3.1-70B, engine: vllm, pool: a100, devices: 4, replicas: 2,
          scale: {max: 5}, max_model_len: 8192}
cluster:
  provider: gke
  autoscaler: hpa
  entry: {kind: gateway-api, class_name: edge, host: llm.example.com}
""",
    "nodes": """
pools: {h100: {hardware: H100, count: 64}}
models:
  huge: {weights: meta-llama/Llama-3.1-405B, engine: vllm, pool: h100, devices: 16, nodes: 2, replicas: 2,
         max_model_len: 16384}
cluster: {provider: eks}
""",
}
"""Specs with nothing to blame."""


def shared(name: str) -> Path | None:
    """A folder beside the repository; None where it is absent."""
    for parent in Path(__file__).resolve().parents:
        for found in (parent / "shared" / name, parent / "work" / "shared" / name):
            if found.is_dir():
                return found
    return None


def options(free_gpus: int | None = None) -> Options:
    """With the definitions of custom resources, where they are."""
    crds = shared("crds")
    return Options(crds=(crds,) if crds else (), free_gpus=free_gpus)


@cache
def files(name: str, format: formats.Format = "plain") -> dict[str, str]:
    """The files of one of the specs."""
    return formats.files(resolve(loads(SPECS[name])), format)


@cache
def _objects(name: str) -> list[dict[str, Any]]:
    from penstock.deploy.bundle import objects

    bundle = resolve(loads(SPECS[name]))
    found = [each.to_dict() for each in objects(bundle)]
    names = {(each["kind"], each["metadata"]["name"]) for each in found}
    more = (each.to_dict() for each in monitoring.objects(bundle))
    found += (each for each in more if (each["kind"], each["metadata"]["name"]) not in names)
    # dashboards are nine tenths of the text, and no mutation's matter
    return [each for each in found if not each["metadata"]["name"].startswith("dashboard")]


class Bundle:
    """Objects of a compiled bundle."""

    def __init__(self, name: str) -> None:
        self.objects = copy.deepcopy(_objects(name))

    def get(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """An object; the first of its kind without a name. Skips the test if the bundle has none."""
        for each in self.objects:
            if each["kind"] == kind and name in (None, each["metadata"]["name"]):
                return each
        pytest.skip(f"the bundle has no {kind} {name or ''}")

    def remove(self, kind: str, name: str | None = None) -> None:
        """Take an object away."""
        self.objects.remove(self.get(kind, name))

    def pod(self, name: str, kind: str = "Deployment") -> dict[str, Any]:
        """The pod specification of a workload."""
        spec = self.get(kind, name)["spec"]
        if kind == "LeaderWorkerSet":
            return spec["leaderWorkerTemplate"]["leaderTemplate"]["spec"]
        return spec["template"]["spec"]

    def container(self, name: str, kind: str = "Deployment") -> dict[str, Any]:
        """The first container of a workload."""
        return self.pod(name, kind)["containers"][0]

    def text(self) -> str:
        return dump_all(self.objects)


def found(text: str) -> list[Finding]:
    """All findings of a text, in order."""
    return check_text(text, "bundle.yaml", options())


@cache
def unbroken(name: str) -> frozenset[tuple[str, str]]:
    """(rule, what) of the bundle as it is compiled."""
    return frozenset((each.rule.id, each.what) for each in found(Bundle(name).text()))


def new_findings(name: str, mutate: Callable[[Bundle], object]) -> Iterator[Finding]:
    """What a mutation brings."""
    bundle = Bundle(name)
    before = bundle.text()
    mutate(bundle)
    after = bundle.text()
    assert after != before, "the mutation changes nothing"
    known = unbroken(name)
    return (each for each in found(after) if (each.rule.id, each.what) not in known)
