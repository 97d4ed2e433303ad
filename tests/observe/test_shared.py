"""Several processes that count, and one page of all of them."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.stats import EngineStats, Totals
from penstock.observe import shared
from penstock.observe.metrics import Metrics, RequestFigures


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they count; afterwards, this process counts alone again."""
    monkeypatch.setenv(shared._VARIABLE, "")
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setattr(shared, "_directory", None)
    return tmp_path / "metrics"


def process(directory: Path, name: str) -> Metrics:
    """The metrics of a process of this name."""
    shared.share(directory, name)
    made = Metrics("m", 2048)
    made.describe_cache(block_size=16, num_blocks=64, dtype="float32", prefix_caching=True)
    return made


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Of what is ours; a sample may come once."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            if sample.name.startswith(("vllm:", "penstock:")):
                found[key] = sample.value
    return found


def figures(draw: random.Random) -> RequestFigures:
    """Sums of these are exact, in any order."""
    return RequestFigures(
        finished_reason=draw.choice(["stop", "length", "abort"]),
        prompt_tokens=draw.randint(1, 2000),
        generation_tokens=draw.randint(1, 2000),
        cached_tokens=0,
        max_tokens=2048,
        preemptions=0,
        device_seconds=draw.randint(1, 4096) / 1024,
        e2e=draw.randint(1, 4096) / 1024,
    )


def test_a_page_of_any_process_is_that_of_one_which_has_counted_everything(directory: Path) -> None:
    alone = Metrics("m", 2048)
    alone.describe_cache(block_size=16, num_blocks=64, dtype="float32", prefix_caching=True)
    starter, *apis = (process(directory, name) for name in ("starter", "api1", "api2"))
    draw = random.Random(1)
    for number in range(200):
        request = figures(draw)
        for metrics in (alone, draw.choice(apis)):
            metrics.observe_sequence(request)
            metrics.observe_first_token(request.device_seconds)
            metrics.observe_prompt(1, request.generation_tokens)
        if number % 10 == 0:
            stats = EngineStats(
                Totals(steps=number, prompt_tokens=10 * number, generation_tokens=number),
                running=number % 7,
                waiting=3,
                kv_usage=0.5,
                seconds=0.25,
                predicted=0.5,
                busy=number / 4,
                idle=number / 8,
                at=float(number),
            )
            alone.observe_step(stats)
            starter.observe_step(stats)
    expected = samples(alone.page(500.0))
    starter.count_idle(500.0)
    for metrics in apis:
        assert samples(metrics.page(500.0)) == expected
    assert expected[
        "vllm:request_success_total", (("engine", "0"), ("finished_reason", "stop"), ("model_name", "m"))
    ]


def test_gauges_show_how_things_stand_and_not_a_sum_over_time(directory: Path) -> None:
    starter, api = process(directory, "starter"), process(directory, "api1")
    for running in (5, 9, 2):
        starter.observe_step(EngineStats(running=running, waiting=1, kv_usage=running / 16))
    page = samples(api.page(0.0))
    labels = (("engine", "0"), ("model_name", "m"))
    assert page["vllm:num_requests_running", labels] == 2
    assert page["vllm:kv_cache_usage_perc", labels] == 2 / 16
    (info,) = (value for (name, _), value in page.items() if name == "vllm:cache_config_info")
    assert info == 1


_KILLED = """
import os, random, signal, sys
from pathlib import Path
from tests.observe.test_shared import figures, process
metrics = process(Path(sys.argv[1]), "api1")
draw = random.Random(2)
for _ in range(10):
    metrics.observe_sequence(figures(draw))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_counted_stays_and_its_successor_counts_on(directory: Path) -> None:
    other = process(directory, "api2")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _KILLED, str(directory)], timeout=60, check=False)
    shared.died("api1")
    other.observe_sequence(figures(random.Random(3)))
    page = samples(other.page(0.0))
    ended = sum(value for (name, _), value in page.items() if name == "vllm:request_success_total")
    assert ended == 21
    assert len(list(directory.glob("counter_*.db"))) == 2, "no files for each incarnation"


def test_a_process_alone_has_no_files() -> None:
    assert not shared.shared()
    assert Metrics("m", 2048).page(0.0).count(b"process_resident_memory_bytes")
