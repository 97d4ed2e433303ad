"""Rules on penstock.yaml."""

from __future__ import annotations

import textwrap
from importlib import resources

import pytest
import yaml

from .finding import of, places, rules

BASE = """\
version: 1
pools:
  gpu: {hardware: A100-80GB, count: 8, price_per_hour: 2, price_as_of: 2026-11-01, price_source: list}
models:
  chat:
    weights: Qwen/Qwen3-8B
    engine: vllm
    pool: gpu
    replicas: 2
    max_model_len: 8192
routes:
  assistant:
    targets: [{model: chat}]
    max_tokens: {ceiling: 512}
teams:
  research: {limits: {dollars_per_day: 5}}
tags:
  feature: {search: {limits: {dollars_per_day: 1}}}
"""


def changed(*path: str, **entries: object) -> str:
    """The base with other entries at a path; None takes one away."""
    data = yaml.safe_load(BASE)
    part = data
    for key in path:
        part = part.setdefault(key, {})
    for name, value in entries.items():
        if value is None:
            part.pop(name)
        else:
            part[name] = value
    return yaml.safe_dump(data, sort_keys=False)


def test_what_is_right_is_not_flagged() -> None:
    assert of(BASE, "penstock.yaml") == []


def test_the_example_of_init_has_notes_only() -> None:
    text = resources.files("penstock.spec").joinpath("example.yaml").read_text()
    assert {each.rule.severity.value for each in of(text, "penstock.yaml")} <= {"note"}


@pytest.mark.parametrize(
    ("path", "entries", "rule"),
    [
        (("routes", "assistant"), {"max_tokens": None}, "route-uncapped"),
        (("routes", "assistant"), {"max_tokens": {"default": 5}}, "route-uncapped"),
        (("teams",), {"research": {}}, "team-unlimited"),
        ((), {"teams": None}, "team-unlimited"),
        ((), {"tags": None}, "features-unlimited"),
        (("gateway",), {"host": "0.0.0.0"}, "gateway-plain"),
        (("cluster", "entry"), {"host": "llm.example.com"}, "gateway-plain"),
        (("pools", "gpu"), {"price_as_of": None}, "price-undated"),
        (("pools", "gpu"), {"price_source": None}, "price-undated"),
        (("pools", "gpu"), {"time_slicing": 4}, "time-slicing-served"),
        (("models", "chat"), {"max_model_len": 131_072}, "context-just-in-case"),
        (("models", "chat"), {"replicas": 1}, "single-replica"),
        (("models", "chat"), {"flags": {"gpu-memory-utilisation": 0.9}}, "flag-unknown"),
        (("models", "chat"), {"flags": {"gpu-memory-utilization": 90}}, "flag-value"),
        (("models", "chat"), {"flags": {"swap-space": 4}}, "flag-removed"),
        (("models", "chat"), {"flags": {"trust-remote-code": True}}, "trust-remote-code"),
        (("models", "chat"), {"pol": "gpu"}, "spec-invalid"),
        (("models", "chat"), {"pool": "cpu"}, "spec-invalid"),
        (("models", "chat"), {"scale": {"max": 99}}, "spec-invalid"),
    ],
)
def test_one_thing_wrong(path: tuple[str, ...], entries: dict[str, object], rule: str) -> None:
    assert rules(changed(*path, **entries), "penstock.yaml") == {rule}


def test_limits_for_all_keys_are_enough() -> None:
    assert of(changed("teams", research={}) + "limits: {requests_per_minute: 60}\n", "penstock.yaml") == []


def test_a_route_may_say_what_the_context_is_for() -> None:
    text = BASE.replace("max_model_len: 8192", "max_model_len: 131072")
    text = text.replace(
        "    max_tokens: {ceiling: 512}", "    max_tokens: {ceiling: 512}\n    context: 131072"
    )
    assert of(text, "penstock.yaml") == []


@pytest.mark.parametrize(
    ("model", "pool", "what"),
    [
        # T20: 140 GB do not go on one device of 80 GB
        ({"weights": "meta-llama/Llama-3.1-70B-Instruct"}, {}, "its weights alone take 141"),
        # T19: 32 GB of INT8 in a slice of 40 GB leave little: not one request of 32K
        (
            {"weights": "RedHatAI/Qwen3-32B-quantized.w8a8", "max_model_len": 32_768},
            {"mig": "3g.40gb"},
            "stay for the KV cache",
        ),
        ({"weights": "Qwen/Qwen2.5-7B-Instruct", "devices": 8, "replicas": 1}, {}, "28 attention heads"),
    ],
)
def test_models_that_do_not_fit(model: dict[str, object], pool: dict[str, object], what: str) -> None:
    data = yaml.safe_load(BASE)
    data["models"]["chat"] |= model
    data["pools"]["gpu"] |= pool
    found = [
        each
        for each in of(yaml.safe_dump(data, sort_keys=False), "penstock.yaml")
        if each.rule.id != "single-replica"
    ]
    assert [each.rule.id for each in found] == ["model-does-not-fit"]
    assert what in found[0].what


