"""What is decided of escalations, as pure functions: verdicts, what follows from them, and what never
leaves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.policy.escalation import Answer, Choice, Finding, Judge, decide, errored, follows
from penstock.gateway.policy.routes import Book, Forbidden, order, shadows
from penstock.spec.load import loads
from penstock.spec.routes import Escalation, Verifier


def judge(answer: Answer, **fields: Any) -> Finding:
    return Judge(Verifier(**fields)).judge(answer)


def one(text: str = "", **more: Any) -> Answer:
    return Answer((Choice(text, **more),), 4)


# ---- verdicts ----


def test_the_least_certain_choice_decides() -> None:
    answer = Answer((Choice("a", logprobs=(-0.1, -0.3)), Choice("b", logprobs=(-1.0, -2.0))))
    finding = judge(answer, mean_logprob=-1.5)
    assert (finding.verdict, finding.score) == ("passed", -1.5)
    finding = judge(answer, mean_logprob=-1.4)
    assert (finding.verdict, finding.reason) == ("failed", "a mean of -1.500 is below -1.4")


@given(st.lists(st.floats(-20, 0), min_size=1), st.floats(-20, 0))
def test_a_mean_is_judged_by_its_value(logprobs: list[float], least: float) -> None:
    finding = judge(one("x", logprobs=tuple(logprobs)), mean_logprob=least)
    assert (finding.verdict == "passed") == (sum(logprobs) / len(logprobs) >= least)
    assert finding.score == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-6)


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_verifier_without_anything_to_look_at_has_failed(mode: str) -> None:
    for answer, verifier in (
        (one("x"), {"mean_logprob": -1}),
        (Answer(()), {"regex": "x"}),
        (Answer((Choice("x"),)), {"length": {"max_tokens": 3}}),
        (one("x" * 300_000), {"regex": "y"}),
        (one('{"a":' * 100_000), {"json_schema": {"$ref": "#"}}),
    ):
        finding = judge(answer, on_failure=mode, **verifier)
        assert finding.verdict in (mode, "failed")
        assert finding.passes == (mode == "open" and finding.verdict == "open")
    assert judge(one("x"), mean_logprob=-1, on_failure=mode).verdict == mode


def test_a_schema_that_never_ends_is_a_verifier_that_fails() -> None:
    assert judge(one("{}"), json_schema={"$ref": "#"}).verdict == "closed"


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [('{"n": 1}', "passed"), ('{"n": "1"}', "failed"), ("{}", "failed"), ('```json\n{"n": 1}```', "failed")],
)
def test_json_of_a_schema(text: str, verdict: str) -> None:
    finding = judge(one(text), json_schema=SCHEMA)
    assert finding.verdict == verdict
    assert '"1"' not in finding.reason


def test_reasons_have_no_word_of_the_answer() -> None:
    secret = "hunter2"
    answer = one(f'{{"{secret}": "{secret}"}}', finish="length")
    for fields in (
        {"json_schema": {"additionalProperties": {"type": "number"}}},
        {"json_schema": {"propertyNames": {"maxLength": 2}}},
        {"regex": "^no"},
        {"not_regex": "."},
        {"length": {"max_characters": 1}},
        {"finish_reason": ["stop"]},
        {"mean_logprob": -0.1},
    ):
        finding = judge(answer, **fields)
        assert not finding.passes
        assert finding.reason
        assert secret not in finding.reason


FINDINGS = st.builds(
    Finding,
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["passed", "failed", "open", "closed"]),
    st.none() | st.floats(-5, 5),
)


@given(st.lists(FINDINGS, min_size=1))
def test_one_against_it_is_enough(findings: list[Finding]) -> None:
    chosen = decide(findings)
    assert chosen in findings
    assert chosen.passes == all(each.passes for each in findings)
    if chosen.passes:
        assert (chosen.verdict == "open") == any(each.verdict == "open" for each in findings)
    else:
        assert chosen == next(each for each in findings if not each.passes)


def test_what_follows() -> None:
    rules = {"to": [{"model": "m"}], "verifiers": [{"regex": "x"}]}
    usual = Escalation.model_validate(rules)
    good, bad = Finding("a", "passed"), Finding("a", "failed")
    assert not follows(usual, good, refused=False, errored=False)
    assert follows(usual, bad, refused=False, errored=False)
    assert follows(usual, errored("x"), refused=False, errored=True)
    assert not follows(usual, errored("x"), refused=True, errored=False)
    other = Escalation.model_validate({**rules, "on_error": "fail", "on_refusal": "escalate"})
    assert not follows(other, errored("x"), refused=False, errored=True)
    assert follows(other, errored("x"), refused=True, errored=False)


# ---- what never leaves ----

UPSTREAMS = ("house", "pooled", "cloud", "far")
HEAD = """
pools: {box: {hardware: L4, count: 8}}
models: {ours: {weights: demo, pool: box}}
upstreams:
  house: {url: 'http://a', local: true, models: {m: {}}}
  pooled: {url: 'http://b', pool: box, models: {m: {}}}
  cloud: {url: 'http://c', models: {m: {price: {input: 1, output: 1, as_of: 2026-01-01, source: x}}}}
  far: {url: 'http://d', pool: box, local: false, models: {m: {}}}
