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


def test_sequences_become_tuples() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)


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
