"""RequestSpec and its sequences: made in one place, with ids, seeds and leaders of their own."""

from __future__ import annotations

import pytest

from penstock.core.errors import InvalidRequest
from penstock.core.request import Request, State
from penstock.core.request_spec import InputSpan, Pooling, Prompt, RequestSpec
from penstock.core.sampling_params import Sampling


def spec(n: int = 1, prompts: int = 1, **sampling: object) -> RequestSpec:
    return RequestSpec(
        id="r",
        prompts=tuple(Prompt((number, 7), 4) for number in range(prompts)),
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        n=n,
    )


def test_a_single_sequence_has_the_requests_id() -> None:
    (request,) = Request.of(spec())
    assert (request.id, request.state, request.leader) == ("r", State.WAITING, None)


def test_siblings_follow_the_first_of_their_prompt() -> None:
    requests = list(Request.of(spec(n=3, prompts=2)))
    assert [request.id for request in requests] == [f"r:{index}" for index in range(6)]
    assert [request.tokens[0] for request in requests] == [0, 0, 0, 1, 1, 1]
    leaders = [None if request.leader is None else request.leader.id for request in requests]
    assert leaders == [None, "r:0", "r:0", None, "r:3", "r:3"]
    assert [request.state is State.HELD for request in requests] == [bool(leader) for leader in leaders]
    assert [len(request.followers) for request in requests] == [2, 0, 0, 2, 0, 0]


def test_siblings_have_seeds_of_their_own() -> None:
    given = spec(n=3, prompts=2, seed=2**63 - 1)
    assert [given.seed_of(index) for index in range(3)] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert given.seed_of(4) == given.seed_of(1)  # the same prompt twice gives the same answers
    assert spec(n=2, seed=-2).seed_of(1) == 0
    assert spec(temperature=0.0, seed=3).seed_of(0) is None
    assert spec().seed_of(0) is None


def test_a_drawn_seed_differs_between_prompts_too() -> None:
    drawn = RequestSpec(id="r", prompts=(Prompt((1,)),) * 2, sampling=Sampling(), n=2, drawn_seed=10)
    assert [drawn.seed_of(index) for index in range(4)] == [10, 11, 12, 13]


def test_prompt_logprobs_are_computed_once() -> None:
    asked = spec(n=2, prompts=2, prompt_logprobs=1)
    assert [asked.prompt_logprobs_of(index) for index in range(4)] == [1, None, 1, None]


def test_what_separates_prefixes_cannot_be_forged() -> None:
    """No choice of salt makes one tenant's prefixes those of another."""
    base = {"id": "r", "prompts": (Prompt((1,)),), "sampling": Sampling()}
    salts = {
        RequestSpec(**base, **fields).salt  # type: ignore[arg-type]
        for fields in (
            {},
            {"tenant": "a"},
            {"cache_salt": "a"},
            {"adapter": "a"},
            {"adapter": "None"},
            {"tenant": "a', None, '"},
            {"tenant": "a", "cache_salt": "', None, '"},
        )
    }
    assert len(salts) == 7


def test_needs_are_named() -> None:
    wanting = RequestSpec(
        id="r",
        prompts=(Prompt((1, 2), 0, (InputSpan(0, 1, "x"),)),),
        pooling=Pooling(),
        adapter="lora",
        grammar="json",
    )
    assert wanting.needs == {"pooling", "adapter", "grammar", "inputs"}
    assert not spec().needs


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (RequestSpec(id="r", prompts=(Prompt((1,)),)), None),
        (RequestSpec(id="r", prompts=(), sampling=Sampling()), "prompt"),
        (RequestSpec(id="r", prompts=(Prompt(()),), sampling=Sampling()), "prompt"),
        (RequestSpec(id="r", prompts=(Prompt((1,)),), sampling=Sampling(), n=0), "n"),
        (RequestSpec(id="r", prompts=(Prompt((1,), 0),), sampling=Sampling()), "max_tokens"),
        (RequestSpec(id="r", prompts=(Prompt((1,), 5),), pooling=Pooling()), "max_tokens"),
    ],
)
def test_what_can_never_be_served(wrong: RequestSpec, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wrong.check()
    assert caught.value.param == param