teams: {in: {local_only: true}, out: {}}
tags: {feature: {secret: {local_only: true}, plain: {}}}
routes:
"""
TARGET = st.sampled_from(["{model: ours}", *(f"{{model: m, upstream: {name}}}" for name in UPSTREAMS)])
TARGETS = st.lists(TARGET, min_size=1, max_size=3)


@st.composite
def routes(draw: st.DrawFn) -> str:
    """Two of them, of which the first may escalate to targets of its own or to the second."""
    lines = []
    for name in ("first", "second"):
        lines.append(f"  {name}:\n    targets: [{', '.join(draw(TARGETS))}]\n")
        for field in ("fallback", "shadow"):
            lines.append(f"    {field}: [{', '.join(draw(st.lists(TARGET, max_size=2)))}]\n")
        if name == "first":
            where = draw(st.sampled_from(["", "route: second", "to"]))
            if where == "to":
                where = f"to: [{', '.join(draw(TARGETS))}]"
            if where:
                lines.append(f"    escalate: {{{where}, verifiers: [{{regex: x}}]}}\n")
            lines.append("    comparator: {model: m, upstream: cloud}\n")
    return "".join(lines)


@given(
    routes(),
    st.sampled_from(["first", "second", "ours"]),
    st.booleans(),
    st.sampled_from(["in", "out", ""]),
    st.sampled_from(["secret", "plain", ""]),
    st.booleans(),
    st.data(),
)
def test_what_is_local_only_never_reaches_a_cloud(
    text: str, model: str, key: bool, team: str, feature: str, header: bool, data: st.DataObject
) -> None:
    """Whatever the routes say, as first target, fallback, escalation or shadow; and where nobody is left in
    the house, it is an error."""
    book = Book(loads(HEAD + text))
    tags = {"feature": feature} if feature else {}
    stays = key or header or book.team_local_only(team) or book.tags_local_only(tags)
    assert stays == (key or header or team == "in" or feature == "secret")
    way = book.find(model, {}, tags, team)
    for each in (way, way.escalation):
        if each is None:
            continue
        draws = st.lists(st.floats(0, 1, exclude_max=True), min_size=5, max_size=5)
        every = {*each.targets, *each.fallback}
        if stays and not any(place.in_house for place in every):
            with pytest.raises(Forbidden, match="outside of the house") as refused:
                each.places(stays)
            assert refused.value.code == "local_only"
            continue
        targets, fallback = each.places(stays)
        places = order(targets, fallback, data.draw(draws)[: len(targets)])
        copies = shadows(each, stays, data.draw(draws)[: len(each.shadow)])
        if stays:
            assert all(place.in_house for place in (*places, *copies))
            assert all(place.name in ("ours", "house", "pooled") for place in (*places, *copies))
            assert set(places) == {place for place in every if place.in_house}
        else:
            assert set(places) == every


LOCAL = """
pools: {box: {}}
models: {ours: {weights: demo, pool: box}, spare: {weights: demo, pool: box}}
routes:
  small: {targets: [{model: ours}], escalate: {route: large, verifiers: [{regex: x}]}}
  large: {local_only: true, targets: [{model: ours}], fallback: [{model: spare}], max_tokens: {ceiling: 9}}
"""


def test_a_route_that_is_escalated_to_keeps_its_own_terms() -> None:
    way = Book(loads(LOCAL)).find("small", {}, {})
    assert way.escalation is not None
    assert (way.escalation.name, way.escalation.route.max_tokens.ceiling) == ("small", 9)
    assert (way.stays(False), way.escalation.stays(False)) == (False, True)
    targets, fallback = way.escalation.places(False)
    assert [place.name for place in (*targets, *fallback)] == ["ours", "spare"]
