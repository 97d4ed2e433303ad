"""What evaluations say of the models in a ledger: a large model where a small one passes.

    penstock eval --output-json FILE ──read──▶ evaluations ──judge──▶ findings, with what the ledger's traffic
                                                                      would have cost

An evaluation is of two models. It says something of requests to the baseline's: of the feature that the set
is named after (`support.jsonl` of the feature support), else of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any

from penstock.core.errors import StartupError

from .findings import Finding, Seen, Sums
from .words import money


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One candidate against its baseline."""

    set: str
    """The set's name."""
    baseline: str
    """Model."""
    candidate: str
    flags: tuple[str, ...] = ()
    """Of the candidate's engine, where one was started: the same model may be quantised there."""
    verdict: str
    """As of evaluate.statistics.Finding."""
    pairs: int
    interval: tuple[float, float]
    """Of the difference of scores."""
    margin: float
    needed: int | None = None
    """Examples that would tell."""
    dollars: tuple[Fraction, Fraction] | None = None
    """Nanodollars of an answer by the baseline and by the candidate, to the same examples; None where one has
    no price."""
    asked: float | None = None
    """Unix seconds of the last answer."""

    @property
    def other(self) -> str:
        """The candidate as people call it."""
        return " ".join((self.candidate, *self.flags))

    @property
    def feature(self) -> str:
        """That the set is named after."""
        return PurePath(self.set).name.split(".")[0]


