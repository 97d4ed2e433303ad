"""Whether a candidate must have passed an evaluation before anybody gets its answers, and whether it has.

A quantised or a smaller model answers differently, and no error rate tells. `penstock eval` does, with its
`--output-json FILE`. What a target is made of is read from the spec, and from the catalogue of models or
their folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.errors import PenstockError, StartupError
from penstock.fleet.facts import SCHEMES, ModelFacts
from penstock.fleet.question import scheme_named
from penstock.spec.model import Spec
from penstock.spec.routes import Target

_LARGEST = 256 << 20
_PASSED = ("better", "not worse")

Lookup = Callable[[str], ModelFacts]
"""Weights → what they are. Raises PenstockError where nobody knows."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What a target is made of."""

    name: str
    weights: str
    parameters: int
    bits: float


def wanted(spec: Spec, candidate: Target, others: list[Target], lookup: Lookup) -> str | None:
    """Why an evaluation is wanted of the candidate; None where it has as many parameters as each of the
    others, and as many bits for each."""
    try:
        new = _made(spec, candidate, lookup)
        old = [_made(spec, each, lookup) for each in others]
    except PenstockError as error:
        return f"nobody can tell from the spec whether it is quantised or smaller: {error.message}"
    for each in old:
        if new.bits < each.bits:
            return f"{new.name} has {new.bits:g} bits for each weight, and {each.name} has {each.bits:g}"
        if new.parameters < each.parameters:
            return (
                f"{new.name} is smaller: {new.parameters / 1e9:.3g} billion parameters, and {each.name} has "
                f"{each.parameters / 1e9:.3g}"
            )
    return None


def _made(spec: Spec, target: Target, lookup: Lookup) -> _Made:
    if target.upstream is None:
        model = spec.models[target.model]
        name, weights = target.model, model.weights
        flags = {flag.replace("_", "-"): value for flag, value in model.flags.items()}
        scheme = model.quantization or flags.get("quantization")
    else:
        served = spec.upstreams[target.upstream].models[target.model]
        name, weights, scheme = f"{target.model}@{target.upstream}", served.name or target.model, None
    facts = lookup(weights)
    bits = (SCHEMES[facts.native] if scheme is None else scheme_named(str(scheme))).bits
    return _Made(name, weights, facts.parameters, bits)


def passed(path: Path, candidate: str | None) -> str:
    """What `penstock eval` has found, in a line.

    Args:
        path: its `--output-json`.
        candidate: which of its candidates, by name; needed where it has several.

    Raises StartupError: the file is no such report, its run was not complete, the candidate has not passed.
    """
    report = _read(path)
    try:
        names = [each["candidate"] for each in report["comparisons"]]
        if len(names) != 1 if candidate is None else candidate not in names:
            raise StartupError(
                f"{path} compares {', '.join(names) or 'nobody'}.",
                advice="Say which of them it is with --verdict-of NAME.",
            )
        found = next(each for each in report["comparisons"] if candidate in (None, each["candidate"]))
        if report["stopped"] is not None:
            raise StartupError(
                f"The evaluation in {path} is not complete: {report['stopped']}",
                advice="Run the same `penstock eval` again: it goes on where it stopped.",
            )
        finding = found["finding"]
        verdict = "nothing" if finding is None else finding["verdict"]
        said = f"{found['candidate']}: {verdict}"
        if finding is not None:
            points = 100 * finding["difference"]
            said += f" ({points:+.1f} points on {finding['pairs']} examples of {report['set']})"
    except (KeyError, TypeError, ValueError) as error:
        raise _no_report(path) from error
    if verdict not in _PASSED:
        raise StartupError(
            f"{path} does not let it pass: {said}.",
            advice="A candidate must be better or not worse (--margin of `penstock eval`).",
        )
    return said


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise StartupError(f"--verdict {path} cannot be read: {error.strerror or error}.") from error
    try:
        value = json.loads(content) if len(content) <= _LARGEST else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _no_report(path)
    return value


def _no_report(path: Path) -> StartupError:
    return StartupError(
        f"{path} is no report of `penstock eval`.",
        advice="Write one: penstock eval --set FILE --baseline OLD --candidate NEW --output-json FILE",
    )
