"""Questions for tests."""

from __future__ import annotations

from typing import Any

from penstock.fleet import catalogue
from penstock.fleet.load import Targets, Workload
from penstock.fleet.question import Question, scheme_named


def ask(
    model: str,
    *gpus: str,
    rate: float = 1.0,
    prompt: int = 1000,
    output: int = 200,
    scheme: str | None = None,
    peak: float | None = None,
    targets: dict[str, float] | None = None,
    **more: Any,
) -> Question:
    """One, with a TTFT of a second for 99 of 100 requests where no targets are given."""
    return Question(
        name=model,
        facts=catalogue.find_model(model),
        workload=Workload(rate, prompt, output, 2 * rate if peak is None else peak),
        targets=Targets(**({"ttft_p99": 1.0} if targets is None else targets)),
        devices=[catalogue.find_device(gpu) for gpu in gpus],
        scheme=scheme_named(scheme) if scheme else None,
        **more,
    )
