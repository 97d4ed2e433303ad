"""Grammars in the engine: whatever the batch, chunks, preemptions and steps in flight, and whoever fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from penstock.core.errors import InvalidRequest
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason, Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.structured import Grammar, GrammarKind
from penstock.engine.build import Engine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.held import Held
from penstock.engine.messages import Abort, Add
from penstock.text.tokenizer import Tokenizer
from tests.grammar.conftest import DEMO, EOS

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
JSON = Grammar(GrammarKind.JSON, json.dumps(SCHEMA))
REGEX = Grammar(GrammarKind.REGEX, r"[ab]{3}-\d{2}")
TOKENIZER = Tokenizer.from_directory(DEMO)
PROMPT = tuple(TOKENIZER.encode("What is a Pod? " * 6))


def spec(
    name: str, grammar: Grammar | None, max_tokens: int = 96, n: int = 1, **sampling: Any
) -> RequestSpec:
    chosen = Sampling(**{"temperature": 1.0, "seed": sum(map(ord, name)), **sampling})
    return RequestSpec(id=name, prompts=(Prompt(PROMPT, max_tokens),), sampling=chosen, n=n, grammar=grammar)


SPECS = [
    *(spec(f"j{i}", JSON) for i in range(5)),
    spec("regex", REGEX, logprobs=2, temperature=0.0),
    spec("free", None, max_tokens=40),
    spec("n", JSON, n=3, repetition_penalty=1.2),
    spec("held back", REGEX, min_tokens=50, ignore_eos=True),
]


def engine(**settings: Any) -> Engine:
    config = {
        "model": "demo",
        "threads": 1,
        "kv_cache_memory_bytes": 2 << 20,
        "max_model_len": 256,
        **settings,
    }
    return build_engine(EngineConfig(**config))


def run(made: Engine, specs: list[RequestSpec]) -> dict[str, tuple[tuple[int, ...], FinishReason | None]]:
    """Tokens and end of every sequence."""
    outputs: dict[str, list[int]] = {id: [] for each in specs for id in each.ids}
    ends: dict[str, FinishReason | None] = dict.fromkeys(outputs)
    loop = made.loop

    def take(events: list[Event]) -> None:
        for event in events:
            assert event.failure is None, event.failure
            outputs[event.request] += event.tokens
            ends[event.request] = event.finish or ends[event.request]

    for each in specs:
        take(loop.handle(Add(each)))
    while loop.has_work:
        if not loop.can_step and loop.held is not None:
            loop.held.wait()
        take(loop.step())
    loop.scheduler.check()
    return {id: (tuple(tokens), ends[id]) for id, tokens in outputs.items()}


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[str, tuple[tuple[int, ...], FinishReason | None]]]:
    """Each request by itself."""
    made = engine()
    yield {name: output for each in SPECS for name, output in run(made, [each]).items()}
    made.close()


def test_outputs_match_and_end_with_the_grammar(expected: Any) -> None:
    for name, (tokens, finish) in expected.items():
        if name.startswith(("j", "n")):
            if finish is FinishReason.STOP:
                text = TOKENIZER.decode(tokens[:-1])
                assert json.loads(text).keys() >= {"name", "count", "tags"}, text
                assert tokens[-1] in (0, EOS)  # the model has two ends
        elif name != "free":  # also where min_tokens wants more, and ignore_eos no end
            assert finish is FinishReason.STOP
            assert len(TOKENIZER.decode(tokens[:-1])) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 16},
        {"async_scheduling": True},
        {"kv_cache_memory_bytes": 200 << 10, "max_model_len": 192, "block_size": 8},
        {"max_num_seqs": 2, "enable_prefix_caching": False},
    ],
    ids=["chunks", "two in flight", "preemptions", "few at a time"],
)
def test_nothing_changes_an_output(expected: Any, settings: dict[str, Any]) -> None:
    made = engine(**settings)
    try:
        assert run(made, SPECS) == expected
        if "block_size" in settings:
            assert made.loop.scheduler.totals.preemptions
    finally:
        made.close()


def test_a_grammar_that_fails_ends_its_request_only(expected: Any) -> None:
    made = engine()
    loop = made.loop
    events: list[Event] = []
    # no token may begin it: the grammar begins with "a" or "b"
    forbidding = spec("stuck", REGEX, allowed_token_ids=(TOKENIZER.encode("Z", add_special_tokens=False)[0],))
    broken = spec("broken", Grammar(GrammarKind.REGEX, "("))
    fine = SPECS[0]
    for each in (forbidding, broken, fine):
        events += loop.handle(Add(each))
    while loop.has_work:
        if not loop.can_step and loop.held is not None:
            loop.held.wait()
        events += loop.step()
    made.close()
    last = {event.request: event for event in events if event.finish is not None}
    assert last["stuck"].failure is not None
    assert "structured_outputs" in last["stuck"].failure.cause
    assert last["broken"].failure is not None
    assert last["broken"].failure.type == InvalidRequest.__name__
    tokens = tuple(token for event in events if event.request == fine.id for token in event.tokens)
    assert tokens == expected[fine.id][0]


class Slow:
    """Grammars that are ready when the test says so."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def ready(self, grammar: Grammar) -> None:
        return None

    def start(self, grammar: Grammar) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


def test_who_waits_for_a_grammar_holds_up_nobody() -> None:
    made = engine()
    loop, slow = made.loop, Slow()
    woken = threading.Event()
    loop.held = Held(slow)  # type: ignore[arg-type]
    loop.held.wake = woken.set
    waiting, gone = spec("waits", JSON, n=2), spec("gone", JSON)
    assert loop.handle(Add(waiting)) == loop.handle(Add(gone)) == []
    assert loop.has_work
    assert not loop.can_step
    assert loop.stats().waiting == 3
    free = run_free(loop)
    assert free  # another one came and went meanwhile
    told = loop.handle(Abort(("gone", "waits:1")))
    assert [(event.request, event.finish) for event in told] == [
        ("gone", FinishReason.ABORT),
        ("waits:1", FinishReason.ABORT),
    ]
    assert loop.unfinished == ("waits:0",)
    woken.clear()  # a compilation that nobody needs any more was cancelled
    slow.futures[0].set_result(object())
    assert woken.is_set()
    assert loop.admit_held() == []  # whoever was aborted has had its last event
    assert loop.unfinished == ("waits:0",)
    assert loop.can_step
    loop.handle(Abort(loop.unfinished))
    loop.handle(Add(replace(waiting, id="fails")))
    slow.futures[-1].set_exception(InvalidRequest("no", param="structured_outputs"))
    failed = loop.admit_held()
    assert [event.request for event in failed] == ["fails:0", "fails:1"]
    assert all(event.failure is not None and event.failure.param == "structured_outputs" for event in failed)
    loop.handle(Add(replace(waiting, id="lost")))
    loop.reset()
    assert {event.request for event in loop.give_up("gone")} >= {"lost:0", "lost:1"}
    assert not loop.has_work
    made.close()


def run_free(loop: Any) -> list[Event]:
    events: list[Event] = loop.handle(Add(spec("free", None, max_tokens=4)))
    while loop.can_step:
        events += loop.step()
    return events
