"""RequestSpec and its sequences: made in one place, with ids, seeds and leaders of their own."""

from __future__ import annotations

import pytest

from penstock.core.errors import InvalidRequest
from penstock.core.request import Request, State
from penstock.core.request_spec import FinishReason, InputSpan, Pooling, Prompt, RequestSpec, ServiceClass
from penstock.core.roll import NO_EPOCH
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
    plain, picture = Prompt((1, 2)), Prompt((1, 2), 16, (InputSpan(0, 1, "x"),))
    assert RequestSpec(id="r", prompts=(plain, picture), sampling=Sampling()).needs == {"inputs"}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (RequestSpec(id="r", prompts=(Prompt((1,)),)), None),
        (RequestSpec(id="r", prompts=(), sampling=Sampling()), "prompt"),
        (RequestSpec(id="r", prompts=(Prompt(()),), sampling=Sampling()), "prompt"),
        (RequestSpec(id="r", prompts=(Prompt((1,)),), sampling=Sampling(), n=0), "n"),
        (RequestSpec(id="r", prompts=(Prompt((1,), 0),), sampling=Sampling()), "max_tokens"),
        (RequestSpec(id="r", prompts=(Prompt((1,), 5),), pooling=Pooling()), "max_tokens"),
        (RequestSpec(id="r", prompts=(Prompt((1,), 0, generated=(2,)),), pooling=Pooling()), "n"),
        (RequestSpec(id="r", prompts=(Prompt((1,), 2, generated=(2,)),), sampling=Sampling(), n=2), "n"),
        (
            RequestSpec(id="r", prompts=(Prompt((1,), 2, generated=(2, 3)),), sampling=Sampling()),
            "max_tokens",
        ),
        (
            RequestSpec(
                id="r", prompts=(Prompt((1,), 2, generated=(2,)),), sampling=Sampling(prompt_logprobs=0)
            ),
            "prompt_logprobs",
        ),
    ],
)
def test_what_can_never_be_served(wrong: RequestSpec, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wrong.check()
    assert caught.value.param == param


def test_a_new_request_has_nothing_yet() -> None:
    (one,) = Request.of(spec())
    assert (one.arrival, one.epoch, one.rank, one.state) == (-1, NO_EPOCH, (), State.WAITING)
    assert (one.computed, one.pending, one.inflight, one.registered, one.reached) == (0, 0, 0, 0, 0)
    assert (one.blocks, one.hashes, one.prompt_logprobs, one.followers) == ([], [], [], [])
    assert (one.cached, one.scheduled_at, one.preemptions, one.device_seconds) == (None, None, 0, 0.0)
    assert one.speculating is False
    assert (one.prompt_len, one.max_tokens, one.max_len) == (2, 4, 6)
    assert (one.generated, one.target, one.prompt_is_computed) == (0, 2, False)


def test_followers_may_come_when_the_prompt_is_there_or_has_been() -> None:
    (one,) = Request.of(spec())
    for computed, generated, there in (
        (0, 0, False),
        (1, 0, False),
        (2, 0, True),
        (3, 1, True),
        (0, 1, True),
    ):
        one.computed, one.tokens = computed, [0, 7, *[5] * generated]
        assert one.prompt_is_computed is there
        assert one.generated == generated
    one.pending = 2
    assert one.target == 5


def test_what_ends_a_request() -> None:
    def stops(**fields: object) -> set[int]:
        made = RequestSpec(id="r", prompts=(Prompt((1,)),), eos_ids=(3, 4), **fields)  # type: ignore[arg-type]
        return set(next(iter(Request.of(made))).stops)

    assert stops(sampling=Sampling(stop_token_ids=(5,))) == {3, 4, 5}
    assert stops(sampling=Sampling(stop_token_ids=(5,), ignore_eos=True)) == {5}
    assert stops(pooling=Pooling()) == set()


def test_names_that_others_read() -> None:
    """They are in answers, in logs, and on the wire between processes."""
    assert [reason.value for reason in FinishReason] == ["stop", "length", "abort", "error"]
    assert [kind.value for kind in ServiceClass] == ["realtime", "background"]
    assert [state.value for state in State] == ["held", "waiting", "running", "finished"]


@pytest.mark.parametrize(
    ("seed", "wanted"),
    [(0, 0), (2**63 - 1, 2**63 - 1), (-(2**63), -(2**63)), (-2, -2), (5, 5)],
)
def test_a_seed_that_fits_stays_as_it_is(seed: int, wanted: int) -> None:
    assert spec(seed=seed).seed_of(0) == wanted


def test_a_pooling_request_has_no_seed_and_no_logprobs() -> None:
    pooling = RequestSpec(id="r", prompts=(Prompt((1,), 0),), pooling=Pooling(), drawn_seed=3)
    assert (pooling.seed_of(0), pooling.prompt_logprobs_of(0)) == (None, None)
    pooling.check()


def test_each_prompt_is_checked() -> None:
    good, empty = Prompt((1,), 1), Prompt(())
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        RequestSpec(id="r", prompts=(good, empty), sampling=Sampling()).check()
    with pytest.raises(InvalidRequest, match="needs an id") as caught:
        RequestSpec(id="", prompts=(good,), sampling=Sampling()).check()
    assert caught.value.param == "request_id"
    with pytest.raises(InvalidRequest, match="max_tokens is -1"):
        RequestSpec(id="r", prompts=(Prompt((1,), -1),), sampling=Sampling()).check()
    RequestSpec(id="r", prompts=(good, good), sampling=Sampling(), n=1).check()


def test_ids_of_sequences() -> None:
    assert spec().ids == ("r",)
    assert spec(prompts=2).ids == ("r:0", "r:1")
    assert spec(n=2, prompts=2).ids == ("r:0", "r:1", "r:2", "r:3")
    assert [spec(n=2, prompts=2).prompt_of(index).token_ids[0] for index in range(4)] == [0, 0, 1, 1]
    assert [next(iter(Request.of(spec(n=n)))).shares for n in (1, 2)] == [False, True]
