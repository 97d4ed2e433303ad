"""What a choice has cost reaches the metrics, whichever way its request ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from penstock.core.errors import PenstockError
from penstock.core.plan import Event, Failure
from penstock.core.request_spec import FinishReason
from penstock.core.sampling_params import SamplingParams
from penstock.observe.metrics import Metrics
from penstock.server.bills import Bill
from penstock.server.bills import Bills as Feed
from penstock.server.generation import Generation, Prompt
from penstock.server.state import State
from penstock.text.tokenizer import Tokenizer


class Bills:
    """A generation of three prompts, and what the metrics have of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.metrics = Metrics("m", 256)
        aborted: list[str] = []
        self.settled: list[str] = []
        engine = SimpleNamespace(abort=aborted.extend, settled=self.settled.append)
        self.feed = Feed()
        state = SimpleNamespace(
            engine=engine,
            tokenizer=tokenizer,
            metrics=self.metrics,
            bills=self.feed,
            wall=lambda: 7.0,
            config=SimpleNamespace(reasoning_parser=None),
        )
        prompts = [Prompt((1, 2), "", 4) for _ in range(3)]
        self.generation = Generation(
            cast(State, state),
            prompts,
            SamplingParams(temperature=0.0),
            id="r",
            arrived_at=0.0,
            request_id="asked",
            tenant="search",
        )

    def batch(self, *events: Event) -> None:
        self.generation._take_in(events, lambda choice: None)

    def late(self, event: Event) -> None:
        self.generation._late(event)

    def told(self) -> list[tuple[tuple[str, ...], float]]:
        """The final bills: how its choices ended, and their device-seconds together."""
        return [(bill.finish_reasons, bill.device_seconds) for bill in self.feed.page(None).data]

    def sample(self, name: str) -> float:
        labels: dict[str, str] = {"model_name": "m", "engine": "0"}
        return (
            self.metrics.registry.get_sample_value(f"penstock:request_device_seconds_{name}", labels) or 0.0
        )


def event(index: int, seconds: float, finish: FinishReason | None = None, **fields: Any) -> Event:
    fields.setdefault("scheduled_at", 1.0 if seconds else None)
    return Event(f"r:{index}", finish=finish, device_seconds=seconds, **fields)


FULL = Failure("full", "QueueFull", param="max_num_queued_reqs")


def test_one_prompt_is_refused_while_another_is_computed(tokenizer: Tokenizer) -> None:
    """It has had chunks of its prompt computed, and not one event yet."""
    bills = Bills(tokenizer)
    with pytest.raises(PenstockError, match="full"):
        bills.batch(event(2, 0.0, FinishReason.ERROR, failure=FULL))
    bills.late(event(0, 0.5, FinishReason.ABORT))
    bills.late(event(1, 0.0, FinishReason.ABORT))
    assert (bills.sample("sum"), bills.sample("count")) == (0.5, 1), "who never ran is not counted"
    assert bills.told() == [(("abort", "error", "error"), 0.5)]
    assert sorted(bills.settled) == ["r:0", "r:1", "r:2"], "but nobody else has to count it"


def test_a_last_event_that_cannot_be_digested_is_counted(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bills = Bills(tokenizer)
    broken = bills.generation.choices[0].processor
    monkeypatch.setattr(type(broken), "push", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bills.batch(
            event(0, 0.25, FinishReason.STOP, tokens=(5,)), event(1, 0.5, FinishReason.STOP, tokens=(5,))
        )
    assert sorted(bills.settled) == ["r:0", "r:1"]
    bills.late(event(2, 1.0, FinishReason.ABORT))
    assert (bills.sample("sum"), bills.sample("count")) == (1.75, 3)
    assert bills.told() == [(("error", "error", "abort"), 1.75)]
    assert sorted(bills.settled) == ["r:0", "r:1", "r:2"]


def test_an_engine_that_dies_leaves_what_is_known(tokenizer: Tokenizer) -> None:
    bills = Bills(tokenizer)
    bills.batch(event(0, 0.25, tokens=(5,)))
    dead = Failure("the engine died: gone", "EngineDead")
    with pytest.raises(PenstockError, match="the engine died"):
        bills.batch(event(1, 0.5, FinishReason.ERROR, failure=dead))
    bills.late(Event("r:0", finish=FinishReason.ERROR, failure=dead))
    assert bills.told() == []
    bills.late(Event("r:2", finish=FinishReason.ERROR, failure=dead))
    assert bills.sample("sum") == 0.75
    assert bills.told() == [(("error", "error", "error"), 0.75)]


def test_who_is_refused_whole_has_no_bill(tokenizer: Tokenizer) -> None:
    bills = Bills(tokenizer)
    for index in range(3):
        bills.late(event(index, 0.0, FinishReason.ERROR, failure=FULL))
    assert bills.told() == []


def test_a_bill_says_whose_it_is(tokenizer: Tokenizer) -> None:
    bills = Bills(tokenizer)
    bills.batch(event(0, 0.25, FinishReason.STOP, tokens=(5, 6), cached=1))
    bills.late(event(1, 0.5, FinishReason.ABORT, cached=2))
    bills.late(event(2, 0.0, FinishReason.ABORT))
    (bill,) = bills.feed.page(None).data
    assert bill == Bill(
        request_id="asked",
        tenant="search",
        finish_reasons=("stop", "abort", "abort"),
        prompt_tokens=6,
        cached_tokens=3,
        completion_tokens=2,
        device_seconds=0.75,
        ended_at=7.0,
    )
