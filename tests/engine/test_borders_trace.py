"""The step log: every line of it, its ring at both bounds, and what is read back."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from penstock.core.cost import Coefficients
from penstock.core.executor import Capacity
from penstock.core.plan import Admission, Failure, Outcome, Plan, PlanItem, StepResult
from penstock.core.pooling import Vectors
from penstock.core.scheduler import SchedulerConfig
from penstock.engine import trace
from penstock.engine.messages import Abort, Add
from penstock.engine.replay import _result, replay
from penstock.engine.trace import StepLog, open_log, read_log

from .fake import add, spec
from .test_loop import make_loop, run

CAPACITY = Capacity(8, 4, 100, Coefficients(), frozenset({"sampling"}))
CONFIG = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)


def written(log: StepLog, file: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def item(request: str, index: int = 0) -> PlanItem:
    return PlanItem(request, index, 0, 1, (1,), 1)


def test_every_line_says_what_came_what_was_planned_and_what_came_of_it() -> None:
    file = StringIO()
    log = StepLog(CONFIG, CAPACITY, file)
    log.arrived(1.0, add("a", (1, 2), 3))
    log.arrived(1.5, Abort(("a", "b")))
    plan = Plan(4, items=(item("a"), item("b"), item("c"), item("d")))
    log.planned(2.0, plan)
    outcomes = (
        Outcome((7,)),
        Outcome((), pooled=Vectors.of((1.0,))),
        Outcome((), failure=Failure("broke", tainted=True)),
        Outcome((8, 9)),
    )
    log.stepped(2.5, plan, StepResult(4, 0.25, outcomes))
    log.stepped(3.0, Plan(5, items=(item("a"),)), StepResult(5, 0.5, (Outcome((7,)),), regular=False))
    log.reset(3.5, (6, 2))
    head, *lines = written(log, file)
    assert head["config"]["max_num_seqs"] == 2
    assert head["capacity"]["num_blocks"] == 8
    came, left, planned, stepped, irregular, reset = lines
    assert came["now"] == 1.0
    assert came["in"]["type"] == "Add"
    assert came["in"]["spec"]["prompts"][0]["token_ids"] == [1, 2]
    assert left == {"now": 1.5, "in": {"type": "Abort", "ids": ["a", "b"]}}
    assert planned == {"now": 2.0, "plan": json.loads(plan.to_json())}
    assert stepped == {
        "now": 2.5,
        "step": 4,
        "seconds": 0.25,
        "tokens": [[7], [], [], [8, 9]],
        "pooled": [1],
        "failures": {"2": {"cause": "broke", "tainted": True}},
    }
    assert irregular == {"now": 3.0, "step": 5, "seconds": 0.5, "tokens": [[7]], "regular": False}
    assert reset == {"now": 3.5, "reset": [6, 2]}


def test_what_is_usual_is_not_written() -> None:
    file = StringIO()
    log = StepLog(CONFIG, CAPACITY, file)
    log.stepped(1.0, Plan(0), StepResult(0, 0.1, ()))
    assert written(log, file)[1:] == [{"now": 1.0, "step": 0, "seconds": 0.1, "tokens": []}]
    assert " " not in file.getvalue(), "and takes no more room than it has to"


# ---- the ring ----


def kept(log: StepLog, tmp_path: Path) -> tuple[int, int]:
    """(entries of the ring, how many it says are missing)."""
    log.dump(tmp_path / "ring.jsonl")
    head, *lines = map(json.loads, (tmp_path / "ring.jsonl").read_text().splitlines())
    assert {"config", "capacity"} <= head.keys()
    dropped = lines.pop(0)["dropped"] if lines and "dropped" in lines[0] else 0
    return len(lines), dropped


def test_the_ring_has_as_many_entries_as_it_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trace, "_RING_ENTRIES", 3)
    log = StepLog(CONFIG, CAPACITY)
    for number in range(5):
        assert kept(log, tmp_path) == (min(number, 3), max(0, number - 3))
        log.reset(float(number), (number, 0))


def weighed(message: Add, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """The bound at which it is just kept."""
    for most in range(100):
        monkeypatch.setattr(trace, "_RING_TOKENS", most)
        log = StepLog(CONFIG, CAPACITY)
        log.arrived(0.0, message)
        if kept(log, tmp_path)[0]:
            return most
    raise AssertionError("it weighs too much")


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 5),
        ({"logit_bias": {3: 1.0, 4: 2.0}}, 7),
        ({"stop_token_ids": (1, 2, 3)}, 8),
        ({"allowed_token_ids": (1, 2, 3, 4)}, 9),
        ({"logit_bias": {3: 1.0}, "stop_token_ids": (1,), "allowed_token_ids": (1, 2)}, 9),
        ({"n": 4}, 5),
    ],
)
def test_a_request_weighs_its_prompt_and_the_ids_that_it_names(
    fields: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert weighed(add("a", range(5), 3, **fields), monkeypatch, tmp_path) == tokens


def test_a_plan_weighs_what_was_generated_before_and_no_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trace, "_RING_TOKENS", 5)
    file = StringIO()
    log = StepLog(CONFIG, CAPACITY, file)
    again = Admission("a", 0, spec("a", range(20)), 1, generated=(1, 2, 3))
    log.planned(0.0, Plan(0, (again,), (item("a"),)))
    assert kept(log, tmp_path) == (1, 0)
    log.planned(1.0, Plan(1, (again,), (item("a"),)))
    assert kept(log, tmp_path) == (1, 1), "six are more than five: the older one goes"
    log.arrived(2.0, add("b", range(2)))
    assert kept(log, tmp_path) == (2, 1)
    log.arrived(3.0, add("c", range(6)))
    assert kept(log, tmp_path) == (0, 4), "what is too large alone takes everything with it"
    assert written(log, file)[1]["plan"]["admitted"][0]["generated"] == [1, 2, 3]


# ---- files ----


def test_a_file_is_named_in_the_refusal(tmp_path: Path) -> None:
    assert open_log(None) is None
    with pytest.raises(Exception, match=r"--record-steps .*: Is a directory\. Name a writable file\."):
        open_log(str(tmp_path))
    file = open_log(str(tmp_path / "log"))
    assert file is not None
    assert file.encoding == "utf-8"
    file.close()


HEAD = '{"config": {}, "capacity": {}}'


def test_a_last_line_may_be_cut_off_and_no_other() -> None:
    assert read_log([HEAD]) == ({"config": {}, "capacity": {}}, [])
    assert read_log([HEAD, '{"now": 1}', '{"no']) == ({"config": {}, "capacity": {}}, [{"now": 1}])
    with pytest.raises(ValueError, match="a line in the middle is not JSON"):
        read_log([HEAD, '{"no', '{"now": 1}'])
    for nothing in ([], ["{"], ['{"config": {}}'], ['{"capacity": {}, "a": 1}']):
        with pytest.raises(ValueError, match="not the head of a step log"):
            read_log(nothing)
    for line in ("5", "[]", '"dropped"'):
        with pytest.raises(ValueError, match="not the head of a step log"):
            read_log([line])
        with pytest.raises(ValueError, match="a line is not a JSON object"):
            read_log([HEAD, line])
    with pytest.raises(ValueError, match="begins in mid-run, 7 entries are missing"):
        read_log([HEAD, '{"dropped": 7}', '{"now": 1}'])
    assert read_log([HEAD, '{"now": 1}', '{"dropped": 7}'])[1] == [{"now": 1}, {"dropped": 7}]


def test_a_replay_ends_at_the_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    loop = make_loop(log=path)
    for name in "abc":
        loop.handle(add(name, (1, 2, 3), max_tokens=3))
    loop.handle(Abort(("b",)))
    run(loop)
    assert loop._log is not None
    loop._log.close()
    lines = path.read_text().splitlines()
    recorded, replayed = replay(lines)
    assert recorded == replayed
    plans = [place for place, line in enumerate(lines) if '"plan":' in line]
    assert len(recorded) == len(plans) >= 3
    other = json.loads(lines[plans[1]])
    other["plan"]["step"] += 1
    changed = [*lines[: plans[1]], json.dumps(other), *lines[plans[1] + 1 :]]
    recorded, replayed = replay(changed)
    assert len(recorded) == len(replayed) == 2
    assert recorded[0] == replayed[0]
    assert recorded[1] != replayed[1]
    # without what was aborted, another plan follows; a record that ends well says that a line is gone
    without = [line for line in lines if '"Abort"' not in line]
    with pytest.raises(ValueError, match=f"{len(lines) - 3} entries are left of {len(lines) - 2}"):
        replay(without)
    recorded, replayed = replay(without[:-1])
    assert recorded != replayed


def test_a_result_is_read_back_with_its_failures_and_pools() -> None:
    record = {
        "seconds": 0.5,
        "tokens": [[1, 2], [], []],
        "failures": {"1": {"cause": "nan", "tainted": True}},
        "pooled": [2],
    }
    assert _result(Plan(7), record) == StepResult(
        7,
        0.5,
        (
            Outcome((1, 2)),
            Outcome((), failure=Failure("nan", tainted=True)),
            Outcome((), pooled=Vectors(0, b"")),
        ),
        True,
    )
    assert _result(Plan(7), {"seconds": 1, "tokens": [[3]], "regular": False}) == StepResult(
        7, 1, (Outcome((3,)),), False
    )
