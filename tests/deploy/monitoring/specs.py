"""Specs whose monitoring is tested, and what is compiled from them."""

from __future__ import annotations

import functools
import json
from typing import Any

from penstock.deploy import monitoring
from penstock.deploy.resolve import resolve
from penstock.deploy.workloads import Bundle
from penstock.spec.load import loads

FULL = """
version: 1
pools:
  gpu: {hardware: A100-80GB, count: 4, price_per_hour: 2.0, price_as_of: 2026-06-01}
  spot: {hardware: A100-80GB, count: 8, purchase: spot, price_per_hour: 0.8, price_as_of: 2026-06-01}
models:
  chat:
    weights: Qwen/Qwen2.5-7B-Instruct
    engine: ENGINE
    pool: gpu
    replicas: 1
    max_model_len: 8192
    flags: {max-num-seqs: SLOTS}
    slo: {ttft_p95: 500ms, itl_p99: 80ms, e2e_p95: 30s}
    scale: {max: 8, burst: spot, waiting: 10, utilization: 0.8}
  small.model:
    weights: Qwen/Qwen2.5-7B-Instruct
    engine: ENGINE
    pool: gpu
    replicas: 2
    max_model_len: 4096
routes:
  chat: {targets: [{model: chat}]}
teams:
  search: {limits: {dollars_per_day: 24, gpu_hours_per_month: 720}}
gateway: {metrics_key_env: PENSTOCK_METRICS_KEY}
cluster: {autoscaler: SCALER, load_time: LOAD}
"""
"""Floor and burst on spot, an SLO, a budget."""


GROUPS = """
version: 1
pools: {h100: {hardware: H100, count: 32}}
models:
  huge: {weights: meta-llama/Llama-3.1-405B, engine: vllm, pool: h100, devices: 16, nodes: 2,
         max_model_len: 16384, scale: {max: 2}}
cluster: {load_time: 60}
"""
"""A replica of two nodes, floor and burst."""


@functools.cache
def bundle(engine: str = "penstock", scaler: str = "keda", slots: int = 16, load_time: int = 60) -> Bundle:
    """What is resolved from FULL; of the engine `groups`, from GROUPS."""
    if engine == "groups":
        return resolve(loads(GROUPS))
    text = FULL.replace("ENGINE", engine).replace("SCALER", scaler)
    return resolve(loads(text.replace("SLOTS", str(slots)).replace("LOAD", str(load_time))))


@functools.cache
def compiled(
    engine: str = "penstock", scaler: str = "keda", slots: int = 16, load_time: int = 60
) -> tuple[dict[str, Any], ...]:
    """Its objects of monitoring as Kubernetes has them, by way of JSON."""
    plain = [each.to_dict() for each in monitoring.objects(bundle(engine, scaler, slots, load_time))]
    return tuple(json.loads(json.dumps(plain)))


def rules(engine: str = "penstock", scaler: str = "keda") -> dict[str, Any]:
    """The rule file: what is in the PrometheusRule."""
    (found,) = (each for each in compiled(engine, scaler) if each["kind"] == "PrometheusRule")
    return dict(found["spec"])


def alerts(engine: str = "penstock", scaler: str = "keda") -> list[dict[str, Any]]:
    """All alerts."""
    return [rule for group in rules(engine, scaler)["groups"] for rule in group["rules"]]