@pytest.mark.parametrize(
    ("model", "pool"),
    [
        ({"weights": "meta-llama/Llama-3.1-70B-Instruct", "devices": 4}, {}),
        ({"weights": "RedHatAI/Qwen3-32B-quantized.w8a8", "max_model_len": 4096}, {"mig": "3g.40gb"}),
        ({"weights": "unknown/model"}, {}),
        ({"weights": "/models/mine"}, {}),
    ],
)
def test_models_that_fit_or_are_not_known(model: dict[str, object], pool: dict[str, object]) -> None:
    data = yaml.safe_load(BASE)
    data["models"]["chat"] |= model
    data["pools"]["gpu"] |= pool
    assert rules(yaml.safe_dump(data), "penstock.yaml") == set()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"quantization": "int8", "engine": "vllm"}, "vllm does not quantise so at load"),
        ({"quantization": "awq", "engine": "vllm"}, "it takes an AWQ checkpoint"),
        ({"quantization": "int9", "engine": "vllm"}, "vllm does not have it"),
        ({"quantization": "w8a8", "engine": "penstock"}, "penstock computes so on a CPU only"),
    ],
)
def test_schemes_that_the_engine_cannot_have(model: dict[str, object], what: str) -> None:
    data = yaml.safe_load(BASE)
    data["models"]["chat"] |= {"weights": "Qwen/Qwen2.5-7B-Instruct"} | model
    found = [
        each
        for each in of(yaml.safe_dump(data, sort_keys=False), "penstock.yaml")
        if each.rule.id == "quantization-unserved"
    ]
    assert len(found) == 1
    assert what in found[0].what


@pytest.mark.parametrize(
    "model",
    [
        {"quantization": "fp8"},
        {"weights": "Qwen/Qwen2.5-7B-Instruct-AWQ", "quantization": "awq"},
        {"weights": "some/thing-of-mine", "quantization": "gptq"},
    ],
)
def test_schemes_that_vllm_can_have(model: dict[str, object]) -> None:
    data = yaml.safe_load(BASE)
    data["models"]["chat"] |= {"weights": "Qwen/Qwen2.5-7B-Instruct", "engine": "vllm"} | model
    assert "quantization-unserved" not in rules(yaml.safe_dump(data), "penstock.yaml")


def test_routes_that_leave_the_house() -> None:
    cloud = textwrap.dedent("""\
        upstreams:
          cloud: {url: https://api.example.com/v1, models: {large: {}}}
        """)
    target = "    fallback: [{model: large, upstream: cloud}]\n"
    text = (
        BASE.replace("    max_tokens: {ceiling: 512}\n", "    max_tokens: {ceiling: 512}\n" + target) + cloud
    )
    assert places(of(text, "penstock.yaml")) == {("route-leaves-house", 12)}


def test_an_escalation_by_another_route_leaves_the_house_too() -> None:
    text = BASE.replace(
        "    max_tokens: {ceiling: 512}\n", "    max_tokens: {ceiling: 512}\n    escalate: ESC\n"
    )
    text = text.replace("ESC", "{route: dear, verifiers: [{finish_reason: [stop]}]}")
    dear = "  dear: {targets: [{model: large, upstream: cloud}], max_tokens: {ceiling: 512}}\n"
    text = text.replace("teams:\n", dear + "teams:\n")
    text += "upstreams:\n  cloud: {url: https://api.example.com/v1, models: {large: {}}}\n"
    assert places(of(text, "penstock.yaml")) == {("route-leaves-house", 12)}
    assert of(text.replace("escalate:", "local_only: true\n    escalate:"), "penstock.yaml") != []  # refused


def test_slices_that_there_are_not() -> None:
    text = BASE.replace("price_per_hour", "mig: 3g.20gb, price_per_hour")
    (found,) = of(text, "penstock.yaml")
    assert (found.rule.id, found.line) == ("model-does-not-fit", 3)
    assert "3g.40gb" in found.what


def test_errors_have_the_loaders_lines() -> None:
    text = BASE.replace("    pool: gpu\n", "    pol: gpu\n")
    found = of(text, "penstock.yaml")
    assert [(each.rule.id, each.line) for each in found] == [("spec-invalid", 5), ("spec-invalid", 8)]
    assert "Did you mean pool?" in found[1].what


def test_other_documents_are_no_specs() -> None:
    for text in (
        "version: 1\nmodels: [a]\n",
        "version: 2\nupdates: []\n",
        "models: {a: {}}\n",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {models: a}\n",
    ):
        assert "spec-invalid" not in rules(text, "other.yaml")
