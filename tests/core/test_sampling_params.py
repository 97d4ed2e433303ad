"""SamplingParams: ranges, with errors that name the field and the value."""

from __future__ import annotations

import pytest

from penstock.core.errors import InvalidRequest
from penstock.core.sampling_params import Sampling, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("temperature", 10**400),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 0.00099),
        ("repetition_penalty", 1001),
        ("n", 1.5),
        ("top_k", 2.5),
        ("max_tokens", "5"),
        ("seed", True),
        ("logit_bias", {1: 200.0}),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: True}),
        ("logit_bias", {1: "1"}),
        ("seed", 2**64),
        ("top_k", 2**63),
        ("max_tokens", 10**400),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -2),
        ("stop", ("",)),
        ("allowed_token_ids", ()),
        ("n", 129),
        ("temperature", 100.5),
        ("temperature", True),
        ("min_p", -0.1),
        ("presence_penalty", -2.5),
        ("frequency_penalty", 2.5),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", float("nan")),
        ("logit_bias", {1: -100.5}),
        ("logit_bias", {1: 100.5}),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.0),
        ("prompt_logprobs", -2),
        ("prompt_logprobs", True),
        ("min_tokens", None),
        ("top_k", None),
        ("n", None),
    ],
)
def test_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (0, 5e-324, 1e-5, 100)),
        ("top_p", (5e-324, 1)),
        ("min_p", (0, 5e-324, 1)),
        ("presence_penalty", (-2, 2)),
        ("frequency_penalty", (-2, 2)),
        ("repetition_penalty", (0.001, 1000)),
        ("logit_bias", ({1: -100}, {1: 100}, {1: 5e-324})),
        ("seed", (-(2**63), 2**63 - 1)),
        ("top_k", (-1, 0, 1, 2**63 - 1)),
    ],
)
def test_the_borders_of_a_range_belong_to_it(field: str, values: tuple[object, ...]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]


def test_zero_has_no_sign() -> None:
    assert repr(SamplingParams(temperature=-0.0)) == repr(SamplingParams(temperature=0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("n", 128),
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1e-9),
        ("top_p", 1.0),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 1),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("logit_bias", {0: -100.0, 1: 100.0}),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("seed", 0),
        ("max_tokens", 1),
        ("max_tokens", None),
        ("min_tokens", 0),
        ("min_tokens", 16),  # as many as max_tokens
        ("logprobs", -1),
        ("logprobs", 0),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 0),
        ("allowed_token_ids", (0,)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field: str, value: object) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]


def test_the_defaults_change_nothing() -> None:
    params = SamplingParams()
    assert params.sampling == Sampling(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias={},
        allowed_token_ids=None,
        seed=None,
        stop_token_ids=(),
        ignore_eos=False,
        min_tokens=0,
        logprobs=None,
        prompt_logprobs=None,
    )
    assert (params.n, params.max_tokens, params.stop, params.include_stop_str_in_output) == (1, 16, (), False)
    assert params.skip_special_tokens is True
    assert params.spaces_between_special_tokens is True


def test_a_temperature_of_nearly_nothing_is_greedy() -> None:
    assert Sampling(temperature=9e-6).greedy
    assert not Sampling(temperature=1e-5).greedy


def test_a_range_is_told_with_the_value() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(min_p=1.5)
    assert str(caught.value) == "min_p must be in [0, 1], got 1.5."
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_p=0.0)
    assert str(caught.value) == "top_p must be in (0, 1], got 0.0."


def test_without_a_limit_of_tokens_a_minimum_is_free() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=500).min_tokens == 500


def test_a_copy_with_changes_is_checked() -> None:
    params = SamplingParams(seed=3)
    assert params.with_(n=4) == SamplingParams(seed=3, n=4)
    with pytest.raises(InvalidRequest, match="top_p"):
        params.with_(top_p=0.0)


def test_sequences_become_tuples() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    params = SamplingParams(stop=["a", "b"], allowed_token_ids=range(3))  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
    assert params.allowed_token_ids == (0, 1, 2)


def test_what_vllms_users_write() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, seed=-1, temperature=0)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.seed) == ((), (), {}, None)
    assert isinstance(params.temperature, float)
    assert SamplingParams(repetition_penalty=3).repetition_penalty == 3.0


def test_the_engine_gets_its_part_only() -> None:
    params = SamplingParams(seed=5, logit_bias={1: 2.0}, stop=("end",), n=2, max_tokens=3, min_tokens=1)
    assert params.sampling == Sampling(seed=5, logit_bias={1: 2.0}, min_tokens=1)
    assert type(params.sampling) is Sampling
    assert params.sampling.logit_bias is params.logit_bias


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    with pytest.raises(InvalidRequest, match="ids 0 to 99"):
        SamplingParams(**{field: (100,)}).verify(100, 20)  # type: ignore[arg-type]


def test_logit_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="token id 100"):
        SamplingParams(logit_bias={100: 1.0}).verify(100, 20)


@pytest.mark.parametrize(("token", "fine"), [(-1, False), (0, True), (99, True), (100, False)])
@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_the_vocabulary_begins_at_0_and_ends_before_its_size(field: str, token: int, fine: bool) -> None:
    value = {token: 1.0} if field == "logit_bias" else (token,)
    params = SamplingParams(**{field: value})  # type: ignore[arg-type]
    if fine:
        params.verify(100, 20)
    else:
        with pytest.raises(InvalidRequest, match=f"token id {token};") as caught:
            params.verify(100, 20)
        assert caught.value.param == field


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_the_limit_on_logprobs_is_named(field: str) -> None:
    params = SamplingParams(**{field: 21})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        params.verify(100, 20, "--max-logprobs")
    assert (caught.value.param, caught.value.advice) == (
        field,
        "The server's limit is set by --max-logprobs.",
    )
    with pytest.raises(InvalidRequest) as caught:
        params.verify(100, 20)
    assert caught.value.advice == ""


@pytest.mark.parametrize(
    ("count", "limit", "fine"), [(20, 20, True), (21, 20, False), (-1, 20, False), (-1, -1, True)]
)
def test_the_servers_limit_on_logprobs(count: int, limit: int, fine: bool) -> None:
    params = SamplingParams(logprobs=count)
    if fine:
        params.verify(100, limit)
    else:
        with pytest.raises(InvalidRequest, match="at most 20"):
            params.verify(100, limit)
