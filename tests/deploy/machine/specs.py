"""Specs of one machine."""

from __future__ import annotations

from penstock.cli.init import example
from penstock.deploy.resolve import resolve
from penstock.deploy.workloads import Bundle
from penstock.spec import loads

TWO = """
pools:
  whole: {hardware: A100-80GB, count: 4, price_per_hour: 2.21, price_as_of: 2026-11-01, price_source: list}
  slices: {hardware: A100-80GB, mig: 3g.40gb, count: 2}
models:
  meta/Llama-70B:
    {weights: meta-llama/Llama-2-70b-chat-hf, pool: whole, devices: 4, engine: vllm, max_model_len: 4096}
  small: {weights: Qwen/Qwen2.5-7B-Instruct, pool: slices, replicas: 2, max_model_len: 8192, scale: {max: 2}}
upstreams:
  cloud:
    url: https://api.example.com/v1
    api_key_env: CLOUD_API_KEY
    timeout_headers: 900s
    models: {large: {price: {input: 0.5, output: 1.5, as_of: 2026-11-01, source: list}}}
routes:
  chat:
    targets: [{model: small, weight: 0.9}, {model: meta/Llama-70B, weight: 0.1}]
    fallback: [{model: large, upstream: cloud}]
    comparator: {model: large, upstream: cloud}
    escalate: {verifiers: [{mean_logprob: -0.5}], to: [{model: meta/Llama-70B}]}
    wait: 120s
teams: {research: {limits: {dollars_per_day: 12.5}, key_limits: {requests_per_minute: 6000}}}
gateway: {admin: {key_env: PENSTOCK_ADMIN_KEY, port: 8081}}
cluster: {entry: {host: llm.example.com}, drain: 240s}
"""
"""Four GPUs for one model, slices for two replicas of another, a cloud."""

SPECS = {"init": example(), "two": TWO}


def bundle(text: str) -> Bundle:
    return resolve(loads(text, "penstock.yaml"))
