"""Plans as data: what they add up to, how they are logged, and what a field is when nobody sets it."""

from __future__ import annotations

import pytest

from penstock.core.cost import plan_features
from penstock.core.plan import (
    Admission,
    Event,
    Failure,
    Load,
    Outcome,
    Plan,
    PlanItem,
    StepResult,
    TokenLogprob,
)
from penstock.core.request_spec import InputSpan, Pooling, Prompt, RequestSpec
from penstock.core.sampling_params import Sampling

SPEC = RequestSpec(id="r", prompts=(Prompt((7, 8, 9), 4),), sampling=Sampling(), n=2)
PLAN = Plan(
    3,
    admitted=(Admission("r:1", 5, SPEC, 1, (4, 6)),),
    items=(
        PlanItem("r:1", 5, 0, 5, (2, 0), 1),
        PlanItem("s", 4, 6, 3, (), 3, (11, 12)),
        PlanItem("t", 2, 4, 2, (3,), 0, (), True),
    ),
    released=("u", "r:1"),
)


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 5), (6, 1), (6, 3), (100, 40)])
def test_a_querys_context_is_all_positions_up_to_its_own(start: int, tokens: int) -> None:
    plan = Plan(0, items=(PlanItem("a", 0, start, tokens),))
    read = sum(position + 1 for position in range(start, start + tokens))
    assert plan.contexts == (read,)
    assert isinstance(plan.contexts[0], int)  # exact, however long
    assert plan.load == Load(tokens, read, 0)


def test_a_steps_load_is_the_sum_of_its_items() -> None:
    assert PLAN.contexts == (15, 24, 11)
    assert PLAN.load == Load(tokens=10, context=50, samples=4)
    assert PLAN.tokens == 10
    assert plan_features(PLAN) == (1.0, 10.0, 50.0, 4.0)
    assert Plan(0).load == Load(0, 0, 0)


def test_the_log_is_compact_and_has_its_keys_in_order() -> None:
    assert PLAN.to_json() == (
        '{"admitted":[{"epoch":5,"generated":[4,6],"index":1,"request":"r:1","spec":"r"}],'
        '"items":[{"blocks":[2,0],"drafts":[],"epoch":5,"pools":false,"request":"r:1","samples":1,"start":0,'
        '"tokens":5},{"blocks":[],"drafts":[11,12],"epoch":4,"pools":false,"request":"s","samples":3,"start":6,'
        '"tokens":3},{"blocks":[3],"drafts":[],"epoch":2,"pools":true,"request":"t","samples":0,"start":4,'
        '"tokens":2}],"released":["u","r:1"],"step":3}'
    )


def test_what_is_logged_comes_back() -> None:
    back = Plan.from_json(PLAN.to_json(), {"r": SPEC})
    assert back == PLAN
    assert [type(item) for item in back.items] == [PlanItem] * 3
    assert isinstance(back.items[1].drafts, tuple)
    assert isinstance(back.admitted[0].generated, tuple)


def test_an_admission_knows_its_prompt_and_can_forget_it() -> None:
    spec = RequestSpec(id="r", prompts=(Prompt((1,), 4), Prompt((2,), 5)), sampling=Sampling(), n=2)
    prompts = [Admission(name, 0, spec, index).prompt for index, name in enumerate(spec.ids)]
    assert prompts == [spec.prompts[0], spec.prompts[0], spec.prompts[1], spec.prompts[1]]
    bare = Admission("r:2", 7, spec, 2, (3,)).without_prompts()
    assert bare == Admission("r:2", 7, RequestSpec(id="r", prompts=()), 2, (3,))


def test_what_nobody_sets_says_nothing() -> None:
    """Fields travel between processes by place, and replays read what they are not told."""
    assert Plan(1) == Plan(1, (), (), ())
    assert Admission("a", 0, SPEC, 0).generated == ()
    assert PlanItem("a", 1, 2, 3) == ("a", 1, 2, 3, (), 0, (), False)
    assert TokenLogprob(1, -0.5, 2) == (1, -0.5, 2, ())
    assert Failure("why") == Failure("why", "RequestFailed", None, "", None, False)
    assert Outcome() == ((), (), (), None, None)
    assert StepResult(1, 0.5, ()).regular is True
    assert Event("a") == ("a", (), (), None, None, None, None, None, 0.0, None, 0, 0.0, 0)
    assert Prompt((1,)) == Prompt((1,), 16, ())
    assert Pooling() == Pooling("last", "embed", True, None)
    assert InputSpan(1, 2, "x").digest == "x"


def test_what_a_request_asks_for_by_itself() -> None:
    spec = RequestSpec(id="a", prompts=())
    assert (spec.sampling, spec.pooling, spec.deadline, spec.adapter, spec.grammar) == (None,) * 5
    assert (spec.n, spec.arrived_at, spec.priority, spec.eos_ids, spec.drawn_seed) == (1, 0.0, 0, (), None)
    assert (spec.tenant, spec.cache_salt, spec.service_class) == ("", "", "realtime")
