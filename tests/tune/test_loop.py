"""Settings tried one after another on curves that are known: restarts, repeats, the decision, its reasons."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.observe.page import Page
from penstock.tune.diagnosis import Pressure
from penstock.tune.engines import known, limits, targets
from penstock.tune.loop import Result, advise, decide, tune
from penstock.tune.report import as_json, others, to_paste
from penstock.tune.run import Engine, Run
from penstock.tune.search import Bisection, Search, Stepwise
from penstock.tune.slo import Slo

SLO = Slo(ttft=1000.0, tpot=20.0)


class Bench:
    """An engine whose tokens take 1 ms for each request at work, under 100 clients."""

    def __init__(self, *, noise: float = 0.0, most: int = 10_000, target: float = 20.0) -> None:
        self.noise, self.most, self.target, self.clients = noise, most, target, 100
        self.random = random.Random(1)
        self.started: list[int] = []
        self.ran: list[int] = []
        self.said: list[str] = []

    async def start(self, value: int) -> float | None:
        if value > self.most:
            raise StartupError(f"--max-num-seqs {value} does not fit")
        self.started.append(value)
        return 1.5

    async def measure(self, value: int) -> Run | None:
        self.ran.append(value)
        work = min(value, self.clients)
        tpot = 1.0 * work
        goodput = (50 * work / tpot if tpot <= self.target else 0.0) * work / (work + 10)
        queue = 0.05 * max(0, self.clients - work) / work
        return Run(
            seconds=10,
            completed=50,
            failed=0,
            goodput=goodput * (1 + self.noise * self.random.uniform(-1, 1)),
            throughput=50,
            tokens=50,
            share=1.0 if tpot <= self.target else 0.0,
            p95={"ttft": 1000 * queue, "tpot": tpot},
            engine=Engine(queue=queue, prefill=0.01, decode=tpot / 100, running=work, waiting=9, finished=60),
            sent=50,
        )

    def run(self, search: Search, *, repeats: int = 3, **given_: Any) -> Result:
        result = asyncio.run(
            tune(search, self.start, self.measure, SLO, repeats=repeats, tell=self.said.append, **given_)
        )
        assert self.started == [step.trial.value for step in result.measured]
        return result


def test_it_finds_the_edge_and_says_why() -> None:
    bench = Bench()
    result = bench.run(Bisection(64, low=1, high=256))
    verdict = decide(result, SLO, start=64, flag="max-num-seqs")
    assert verdict.value in (19, 20)  # 20 ms at 20
    assert verdict.changed
    text = " ".join(verdict.why)
    assert "--max-num-seqs 64 → " in text
    assert "At 64: P95 TPOT 64 ms over 20: computing" in text
    assert len(result.steps) <= 10
    assert len(bench.ran) <= 2 * len(result.steps)  # equal runs are not measured a third time


def test_too_few_places_are_queueing() -> None:
    result = Bench().run(Bisection(2, low=1, high=256))
    assert result.steps[0].diagnosis.pressure is Pressure.QUEUE
    verdict = decide(result, SLO, start=2, flag="max-num-seqs")
    assert verdict.value is not None
    assert 15 <= verdict.value <= 20


def test_a_difference_within_the_noise_is_none() -> None:
    bench = Bench(noise=0.3)
    verdict = decide(bench.run(Bisection(17, low=1, high=256)), SLO, start=17, flag="max-num-seqs")
    assert (verdict.value, verdict.changed) == (17, False)
    assert "within the noise, so 17 stays" in verdict.why[0] or verdict.why[0].startswith("At 17")


def test_a_setting_that_does_not_start_is_passed_over() -> None:
    bench = Bench(most=8)
    result = bench.run(Bisection(4, low=1, high=256))
    failed = [step for step in result.steps if step.failure]
    assert failed
    assert all(step.trial.value > 8 for step in failed)
    assert decide(result, SLO, start=4, flag="max-num-seqs").value == 8
    report = as_json(result, decide(result, SLO, start=4, flag="x"), {"url": "u"}, {"x": 8})
    assert json.loads(json.dumps(report)) == report
    assert report["flags"] == {"x": 8}


def test_an_interruption_ends_it_with_what_there_is() -> None:
    bench = Bench()

    async def measure(value: int) -> Run | None:
        return None if len(bench.ran) >= 2 else await bench.measure(value)

    result = asyncio.run(
        tune(Bisection(64, low=1, high=256), bench.start, measure, SLO, repeats=2, tell=bench.said.append)
    )
    assert result.interrupted
    assert [step.trial.value for step in result.steps] == [64]


def test_where_nothing_is_good_it_says_so() -> None:
    result = Bench(target=0.5).run(Bisection(64, low=1, high=64), repeats=1)
    assert len(result.steps) <= 10
    verdict = decide(result, SLO, start=64, flag="max-num-seqs")
    assert (verdict.value, verdict.changed) == (None, False)
    assert "No setting of --max-num-seqs that was tried" in verdict.why[0]


def test_the_guides_loop_restarts_downwards() -> None:
    bench = Bench()
    search = Stepwise(100, step=32)
    result = bench.run(search, repeats=1)
    assert bench.started == bench.ran == [100, 68, 36, 4]
    assert search.best is None  # it has stepped over 20, and now nearly all of them wait
    assert result.steps[-1].diagnosis.pressure is Pressure.QUEUE


@pytest.mark.parametrize(
    ("seqs", "places", "value", "words"),
    [
        (None, 100, (15, 20), "good requests/s"),
        (64, 100, (15, 20), "over 20"),
        (8, 8, (16, 16), "raise --max-num-seqs"),
    ],
)
def test_a_server_that_cannot_be_restarted_is_advised(
    seqs: int | None, places: int, value: tuple[int, int], words: str
) -> None:
    bench = Bench()
    towards = {Pressure.QUEUE: Pressure.COMPUTE, Pressure.NONE: Pressure.QUEUE}

    async def measure(clients: int) -> Run | None:
        bench.clients = clients
        return await bench.measure(places)

    async def start(clients: int) -> None:
        return None

    result = asyncio.run(
        tune(
            Bisection(20, low=1, high=80),
            start,
            measure,
            SLO,
            repeats=2,
            tell=bench.said.append,
            translate=lambda pressure: towards.get(pressure, pressure),
            restarts=False,
        )
    )
    verdict = advise(result, SLO, seqs=seqs)
    assert verdict.value is not None
    assert value[0] <= verdict.value <= value[1]
    assert words in " ".join(verdict.why)


def test_others_are_told() -> None:
    bench = Bench()
    result = bench.run(Bisection(8, low=8, high=8), repeats=2)
    assert others(result) == 10 * len(bench.ran)


def test_what_is_pasted_can_be_parsed() -> None:
    import yaml

    lines = list(to_paste({"max-num-seqs": 24}, "demo"))
    assert lines[1].strip() == "--max-num-seqs 24"
    assert yaml.safe_load(lines[3]) == {"models": {"demo": {"flags": {"max-num-seqs": 24}}}}
    assert list(to_paste({}, "demo")) == []


@pytest.mark.parametrize(
    ("arguments", "engine", "cpu", "expected"),
    [
        ([], "penstock", True, (64, 256)),
        ([], "penstock", False, (256, 8192)),
        (["--max-num-seqs", "32"], "penstock", True, (32, 256)),
        (["--max-num-seqs=32", "--max_num_seqs", "16"], "penstock", True, (16, 256)),
        (["--max-num-batched-tokens=2K"], "vllm", False, (256, 2048)),
        (["--max-num-batched-tokens", "32"], "penstock", True, (32, 32)),
        (["--max-num-seqs"], "penstock", True, (64, 256)),
        (["--max-num-seqs", "many"], "other", True, (None, None)),
    ],
)
def test_limits_are_read_from_a_command_line(
    arguments: list[str], engine: str, cpu: bool, expected: tuple[int | None, int | None]
) -> None:
    found = known(arguments, engine, cpu=cpu)
    assert (found.seqs, found.tokens) == expected


def test_limits_are_read_from_metrics() -> None:
    ours = Page('penstock:engine_config_info{max_num_seqs="64",max_num_batched_tokens="256"} 1\n')
    theirs = Page('vllm:vllm_config_info{scheduler_config_max_num_seqs="128"} 1\n')
    assert (limits(ours).seqs, limits(ours).tokens) == (64, 256)
    assert (limits(theirs).seqs, limits(theirs).tokens) == (128, None)
    assert limits(None).seqs is limits(Page("")).seqs is None


def test_targets_of_a_spec() -> None:
    assert targets({"ttft_p95": 0.5, "itl_p95": 0.05, "e2e_p99": 3}) == {"ttft": 500.0, "tpot": 50.0}
    assert str(Slo().or_else(targets({"ttft_p95": 0.5}))) == "P95 TTFT ≤ 500 ms"
    assert Slo(tpot=5.0).or_else({"ttft": 1.0}).bounds == {"tpot": 5.0}
