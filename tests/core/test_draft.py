"""A plan in the making: what each item takes from the step's budgets, and what comes back with it."""

from __future__ import annotations

import pytest

from penstock.core.draft import PROMPT_TOKENS_PER_DECODE, Draft
from penstock.core.plan import PlanItem
from penstock.core.request import Request

from .world import request


def one(name: str = "a") -> Request:
    (made,) = Request.of(request(name, 30))
    return made


@pytest.mark.parametrize(
    ("item", "of_prompt"),
    [
        (PlanItem("a", 0, 0, 5, samples=0), 5),  # a chunk
        (PlanItem("a", 0, 0, 1, samples=0), 1),
        (PlanItem("a", 0, 0, 5, samples=1), 5),  # a chunk, and the prompt's end
        (PlanItem("a", 0, 0, 2, samples=1), 2),
        (PlanItem("a", 0, 9, 1, samples=1), 0),  # a decode
        (PlanItem("a", 0, 9, 3, samples=3, drafts=(1, 2)), 0),
        (PlanItem("a", 0, 9, 1, pools=True), 0),
        (PlanItem("a", 0, 0, 2, pools=True), 2),
    ],
)
def test_what_counts_as_a_prompts(item: PlanItem, of_prompt: int) -> None:
    draft, asking = Draft(20, 10), one()
    draft.put(asking, item)
    assert (draft.budget, draft.prompts) == (20 - item.tokens, 10 - of_prompt)
    assert (draft.requests, draft.items) == ([asking], [item])
    draft.drop(one("b"))
    assert draft.items == [item]
    draft.drop(asking)
    assert (draft.budget, draft.prompts, draft.requests, draft.items) == (20, 10, [], [])


def test_a_decode_takes_nothing_from_the_prompts() -> None:
    draft = Draft(20, 10)
    draft.decode(one(), PlanItem("a", 0, 9, 3, samples=3, drafts=(1, 2)))
    assert (draft.budget, draft.prompts, draft.preempted) == (17, 10, False)


def test_who_is_dropped_takes_his_own_item() -> None:
    draft, names = Draft(20, 10), "abc"
    requests = [one(name) for name in names]
    for place, each in enumerate(requests):
        draft.put(each, PlanItem(each.id, 0, 0, place + 2))
    draft.drop(requests[1])
    assert [item.request for item in draft.items] == ["a", "c"]
    assert draft.requests == [requests[0], requests[2]]
    assert (draft.budget, draft.prompts) == (20 - 6, 10 - 6)


def test_prompts_are_limited_beside_decodes_only() -> None:
    draft = Draft(20, 20)
    draft.limit_prompts(3)
    assert draft.prompts == 20  # nobody decodes
    for name in "ab":
        draft.decode(one(name), PlanItem(name, 0, 9, 1, samples=1))
    draft.limit_prompts(0)
    assert draft.prompts == 20  # no limit
    draft.limit_prompts(3)
    assert draft.prompts == 3 + 2 * PROMPT_TOKENS_PER_DECODE == 11
    assert draft.room == 11
    draft.budget = 5
    assert draft.room == 5
