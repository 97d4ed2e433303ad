"""Which name somebody meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.near import LONGEST, Names, edits

NAMES = Names(
    ("n", "seed", "top_p", "stop", "model", "max_tokens", "temperature", "stream_options"), never=("models",)
)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("tempertaure", "temperature"),
        ("tmperatur", "temperature"),
        ("tmpratur", None),
        ("maxTokens", "max_tokens"),
        ("MAX-TOKENS", "max_tokens"),
        ("maxtoken", "max_tokens"),
        ("topP", "top_p"),
        ("sead", "seed"),
        ("saed", "seed"),
        ("esde", None),
        ("N", "n"),
        ("m", None),
        ("models", None),
        ("modells", None),
        ("model_", "model"),
        ("num_ctx", None),
        ("", None),
        ("_", None),
        ("temperature" * 6, None),
    ],
)
def test_what_is_near(name: str, meant: str | None) -> None:
    assert NAMES.near(name) == meant
    assert NAMES.near(name) == meant  # also where it is remembered


def test_the_nearest_of_several() -> None:
    assert Names(("top_logprobs", "prompt_logprobs", "logprobs")).near("logprob") == "logprobs"
    assert Names(("guided_json", "guided_json_s")).near("guided_jsons") == "guided_json_s"


def brute(a: str, b: str) -> int:
    """Optimal string alignment, by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    best = min(brute(a[1:], b) + 1, brute(a, b[1:]) + 1, brute(a[1:], b[1:]) + (a[0] != b[0]))
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        best = min(best, brute(a[2:], b[2:]) + 1)
    return best


SHORT = st.text("abc", max_size=5)


@given(SHORT, SHORT)
def test_edits_are_those_of_the_definition(a: str, b: str) -> None:
    assert edits(a, b) == brute(a, b)


@given(st.text("tempraue_", min_size=4, max_size=14))
def test_nothing_that_is_near_is_passed_over(name: str) -> None:
    """What is skipped before it is aligned would not have been near."""
    plain = name.replace("_", "")
    assert (NAMES.near(name) == "temperature") == (edits(plain, "temperature") <= 2)


def test_made_up_names_are_not_kept_for_ever() -> None:
    names = Names(("temperature",))
    for i in range(5000):
        names.near(f"temperature{i}" + "x" * (i % 80))
    assert len(names._answers) <= 1024
    assert all(len(name) <= LONGEST for name in names._answers)