def read(path: Path) -> list[Evaluation]:
    """Of a report, or of all reports (`*.json`) in a folder. Raises StartupError."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise StartupError(f"--evals {path}: there is no report in that folder.", advice=_ADVICE)
        return [each for file in files for each in _of(file)]
    return _of(path)


_ADVICE = "penstock eval … --output-json FILE writes one."


def _of(path: Path) -> list[Evaluation]:
    try:
        report = json.loads(path.read_bytes())
        sides = {side["name"]: side for side in report["candidates"]}
        found = [
            _evaluation(report, report["baseline"], sides[each["candidate"]], each["finding"])
            for each in report["comparisons"]
            if each["finding"] is not None
        ]
        stopped = report["stopped"]
    except OSError as error:
        raise StartupError(
            f"--evals {path} cannot be read: {error.strerror or error}.", advice=_ADVICE
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise StartupError(
            f"--evals {path} is no report of penstock eval ({what}).", advice=_ADVICE
        ) from None
    if stopped is not None:
        raise StartupError(
            f"--evals {path}: that evaluation is not complete. {stopped}",
            advice="Run the same penstock eval again: it goes on where it stopped.",
        )
    return found


def _evaluation(
    report: Mapping[str, Any],
    baseline: Mapping[str, Any],
    candidate: Mapping[str, Any],
    finding: Mapping[str, Any],
) -> Evaluation:
    prices = [_of_an_answer(side["spent"]) for side in (baseline, candidate)]
    flags = tuple(map(str, candidate["about"].get("flags", ())))
    return Evaluation(
        set=str(report["set"]),
        baseline=str(baseline["about"]["model"]),
        candidate=str(candidate["about"]["model"]),
        flags=() if flags[-2:] == ("--quantization", "none") else flags,
        verdict=str(finding["verdict"]),
        pairs=int(finding["pairs"]),
        interval=(float(finding["interval"]["low"]), float(finding["interval"]["high"])),
        margin=float(report["margin"]),
        needed=None if finding["needed"] is None else int(finding["needed"]),
        dollars=None if prices[0] is None or prices[1] is None else (prices[0], prices[1]),
        asked=max(
            filter(None, (side["spent"]["last_asked"] for side in (baseline, candidate))), default=None
        ),
    )


def _of_an_answer(spent: Mapping[str, Any]) -> Fraction | None:
    if spent["nanodollars"] is None or not spent["answers"]:
        return None
    return Fraction(int(spent["nanodollars"]), int(spent["answers"]))


def concerns(evaluation: Evaluation, model: str) -> bool:
    """Whether it says something of a model of the ledger."""
    return _is(model, evaluation.baseline)


def _is(model: str, name: str) -> bool:
    """Whether a model of the ledger is that of an evaluation: by its name, or by the last part of its
    path."""
    return bool(model) and (model == name or PurePath(model).name == PurePath(name).name)


def judge(seen: Seen, evaluations: Sequence[Evaluation]) -> Iterator[Finding]:
    """Where the candidate passed and costs less, or the set is too small to tell; of several candidates of a
    baseline on a set, the one that saves most."""
    best: dict[tuple[str, str], Finding] = {}
    for each in evaluations:
        finding = _found(seen, each)
        if finding is None:
            continue
        place = (each.baseline, each.set)
        old = best.get(place)
        if old is None or (finding.dollars or -1) > (old.dollars or -1):
            best[place] = finding
    yield from best.values()


def _found(seen: Seen, evaluation: Evaluation) -> Finding | None:
    features = {group[0] for group in seen.features}
    only = evaluation.feature if evaluation.feature in features else None
    here: list[Sums] = []
    for (feature, _, upstream, model, _, _), sums in seen.features.items():
        if only is not None and feature != only:
            continue
        asked = _is(model, evaluation.baseline) or _is(upstream, evaluation.baseline)
        # who answers after an attempt has the hard ones only, of which a set of all says little
        if asked and not sums["escalated"] and not sums["attempts"]:
            here.append(sums)
    requests, dollars = _sum(here, "requests"), _sum(here, "dollars")
    if not requests or not dollars:
        return None
    about = f"feature {only}" if only is not None else f"model {evaluation.baseline}"
    low, high = (f"{100 * each:+.1f}" for each in evaluation.interval)
    when = "" if evaluation.asked is None else f" of {datetime.fromtimestamp(evaluation.asked, UTC).date()}"
    text = (
        f"{about[0].upper()}{about[1:]}: {requests:,} requests to {evaluation.baseline} cost "
        f"{money(dollars)}. On {evaluation.set}{when}, {evaluation.other} is "
    )
    seen_there = f"({evaluation.pairs} examples, a difference of {low} to {high} points of 100)"
    if evaluation.verdict == "too small to tell":
        more = "" if evaluation.needed is None else f"; about {evaluation.needed:,} examples would tell"
        text += f"perhaps as good, but the set is too small to tell {seen_there}{more}."
        return Finding(kind="large_model", subject=about, dollars=None, text=text)
    if evaluation.verdict not in ("better", "not worse"):
        return None
    text += f"{evaluation.verdict} {seen_there}, with a margin of {100 * evaluation.margin:g}. "
    saved, how = _saving(seen, evaluation, here, dollars)
    if saved is None:
        text += "What it would save is not known: give penstock eval the prices of both, or a penstock.yaml."
    elif saved <= 0:
        return None
    else:
        text += f"The same requests would have cost {money(saved)} less there, {how}; idle time not counted."
    return Finding(kind="large_model", subject=about, dollars=saved, text=text)


def _saving(seen: Seen, evaluation: Evaluation, here: Sequence[Sums], dollars: int) -> tuple[int | None, str]:
    """Nanodollars that the ledger's own requests would have cost less, and by which prices; None where nobody
    knows what the candidate takes."""
    if evaluation.dollars is not None and evaluation.dollars[0]:
        was, would = evaluation.dollars
        ratio = would / was
        return round(dollars * (1 - ratio)), f"at {float(ratio):.3g} of the price, as on the set"
    if evaluation.flags:
        return None, ""
    others = [
        sums
        for (_, _, upstream, model, _, _), sums in seen.features.items()
        if (_is(model, evaluation.candidate) or _is(upstream, evaluation.candidate)) and not sums["unpriced"]
    ]
    tokens, paid = _tokens(others), _sum(others, "dollars")
    if not tokens or not paid:
        return None, ""
    per_token = Fraction(paid, tokens)
    would_cost = round(per_token * _tokens(here))
    return dollars - would_cost, f"at the {money(round(per_token * 10**6))} that a million tokens cost there"


def _tokens(some: Sequence[Sums]) -> int:
    return _sum(some, "input_tokens") + _sum(some, "output_tokens")


def _sum(some: Sequence[Sums], name: str) -> int:
    return sum(sums[name] for sums in some)
