"""Each point of the checklists on recorded pages: what it finds, how it judges, what it advises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.doctor.checklist import Point, Verdict
from penstock.doctor.points import CHECKLIST, examine
from penstock.doctor.report import as_json, point_lines, worst
from penstock.doctor.snapshot import Machine, Snapshot, settings
from penstock.fleet.hardware import GIB
from penstock.observe.page import Page

from .pages import OLD, vllm


def snapshot(text: str | None = None, **given_: Any) -> Snapshot:
    page = Page(vllm(**given_) if text is None else text)
    return Snapshot(
        url="http://127.0.0.1:8000",
        health={"/health": 200, "/livez": 404, "/readyz": 404},
        page=page,
        version="0.32.0",
        model="Qwen/Qwen3-8B",
        max_model_len=4096,
        config={**settings(page, {}), "max_num_seqs": "128", "max_num_batched_tokens": "8192"},
        machine=Machine(shm=16 * GIB, memory=64 * GIB),
    )


def points(it: Snapshot) -> dict[str, Point]:
    return {point.id: point for point in examine(it)}


def test_an_engine_that_is_well_has_nothing_to_do() -> None:
    found = points(snapshot())
    assert {id: point.verdict for id, point in found.items() if point.verdict is not Verdict.OK} == {}
    assert worst(list(found.values()), []) is Verdict.OK
    assert all(point.value for point in found.values())
    assert not any(point.advice for point in found.values())
    assert found["max-num-seqs"].value == (
        "--max-num-seqs 128; the cache of 200,000 tokens holds 196 requests of 1,020; 0 preemptions"
    )
    assert found["prefix-caching"].value == "on; 50% of 90,000 prompt tokens were found in it"
    assert found["gpu-memory-utilization"].value == "0.92"


#: (what is so, point, verdict, words of value or advice)
ILL: list[tuple[dict[str, Any], str, Verdict, str]] = [
    ({"failed": 5}, "errors", Verdict.FAIL, "5 failed"),
    (
        {"config": {"gpu_memory_utilization": "0.5"}},
        "gpu-memory-utilization",
        Verdict.WARN,
        "raise it to 0.90",
    ),
    (
        {"config": {"gpu_memory_utilization": "0.98"}},
        "gpu-memory-utilization",
        Verdict.WARN,
        "0.85 after an OOM",
    ),
    (
        {"prompts": (90.0,) * 100, "answers": (9.0,) * 100},
        "max-model-len",
        Verdict.WARN,
        "--max-model-len 256",
    ),
    ({"preemptions": 3}, "max-num-seqs", Verdict.WARN, "lower --max-num-seqs to 196"),
    ({"preemptions": 30}, "max-num-seqs", Verdict.FAIL, "lower --max-num-seqs to 196"),
    (
        {"config": {"kv_cache_size_tokens": "20400"}},
        "max-num-seqs",
        Verdict.WARN,
        "--max-num-seqs 20 is what fits",
    ),
    ({"cache": 0.97, "waiting": 3}, "quantization", Verdict.WARN, "evaluation set first"),
    ({"prompts": (9000.0,) * 100}, "max-num-batched-tokens", Verdict.WARN, "raise it"),
    ({"waiting": 2, "running": 128}, "queue", Verdict.WARN, "penstock tune --live http://127.0.0.1:8000"),
    ({"waiting": 21}, "queue", Verdict.FAIL, "Scale out"),
    ({"waiting": 21, "cache": 0.99}, "queue", Verdict.FAIL, "wait for KV blocks"),
    (
        {"config": {"enable_prefix_caching": "False"}},
        "prefix-caching",
        Verdict.WARN,
        "--enable-prefix-caching",
    ),
    ({"hits": 90}, "prefix-caching", Verdict.WARN, "static part first"),
    ({"ttft": (4.0,) * 100}, "latency", Verdict.WARN, "Prompts take long"),
    ({"ttft": (4.0,) * 100, "queue": (3.0,) * 100}, "latency", Verdict.WARN, "queueing"),
]


@pytest.mark.parametrize(("given_", "id", "verdict", "words"), ILL)
def test_what_is_ill_is_named(given_: dict[str, Any], id: str, verdict: Verdict, words: str) -> None:
    point = points(snapshot(**given_))[id]
    assert (point.verdict, words in f"{point.value} {point.advice}") == (verdict, True), point


def test_few_requests_say_nothing() -> None:
    few = {"prompts": (9.0,) * 3, "answers": (9.0,) * 3, "ttft": (9.0,) * 3, "queue": (9.0,) * 3}
    found = points(snapshot(**few))
    for id in ("max-model-len", "max-num-batched-tokens", "latency"):
        assert found[id].verdict is Verdict.UNKNOWN
        assert "too few requests" in found[id].value


def test_an_old_page_is_read_under_its_own_names() -> None:
    it = replace(snapshot(OLD), version="0.6.6", config=settings(Page(OLD), {}), max_model_len=None)
    found = points(it)
    assert "KV cache 97%" in found["queue"].value
    assert found["queue"].verdict is Verdict.FAIL
    assert found["gpu-memory-utilization"].verdict is Verdict.WARN
    assert found["prefix-caching"].verdict is Verdict.WARN
    assert found["scheduler-steps"].verdict is Verdict.UNKNOWN
    assert found["max-model-len"].verdict is Verdict.UNKNOWN


def test_what_dies_hangs_or_loads_is_told_apart() -> None:
    base = snapshot()
    for health, verdict, words in (
        ({"/health": 503}, Verdict.FAIL, "died"),
        ({"/health": 200, "/livez": 503}, Verdict.FAIL, "no progress"),
        ({"/health": 200, "/livez": 200, "/readyz": 503}, Verdict.WARN, "no new requests"),
    ):
        point = points(replace(base, health=health))["health"]
        assert (point.verdict, words in point.advice) == (verdict, True)


def test_the_pod_is_seen_only_from_within() -> None:
    away = points(replace(snapshot(), machine=None))
    assert away["shared-memory"].verdict is away["main-memory"].verdict is Verdict.UNKNOWN
    small = Machine(shm=64 << 20, memory=20 * GIB, limited=True, used=int(19.5 * GIB))
    within = points(replace(snapshot(), machine=small))
    assert "0.1 GiB" in within["shared-memory"].value
    assert "medium: Memory" in within["shared-memory"].advice
    assert "19.5 in use" in within["main-memory"].value
    assert within["main-memory"].verdict is Verdict.WARN


def test_without_metrics_nothing_is_made_up() -> None:
    it = Snapshot(url="http://x:1", health={"/health": 200}, page_problem="/metrics answers 404")
    found = points(it)
    assert found["metrics"].value == "/metrics answers 404"
    assert {found[id].verdict for id in found if id not in ("health", "metrics")} == {Verdict.UNKNOWN}


def test_a_gateway_is_told_from_an_engine() -> None:
    it = snapshot("penstock:gateway_engine_ready 1\n")
    assert points(it)["metrics"].verdict is Verdict.FAIL
    assert "gateway" in points(it)["metrics"].value


def test_settings_come_from_wherever_they_are_told() -> None:
    page = Page(
        'vllm:vllm_config_info{scheduler_config_max_num_seqs="64",cache_config_block_size="8",'
        'model_config_quantization="None"} 1.0\nvllm:cache_config_info{block_size="16"} 1.0\n'
    )
    server = {
        "vllm_config": {"scheduler_config": {"max_num_seqs": 32, "max_num_batched_tokens": 4096}, "x": 1}
    }
    found = settings(page, server)
    assert found == {"max_num_seqs": "64", "block_size": "16", "max_num_batched_tokens": "4096"}


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "gpu_memory_utilization",
                "max_num_seqs",
                "kv_cache_size_tokens",
                "max_num_batched_tokens",
                "device",
            ]
        ),
        st.one_of(st.text(max_size=20), st.floats().map(str), st.integers().map(str)),
    ),
    st.floats(),
    st.lists(st.floats(0, 1e12), min_size=0, max_size=40),
)
def test_whatever_an_engine_tells_every_point_has_an_answer(
    config: dict[str, str], cache: float, values: list[float]
) -> None:
    it = replace(snapshot(cache=cache, prompts=values, answers=values, ttft=values), config=config)
    found = examine(it)
    assert [point.id for point in found] == [id for id, *_ in CHECKLIST.points]
    assert as_json(it, found, None, 0)["verdict"] in ("ok", "warn", "fail")
    assert all("\x1b" not in line for line in point_lines(found))
