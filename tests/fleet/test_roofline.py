"""The roofline by hand, and against what has been published."""

from __future__ import annotations

import dataclasses
import math

import pytest

from penstock.fleet import backtest, catalogue
from penstock.fleet.facts import SCHEMES
from penstock.fleet.roofline import Efficiency, Machine, fitted

PERFECT = Efficiency(memory=1.0, compute=1.0, step=0.0, all_reduce=0.0)
ROWS = catalogue.measurements()


def machine(
    model: str, gpu: str, tp: int = 1, scheme: str = "none", efficiency: Efficiency = PERFECT
) -> Machine:
    return Machine(
        catalogue.find_model(model), catalogue.find_device(gpu), tp, SCHEMES[scheme], 2, 2, efficiency
    )


def test_a_token_alone_reads_all_weights_that_are_multiplied() -> None:
    """Llama-2-7B on an A100-80GB: 2 bytes x (parameters - embedding) over 2,039 GB/s, and the cache."""
    weights = 2 * (6_738_415_616 - 32_000 * 4096)
    seconds = machine("llama-2-7b", "A100-80GB").decode(1, 100)
    assert seconds == pytest.approx((weights + 100 * 524_288) / 2039e9)


def test_a_long_prompt_is_bound_by_its_products() -> None:
    facts = catalogue.find_model("llama-2-7b")
    flops = 2 * facts.active_parameters * 4096 + 4096 * 4 * 32 * 4096 * 2048
    assert machine("llama-2-7b", "A100-80GB").prefill(4096) == pytest.approx(flops / 312e12)


def test_a_short_prompt_is_bound_by_the_weights() -> None:
    one = machine("llama-2-7b", "A100-80GB")
    assert one.prefill(1) == pytest.approx(one.read(1) / 2039e9)


def test_experts_are_read_as_they_are_chosen() -> None:
    """Of Mixtral's eight experts, one token reads two, and many tokens all."""
    one = machine("mixtral-8x7b", "A100-80GB", 2)
    experts = 32 * 8 * 3 * 4096 * 14336 * 2 / 2
    assert one.read(1e6) - one.read(1) == pytest.approx(experts * 6 / 8)
    assert one.read(4) - one.read(1) == pytest.approx(experts * (0.75 - 0.75**4))


def test_bytes_of_eight_bits_are_half_and_products_are_twice_as_fast_where_there_are_units() -> None:
    hopper, ampere = (
        machine("llama-3.1-8b", "H100", scheme="fp8"),
        machine("llama-3.1-8b", "A100-80GB", scheme="fp8"),
    )
    assert hopper.rate == 1979e12
    assert ampere.rate == 312e12  # weights are expanded and multiplied at 16 bits
    assert machine("llama-3.1-8b", "H100", scheme="awq").rate == 989e12
    assert hopper.read(1) < 0.6 * machine("llama-3.1-8b", "H100").read(1)


def test_ranks_meet_twice_in_a_layer() -> None:
    alone = Efficiency(1.0, 1.0, 0.0, 1e-5)
    two = machine("llama-2-7b", "A100-80GB", 2, efficiency=alone)
    moved = 2 * 0.5 * 1 * 4096 * 2 / 300e9
    ideal = (two.read(1) + 100 * 524_288 / 2) / 2039e9
    assert two.decode(1, 100) - ideal == pytest.approx(64 * (1e-5 + moved))


def test_throughput_grows_with_the_batch_and_tpot_too() -> None:
    one = machine("llama-3.1-8b", "H100", efficiency=fitted().efficiency)
    rates = [one.throughput(batch, 512, 256) for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
    times = [one.tpot(batch, 512, 256) for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
    assert rates == sorted(rates)
    assert times == sorted(times)


def test_there_are_enough_measurements_and_each_says_whose_and_when() -> None:
    assert len(ROWS) >= 20
    assert len({row["engine"] for row in ROWS}) >= 5
    assert len({row["gpu"] for row in ROWS}) >= 5
    for row in ROWS:
        assert row["source"]
        assert row["date"] >= "2023"
        assert row["value"] > 0
        assert row["kind"] in ("throughput", "ttft", "decode")


def test_a_measurement_by_hand() -> None:
    """gpt-fast, Llama-2-7B on one A100: 104.9 tokens/s; a perfect roofline says 153."""
    row = next(row for row in ROWS if row["value"] == 104.9)
    assert backtest.predict(row, PERFECT) == pytest.approx(1 / ((13.2 + 0.055) / 2039), rel=0.01)


def test_the_efficiencies_are_those_that_fit_best() -> None:
    """None of the four can be moved by a fiftieth, either way, and fit better: they are not invented."""
    weights = backtest._weights(ROWS)

    def loss(efficiency: Efficiency) -> float:
        found = backtest.errors(ROWS, efficiency)
        return sum(weight * abs(error) for weight, error in zip(weights, found, strict=True))

    best = fitted().efficiency
    least = loss(best)
    for field in dataclasses.fields(best):
        for factor in (1.02, 1 / 1.02):
            moved = dataclasses.replace(best, **{field.name: getattr(best, field.name) * factor})
            assert loss(moved) >= least * 0.999, (field.name, factor)


def test_the_error_bar_is_what_measurements_show() -> None:
    """With the fit that has seen them, at least as many lie in the bar as the bar promises without."""
    fit = fitted()
    assert fit.count == len(ROWS)
    assert 0 < fit.low < 1 < fit.high
    inside = [fit.low <= math.exp(error) <= fit.high for error in backtest.errors(ROWS, fit.efficiency)]
    assert sum(inside) / len(inside) >= 0.8
    assert 0.5 <= fit.memory <= 0.95
    assert 0.3 <= fit.compute <= 0.9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_error_bar_is_that_of_sources_that_were_not_seen() -> None:
    assert backtest.backtest(ROWS) == fitted()


def test_the_table_names_every_measurement() -> None:
    assert len(backtest.table(ROWS, fitted().efficiency).splitlines()) == len(ROWS) + 2


def test_the_page_of_planning_has_the_table_that_is_made_here() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    assert backtest.table(ROWS, fitted().efficiency) in page
