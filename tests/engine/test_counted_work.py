"""What refusals and giant requests cost the engine, in calls and objects instead of seconds."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from penstock.core.request import Request
from penstock.core.request_spec import FinishReason, Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Abort, Add, Drain, encode
from penstock.engine.process import EngineProcess, Launch
from tests.engine.fake import FakeExecutor, add
from tests.engine.test_loop import make_loop


def calls(action: Callable[[], object]) -> int:
    """Calls, returns and resumptions of generators, Python's and C's, that an action takes."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    gc.disable()  # hypothesis is called at each collection, whoever caused it
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def crowded(waiting: int, bound: int | None) -> EngineLoop:
    """One request runs on and on, others wait behind it."""
    executor = FakeExecutor(num_blocks=4096)
    loop = make_loop(executor, max_num_seqs=1, max_model_len=8192, max_num_queued_reqs=bound)
    loop.handle(add("first", max_tokens=8000))
    loop.step()
    for number in range(waiting):
        loop.handle(add(f"w{number}", max_tokens=8000))
    loop.step()
    return loop


def refusal(waiting: int) -> int:
    loop = crowded(waiting, waiting)

    def refuse() -> None:
        loop.handle(add("late"))
        (refused, token) = loop.step()
        assert refused.finish is FinishReason.ERROR
        assert token.request == "first"

    return calls(refuse)


def test_a_refusal_does_not_look_at_those_who_wait() -> None:
    assert refusal(2000) == refusal(20)


def test_refusing_costs_less_than_serving() -> None:
    many = 300

    def serve_all() -> None:
        loop = crowded(0, None)
        for number in range(many):
            loop.handle(add(f"r{number}", max_tokens=1))
        loop.handle(Abort(("first",)))
        while loop.has_work:
            loop.step()

    def refuse_all() -> None:
        loop = crowded(0, 0)
        for number in range(many):
            loop.handle(add(f"r{number}", max_tokens=1))
            (refused, _) = loop.step()  # each in a step of its own: the worst for it
            assert refused.finish is FinishReason.ERROR

    def steps_alone() -> None:
        loop = crowded(0, 0)
        for _ in range(many):
            loop.step()

    assert calls(refuse_all) - calls(steps_alone) <= calls(serve_all)


def giant(choices: int = 128, prompts: int = 32, **sampling: object) -> RequestSpec:
    return RequestSpec(
        id="g",
        prompts=tuple(Prompt(tuple(range(number, number + 9)), 4) for number in range(prompts)),
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        n=choices,
    )


def test_what_sequences_have_in_common_is_there_once() -> None:
    requests = Request.of(giant(stop_token_ids=tuple(range(2048))))
    assert len(requests) == 4096
    assert len({id(request.stops) for request in requests}) == 1
    assert len({id(request.tokens) for request in requests}) == 32, "one list for each prompt"


def test_who_is_admitted_has_tokens_of_his_own() -> None:
    loop = make_loop(FakeExecutor(), max_num_seqs=2)
    loop.handle(Add(giant(3, 1)))
    loop.step()
    loop.step()
    running = loop.scheduler.running
    assert [request.id for request in running] == ["g:0", "g:1"]
    assert all(request.generated for request in running)
    late = loop.scheduler._roll.requests["g:2"]
    assert late.tokens == list(range(9))


def test_the_ids_of_a_request_are_made_once_on_its_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = cast(Any, RequestSpec.ids).fget

    def ids(spec: RequestSpec) -> tuple[str, ...]:
        made.append(spec.id)
        return cast(tuple[str, ...], original(spec))

    monkeypatch.setattr(RequestSpec, "ids", property(ids))
    loop = make_loop()
    loop.handle(Add(giant()))
    while loop.has_work:
        loop.handle(Abort(loop.scheduler.unfinished))
    assert made == ["g"]


def test_what_is_taken_in_between_two_steps_is_bounded(tmp_path: Path) -> None:
    """Those who run get their next step in time, however much arrives at once."""
    context = zmq.Context()
    sender = context.socket(zmq.PUSH)
    sender.set_hwm(0)
    sender.bind(f"ipc://{tmp_path}/in")
    parent, alive = os.pipe()
    launch = Launch(EngineConfig(), f"ipc://{tmp_path}/in", f"ipc://{tmp_path}/out", "", parent)
    process = EngineProcess(launch)
    taken: list[int] = []

    def handle(message: Add | Abort) -> list[object]:
        taken.append(message.sequences)
        return []

    loop = cast(EngineLoop, SimpleNamespace(handle=handle))
    try:
        for _ in range(5):
            sender.send(encode(Add(giant(64))))
        sender.send(encode(Drain(60.0)))
        rounds = []
        while process._deadline is None:
            assert process._poller.poll(10_000)
            process._receive(loop, wait=False)
            rounds.append(sum(taken))
            taken.clear()
        assert sum(rounds) == 5 * 2048
        assert max(rounds) <= 4096
    finally:
        process.close()
        context.destroy(linger=0)
        os.close(parent)
        os.close(alive)
