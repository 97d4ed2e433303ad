"""What is wrong with how models are used, found in sums over a ledger, with what it costs.

idle_devices     a device that is paid for all day, and asked now and then
large_model      a dear model where a cheaper one succeeds as often, by outcomes or by an evaluation
no_prefix_hits   long prompts, and hardly a token of them from the cache
unbounded        requests that may generate as much as they like
untagged         keys whose requests have no feature
unused_context   a context of which nobody needs half
many_features    a tag that has a value for each user

The ledger holds no prompts and no answers: what cannot be told from sums is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from .evaluations import Evaluation, concerns, judge
from .findings import Finding, Seen, Sums
from .report import Line, Report
from .words import count, money, pace, percent, plain, span

ENOUGH = 20
"""Outcomes of each model, before two are compared."""
MARGIN = 0.05
"""By how much a cheaper model may succeed less often, and still pass."""
_IDLE = Fraction(1, 20)
"""Share of the paid time below which a pool is asked now and then."""
_LONG_PROMPT = 1000
"""Tokens, on average."""
_FEW_HITS = Fraction(1, 20)
"""Of the input."""
_SOME = 50
"""Requests, before a habit is one."""
_LARGE_CONTEXT = 65_536
_MANY_FEATURES = 1000
_MOST = 5
"""Findings of one kind."""


def find(
    report: Report, seen: Seen, days: float, *, whole: bool = True, evaluations: Sequence[Evaluation] = ()
) -> list[Finding]:
    """All that is found in a span of so many days, dearest first.

    Args:
        whole: whether all requests of the pools are in the report; else others used them, too.
        evaluations: of models that may be in it.
    """
    found: list[Finding] = []
    for some in (
        _idle_devices(report, seen, days) if whole else (),
        (*_large_model(seen, evaluations), *judge(seen, evaluations)),
        _no_prefix_hits(seen),
        _unbounded(seen),
        _untagged(seen),
        _unused_context(seen),
        _many_features(seen),
    ):
        found += sorted(some, key=lambda each: -(each.dollars or 0))[:_MOST]
    found.sort(key=lambda each: -(each.dollars or 0))
    return [replace(each, subject=plain(each.subject), text=plain(each.text)) for each in found]


def _idle_devices(report: Report, seen: Seen, days: float) -> Iterator[Finding]:
    for use in report.pools:
        if not use.paid or use.idle is None or days <= 0:
            continue
        used = Fraction(use.charged, use.paid)
        if used >= _IDLE:
            continue
        here = _summed(sums for group, sums in seen.features.items() if group[4] == use.pool)
        text = (
            f"Pool {use.pool} was paid {money(use.paid)} and used for {percent(used)} of it, by "
            f"{pace(here['requests'], days)}."
        )
        if here["compared"]:
            text += (
                f" The comparator takes {money(here['comparator_dollars'])} for the same tokens: at so few "
                "requests an API costs less than a device that waits."
            )
        text += " Share the device with other models, let it sleep (keep_alive, start: lazy), or use an API."
        yield Finding(kind="idle_devices", subject=use.pool, dollars=use.idle, text=text)


def _large_model(seen: Seen, evaluations: Sequence[Evaluation]) -> Iterator[Finding]:
    tasks: dict[Any, dict[str, dict[str, int]]] = {}
    for (feature, route, _, model, _, _), sums in seen.features.items():
        if not model or not sums["requests"]:
            continue
        task = ("feature", feature) if feature is not None else ("route", route)
        models = tasks.setdefault(task, {})
        old = models.get(model)
        models[model] = dict(sums) if old is None else {name: old[name] + sums[name] for name in old}
    for (kind, task), models in tasks.items():
        if any(sums["attempts"] or sums["escalated"] for sums in models.values()):
            continue  # of a model that hands on what is too hard for it only what it could do is known
        about = f"{kind} {task}"
        priced = {name: sums for name, sums in models.items() if sums["dollars"] and not sums["unpriced"]}
        for dear, sums in priced.items():
            best: Finding | None = None
            for cheap, other in priced.items():
                each, less = (Fraction(s["dollars"], s["requests"]) for s in (sums, other))
                if less * 2 > each or min(sums["told"], other["told"]) < ENOUGH:
                    continue
                worst = worst_difference(_rate(other), other["told"], _rate(sums), sums["told"])
                if worst < -MARGIN:
                    continue
                saved = round((each - less) * sums["requests"])
                finding = Finding(
                    kind="large_model",
                    subject=about,
                    dollars=saved,
                    text=f"{about[0].upper()}{about[1:]}: {dear} costs {money(round(each))} a request and "
                    f"succeeds in {percent(_rate(sums))} of {sums['told']} known outcomes; {cheap} costs "
                    f"{money(round(less))} and succeeds in {percent(_rate(other))} of {other['told']}: at "
                    f"worst {percent(-min(worst, 0.0))} less often, at 95 % confidence. Its "
                    f"{sums['requests']} requests would have cost {money(saved)} less there, idle time not "
                    "counted.",
                )
                if best is None or saved > (best.dollars or 0):
                    best = finding
            if best is not None:
                yield best
        told = sum(sums["told"] for sums in models.values())
        if any(concerns(each, model) for each in evaluations for model in models):
            continue
        dollars = sum(sums["dollars"] for sums in models.values())
        if not told and dollars and sum(sums["requests"] for sums in models.values()) >= _SOME:
            yield Finding(
                kind="large_model",
                subject=about,
                dollars=None,
                text=f"{about[0].upper()}{about[1:]}: whether a smaller model than "
                f"{', '.join(sorted(models))} would do is not known, since no outcome of its "
                f"{sum(sums['requests'] for sums in models.values())} requests ({money(dollars)}) was told. "
                "POST /v1/outcomes tells them; penstock eval compares two models on a set of your own.",
            )


def _no_prefix_hits(seen: Seen) -> Iterator[Finding]:
    for (feature, _, upstream, model, _, _), sums in _grouped(seen, (0, 2, 3)).items():
        answered = sums["requests"] - sums["failed"]
        if answered < _SOME or sums["input_tokens"] < answered * _LONG_PROMPT:
            continue
        if sums["cached_tokens"] >= _FEW_HITS * sums["input_tokens"]:
            continue
        about = f"feature {feature}" if feature is not None else f"model {model}"
        share = Fraction(sums["cached_tokens"], sums["input_tokens"])
        yield Finding(
            kind="no_prefix_hits",
            subject=about,
            dollars=sums["dollars"],
            text=f"{about[0].upper()}{about[1:]} sends {sums['input_tokens'] // answered:,} tokens of "
            f"prompt a request to {upstream}, and {percent(share)} of them come from the prefix cache. At "
            f"most {money(sums['dollars'])} is spent on prompts that are computed anew (answers are in it). "
            "The ledger holds no prompts; the usual cause is dynamic text (a date, a user's name, "
            "retrieved documents) that stands before the static instructions: put what never changes "
            "first, and what changes last. An engine may also have no prefix cache, or not say what it "
            "hits (vLLM: --enable-prefix-caching, --enable-prompt-tokens-details).",
        )


def _unbounded(seen: Seen) -> Iterator[Finding]:
    for (_, route, _, _, _, _), sums in _grouped(seen, (1,)).items():
        if not sums["uncapped"]:
            continue
        yield Finding(
            kind="unbounded",
            subject=f"route {route}",
            dollars=sums["uncapped_dollars"],
            text=f"{sums['uncapped']:,} of {_asked(sums):,} requests to {route} had no max_tokens, and the "
            f"route gives none: they cost {money(sums['uncapped_dollars'])}, and each may generate until the "
            f"context ends. Write routes.{route}.max_tokens with a ceiling and a default.",
        )


def _untagged(seen: Seen) -> Iterator[Finding]:
    for (key_id, name), sums in seen.untagged.items():
        if not key_id or not sums["requests"]:
            continue
        yield Finding(
            kind="untagged",
            subject=f"key {name or key_id}",
            dollars=sums["dollars"],
            text=f"Key {name or key_id} made {_asked(sums):,} requests without a feature: "
            f"{money(sums['dollars'])} of which nobody can say what they were for. Give the key a tag "
            "(penstock keys create --tag feature=NAME), or send x-penstock-feature.",
        )


def _unused_context(seen: Seen) -> Iterator[Finding]:
    for (_, _, upstream, model, pool, context), sums in _grouped(seen, (2, 3, 4, 5)).items():
        if not pool or context is None or context < _LARGE_CONTEXT or sums["requests"] < _SOME:
            continue
        longest = next((most for most in (2048, 8192, 32_768) if not sums[f"over_{most // 1024}k"]), None)
        if longest is None or 2 * longest >= context:
            continue
        yield Finding(
            kind="unused_context",
            subject=f"model {model}",
            dollars=None,
            text=f"Model {model} at {upstream} has a context of {context:,} tokens, and none of its "
            f"{sums['requests']:,} requests was longer than {longest:,}, answer included. A long context "
            "costs no dollars of its own, but memory that could hold other requests: set max_model_len to "
            f"{2 * longest:,}, or to what your longest prompts need.",
        )


def _many_features(seen: Seen) -> Iterator[Finding]:
    features = {group[0] for group in seen.features if group[0] is not None}
    requests = sum(sums["requests"] for sums in seen.features.values())
    if len(features) <= _MANY_FEATURES or 10 * len(features) < requests:
        return
    yield Finding(
        kind="many_features",
        subject="tag feature",
        dollars=None,
        text=f"The tag feature has {len(features):,} values in {requests:,} requests, as if each user had "
        "one. Reports by feature say little then, and take longer: use another tag for who it is.",
    )


def worst_difference(rate: float, n: int, other: float, m: int) -> float:
    """Lower end of the 95 % interval of rate - other, of n and m trials (Newcombe's score interval, method
    10 of Statistics in Medicine 17, 1998)."""
    low, _ = wilson(rate, n)
    _, high = wilson(other, m)
    return rate - other - math.hypot(rate - low, high - other)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959963984540054
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _asked(sums: Sums) -> int:
    """Requests as clients count them."""
    return sums["requests"] - sums["attempts"]


def _rate(sums: Sums) -> float:
    return sums["score"] / 1e9 / sums["told"]


def _grouped(seen: Seen, places: tuple[int, ...]) -> dict[tuple[Any, ...], dict[str, int]]:
    """By some of the places of a group; the others are empty."""
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for group, sums in seen.features.items():
        place = tuple(value if number in places else None for number, value in enumerate(group))
        old = found.get(place)
        found[place] = dict(sums) if old is None else {name: old[name] + sums[name] for name in old}
    return found


def _summed(some: Iterator[Sums]) -> dict[str, int]:
    found: dict[str, int] = {"requests": 0, "compared": 0, "comparator_dollars": 0}
    for sums in some:
        for name in found:
            found[name] += sums[name]
    return found


def _like_these(number: float, days: float) -> str:
    if days >= 1:
        return f"{pace(number, days)} like these"
    return f"{count(round(number))} requests like these in {span(days)}"


def verdicts(report: Report, days: float, *, whole: bool = True) -> Iterator[str]:
    """Whether self-hosting pays, as far as the ledger knows, a sentence each."""
    line: Line = report.total
    cost, cloud = line.compared_cost, line.comparator
    hosted = [use for use in report.pools if use.paid or use.charged]
    if not hosted:
        return
    if cost is None or cloud is None:
        yield (
            "Whether a cloud would be cheaper is not known: no route that was used names a comparator "
            "(routes.NAME.comparator), or nothing has a price."
        )
        return
    some = ""
    asked, hosted_requests = line.own["compared"], line.own["requests"] - line.own["attempts"]
    if not asked:
        yield (
            "Whether self-hosting pays is not known: on devices of our own only attempts in vain were made, "
            f"which cost {money(round(cost))} with their idle time. A cloud would have been asked once, as "
            "it was."
        )
        return
    if asked < hosted_requests:
        some = f" (of {asked:,} of {hosted_requests:,} requests, which have a comparator)"
    if report.unknown:
        pools = ", ".join(map(plain, report.unknown))
        yield (
            f"Whether self-hosting pays is not known: the cloud takes {money(cloud)} for what cost "
            f"{money(line.own['compared_dollars'])}{some} without all of its idle time, and the idle of "
            f"{pools} is missing (no price or no paid hours in this span)."
        )
        return
    if cost > cloud:
        yield (
            f"Self-hosting loses: it cost {money(round(cost))} with its idle time, and the cloud takes "
            f"{money(cloud)} for the same tokens{some}; that is {pace(asked, days)}."
        )
    else:
        yield (
            f"Self-hosting pays: it cost {money(round(cost))} with its idle time, and the cloud takes "
            f"{money(cloud)} for the same tokens{some}: {percent(1 - Fraction(cost) / cloud)} less."
        )
    even = line.break_even
    paid = sum(use.paid or 0 for use in report.pools)
    if even is None or not paid:
        return
    used = Fraction(sum(use.charged for use in report.pools if use.paid), paid)
    if even > 1:
        yield (
            f"It cannot pay at these prices: a device that is busy all the time costs {float(even):.3g} "
            "times what the cloud takes for its work. A faster engine, a smaller or quantised model, or a "
            "cheaper device would change that; more requests do not."
        )
    else:
        was = "it was" if whole else "that of its pools, by the requests of all who use them, was"
        yield (
            f"It breaks even at a utilization of {percent(even)}; {was} {percent(used)}."
            + (
                f" That is {_like_these(asked * float(even / used), days)}."
                if whole and 0 < used < even
                else ""
            )
        )
