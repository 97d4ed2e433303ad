"""Engines that an evaluation starts: one after another, ended afterwards, and what is said when one dies."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from penstock.evaluate.asking import Patience
from penstock.evaluate.dataset import read_dataset
from penstock.evaluate.result import build_result
from penstock.evaluate.run import Evaluation, Outcome, evaluate
from penstock.evaluate.sides import Local, Side
from penstock.gateway.local.command import Command

SCRIPT = str(Path(__file__).with_name("scripted_engine.py"))


class Said:
    """A watch that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, name: str, total: int) -> None:
        self.lines.append(f"{name}: {total}")

    def advance(self, name: str) -> None:
        pass

    def say(self, text: str) -> None:
        self.lines.append(text)


def local(tmp_path: Path, name: str, *more: str) -> Side:
    def command(port: int, key: str) -> Command:
        arguments = (sys.executable, SCRIPT, str(port), key, str(tmp_path / "pids"), *more)
        return Command(arguments=arguments, probe="/readyz", alive="/livez")

    return Side(name=name, where=Local(name, command, {"model": name}))


def run(
    tmp_path: Path, baseline: Side, candidate: Side, said: Said | None = None, judge: Side | None = None
) -> Outcome:
    path = tmp_path / "set.jsonl"
    grader = "exact" if judge is None else "judge"
    lines = ({"prompt": str(n), "expected": str(n), "grader": grader} for n in range(12))
    path.write_text("\n".join(map(json.dumps, lines)))
    evaluation = Evaluation(
        dataset=read_dataset(path),
        baseline=baseline,
        candidates=(candidate,),
        judge=judge,
        cache=tmp_path / "cache",
        patience=Patience(concurrency=2, retries=0),
    )
    return asyncio.run(evaluate(evaluation, said or Said()))


def pids(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "pids").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_one_after_another_and_none_for_what_is_kept(tmp_path: Path) -> None:
    said = Said()
    outcome = run(tmp_path, local(tmp_path, "a"), local(tmp_path, "b"), said)
    assert said.lines == ["a: starting its engine", "a: 12", "b: starting its engine", "b: 12", "grading: 24"]
    assert outcome.stopped is None
    result = build_result(outcome, margin=0.02, confidence=0.95)
    assert result.baseline.score == 1.0
    assert result.baseline.spent.device_time == 12 * 500_000_000
    assert len(pids(tmp_path)) == 2
    assert all(map(is_gone, pids(tmp_path)))
    again = Said()
    outcome = run(tmp_path, local(tmp_path, "a"), local(tmp_path, "b"), again)
    assert again.lines == ["a: 12", "b: 12", "grading: 24"]
    assert [each.cached for each in outcome.sides] == [12, 12]


def test_an_engine_that_dies_in_the_middle_says_why_and_is_not_started_again(tmp_path: Path) -> None:
    outcome = run(tmp_path, local(tmp_path, "a"), local(tmp_path, "b", "5"))
    assert outcome.stopped is not None
    assert outcome.stopped.startswith("The b is down")
    assert "out of magic smoke" in outcome.stopped
    assert len(pids(tmp_path)) == 2
    assert 0 < outcome.sides[1].asked <= 5
    kept = outcome.sides[1].asked
    outcome = run(tmp_path, local(tmp_path, "a"), local(tmp_path, "b"))
    assert outcome.stopped is None
    assert (outcome.sides[1].cached, outcome.sides[1].asked) == (kept, 12 - kept)
    assert all(map(is_gone, pids(tmp_path)))


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    outcome = run(tmp_path, local(tmp_path, "a", "-1"), local(tmp_path, "b"))
    assert outcome.stopped is not None
    assert "its engine does not start: status 2" in outcome.stopped
    assert "error: --quantization: no such scheme" in outcome.stopped
    assert not (tmp_path / "pids").exists()
    assert build_result(outcome, margin=0.02, confidence=0.95).status == 4


def test_a_judges_engine_is_started_when_there_is_something_to_grade(tmp_path: Path) -> None:
    """This one repeats what it is asked, which is no grade."""
    said = Said()
    outcome = run(tmp_path, local(tmp_path, "a"), local(tmp_path, "b"), said, local(tmp_path, "judge"))
    assert said.lines[-2:] == ["judge: starting its engine", "grading: 24"]
    assert len(pids(tmp_path)) == 3
    assert all(map(is_gone, pids(tmp_path)))
    result = build_result(outcome, margin=0.02, confidence=0.95)
    assert result.status == 4
    assert len(result.comparisons[0].ungraded) == 12
    assert "the judge gave no grade" in result.comparisons[0].ungraded[0][1]


@pytest.mark.parametrize("which", ["asking", "grading"])
def test_whatever_is_raised_the_engine_is_ended(tmp_path: Path, which: str) -> None:
    class Fault(Said):
        def advance(self, name: str) -> None:
            if (name == "grading") == (which == "grading"):
                raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run(tmp_path, local(tmp_path, "a"), local(tmp_path, "b"), Fault())
    assert all(map(is_gone, pids(tmp_path)))
