"""Specs that every bundle test goes through: models, devices, autoscalers, providers, entries, ledgers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from penstock.cli.init import example
from penstock.deploy.resolve import resolve
from penstock.deploy.workloads import Bundle
from penstock.spec import loads

SPECS: dict[str, str] = {
    # what `penstock init` writes, unchanged
    "init": example(),
    # the source documents' two models on one A100, as slices (S3, T18)
    "mig": """
pools:
  slices: {hardware: A100-80GB, mig: 3g.40gb, count: 2, nodes: {devices: 1}}
models:
  vl: {weights: Qwen/Qwen3-VL-8B-Instruct, engine: vllm, pool: slices, max_model_len: 8192}
  text:
    {weights: RedHatAI/Qwen3-32B-quantized.w8a8, engine: vllm, pool: slices, quantization: int8,
     max_model_len: 4096}
cluster: {provider: aks, entry: {host: llm.example.com}}
""",
    # three models, whole GPUs, a floor on demand and a burst on spot, KEDA, all around them (S1, S2, S35)
    "hub": """
pools:
  realtime: {hardware: A100-80GB, count: 4, price_per_hour: 3.67, price_as_of: 2026-11-01, price_source: x}
  l4-spot:
    {hardware: L4, count: 6, purchase: spot, price_per_hour: 0.3, price_as_of: 2026-11-01, price_source: x}
models:
  qwen3-vl: {weights: Qwen/Qwen3-VL-8B-Instruct, engine: vllm, pool: realtime, replicas: 2,
              slo: {ttft_p95: 2s, e2e_p95: 60s}}
  qwen3-8b: {weights: Qwen/Qwen3-8B, pool: realtime, scale: {max: 4, burst: l4-spot},
              slo: {ttft_p95: 1s}, flags: {max-num-queued-reqs: 200}}
  BAAI/bge-m3: {weights: BAAI/bge-m3, engine: vllm, pool: l4-spot}
upstreams:
  cloud:
    url: https://api.example.com/v1
    api_key_env: CLOUD_API_KEY
    models: {large: {price: {input: 0.5, output: "1.50", as_of: 2026-11-01, source: list}}}
routes:
  assistant:
    targets: [{model: qwen3-8b}]
    fallback: [{model: large, upstream: cloud}]
    aliases: [default]
    max_tokens: {ceiling: 1024, default: 256}
    escalate:
      verifiers: [{finish_reason: [stop]}]
      to: [{model: large, upstream: cloud}]
    shadow: [{model: qwen3-vl, weight: 0.1}]
teams: {search: {limits: {dollars_per_day: 20.5}, routes: [assistant, qwen3-vl]}}
gateway:
  workers: 2
  admin: {key_env: PENSTOCK_ADMIN_KEY, port: 8081}
  metrics_key_env: METRICS_KEY
ledger: {url: "postgresql://penstock@db.example.com/penstock"}
jobs:
  reindex: {schedule: "0 2 * * *", input: /data/requests.jsonl, output: /data/answers.jsonl,
             volume: documents, key_secret: reindex-key}
  once: {input: /data/a.jsonl, output: /data/b.jsonl, volume: documents, key_secret: reindex-key}
cluster:
  provider: eks
  autoscaler: keda
  entry: {host: llm.example.com, class_name: nginx, tls: {issuer: letsencrypt}}
  images: {registry: registry.example.com/llm, pull_secret: registry}
  storage: {storage_class: efs, token_secret: hf}
""",
    # tensor parallel over four devices, HorizontalPodAutoscaler, the Gateway API
    "tp4": """
pools: {a100: {hardware: A100-80GB, count: 12, nodes: {devices: 4}}}
models:
  llama-70b: {weights: meta-llama/Llama-3.1-70B, engine: vllm, pool: a100, devices: 4, scale: {max: 3},
              slo: {ttft_p99: 5s}}
cluster:
  provider: gke
  autoscaler: hpa
  entry: {kind: gateway-api, class_name: edge, gateway_namespace: infra, host: llm.example.com,
          tls: {issuer: le}}
""",
    # more than one node
    "nodes": """
pools: {h100: {hardware: H100, count: 32}}
models:
  huge: {weights: meta-llama/Llama-3.1-405B, engine: vllm, pool: h100, devices: 16, nodes: 2,
         max_model_len: 16384, scale: {max: 2}}
cluster: {provider: eks}
""",
    # our engine on a GPU, another one in its pool, volumes of their own, TLS that is there already
    "penstock-gpu": """
pools:
  l4: {hardware: L4, count: 4, nodes: {labels: {team: search}, taints: [{key: dedicated, value: llm}]}}
models:
  small: {weights: Qwen/Qwen2.5-7B-Instruct, pool: l4, replicas: 2, max_model_len: 4096}
  own: {weights: Qwen/Qwen3-8B, engine: vllm, pool: l4}
ledger: {url: "postgresql://penstock@db/penstock"}
cluster:
  storage: {access: ReadWriteOnce}
  entry: {host: llm.example.com, class_name: alb, tls: {secret: tls}}
""",
}


@cache
def bundle_of(name: str) -> Bundle:
    """The bundle of one of the specs."""
    return resolve(loads(SPECS[name], f"{name}.yaml"))


def shared() -> Path | None:
    """The folder beside the repository with definitions of custom resources and the source documents."""
    root = Path(__file__).resolve().parents[2]
    git = root / ".git"
    if git.is_file():  # another work tree of a repository: .../main/.git/worktrees/NAME
        root = Path(git.read_text().partition("gitdir: ")[2].strip()).parents[2]
    folder = root.parent / "shared"
    return folder if (folder / "crds").is_dir() else None
