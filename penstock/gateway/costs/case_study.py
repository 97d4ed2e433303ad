"""A published case study, reckoned again: what it claims, and what its own figures give.

It is that of a course module on vLLM: a startup that "was spending $180K/month", 50,000 requests a day with a
13B model on 8 A100-40GB, before and after it moved from one instance per GPU to two vLLM instances of four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

DAYS = 30
HOURS = 730


@dataclass(frozen=True, slots=True)
class Phase:
    """Before or after, as claimed. Dollars."""

    gpus: int = 8
    utilization: Fraction = Fraction(0)
    users: int = 0
    """At a time, at most."""
    latency: Fraction = Fraction(0)
    """Seconds, on average."""
    each: Fraction = Fraction(0)
    """Of an inference."""


@dataclass(frozen=True, slots=True)
class Study:
    """All claims."""

    requests: int = 50_000
    """A day, before and after."""
    spent: int = 180_000
    """A month, before."""
    saved: int = 155_000
    """A month."""
    quoted: tuple[int, int] = (50_000, 8_000)
    """A month before and after, "same traffic, same model", elsewhere in the same text."""
    times: int = 16
    """How many times more requests at a time."""
    hourly: Fraction = Fraction(450, 100)
    """Of an A100 and hour."""
    hourly_source: str = "another guide's, which has no date: --gpu-price takes yours"
    before: Phase = Phase(8, Fraction(15, 100), 8, Fraction(8), Fraction(4, 100))
    after: Phase = Phase(8, Fraction(85, 100), 256, Fraction(12, 10), Fraction(6, 1000))


@dataclass(frozen=True, slots=True)
class Check:
    """One claim."""

    claim: str
    arithmetic: str
    finding: str
    holds: bool


def checks(study: Study) -> Iterator[Check]:
    """Each claim against the others."""
    before, after = study.before, study.after
    month = study.requests * DAYS
    first, second = month * before.each, month * after.each
    yield Check(
        f"{_usd(study.spent)} a month at {_usd(before.each)} an inference",
        f"{study.requests:,}/day × {DAYS} × {_usd(before.each)} = {_usd(first)}; {_usd(study.spent)} / "
        f"{month:,} = {_usd(Fraction(study.spent, month))}",
        f"the bill is {float(study.spent / first):g} times what its own price per inference gives",
        study.spent == first,
    )
    left = study.spent - study.saved
    yield Check(
        f"{_usd(after.each)} an inference afterwards, {_usd(study.saved)} a month saved",
        f"{month:,} × {_usd(after.each)} = {_usd(second)}; {_usd(first)} - {_usd(second)} = "
        f"{_usd(first - second)}; {_usd(study.spent)} - {_usd(study.saved)} = {_usd(left)} = "
        f"{_usd(Fraction(left, month))} an inference",
        f"by its prices per inference it saves {_usd(first - second)}; by its savings an inference costs "
        f"{float(Fraction(left, month) / after.each):.2g} times what it says",
        first - second == study.saved,
    )
    gpu_hours = before.gpus * HOURS
    yield Check(
        f"{before.gpus} A100-40GB cost {_usd(study.spent)} a month",
        f"{before.gpus} × {HOURS} h = {gpu_hours:,} GPU-hours; {_usd(study.spent)} / {gpu_hours:,} = "
        f"{_usd(Fraction(study.spent, gpu_hours))} an hour; at {_usd(study.hourly)}: "
        f"{_usd(gpu_hours * study.hourly)}",
        f"a GPU-hour would have cost {float(Fraction(study.spent, gpu_hours) / study.hourly):.2g} times that "
        f"price ({study.hourly_source})",
        abs(Fraction(study.spent) / (gpu_hours * study.hourly) - 1) < Fraction(1, 10),
    )
    yield Check(
        f"{_usd(study.saved)} saved with the same GPUs: {before.gpus} before, {after.gpus} after (2 × 4)",
        f"{after.gpus} × {HOURS} h × any price = {before.gpus} × {HOURS} h × the same price",
        "the bill for GPUs does not change while none is given back: the saving is $0 until then",
        before.gpus != after.gpus,
    )
    rate = Fraction(study.requests, 86_400)
    work = [phase.gpus * phase.utilization / rate for phase in (before, after)]
    yield Check(
        f"utilization from {_share(before.utilization)} to {_share(after.utilization)} with the same traffic",
        f"{study.requests:,}/day = {float(rate):.3f}/s; {before.gpus} × {_share(before.utilization)} / "
        f"{float(rate):.3f} = {float(work[0]):.2f} GPU-seconds a request before, {float(work[1]):.2f} after",
        f"each request would take {float(work[1] / work[0]):.1f} times the GPU time: better batching lowers "
        "the utilization of the same GPUs by the same traffic, and does not raise it",
        work[1] <= work[0],
    )
    running = [rate * phase.latency for phase in (before, after)]
    yield Check(
        f"room for {after.users} users at a time is what this traffic needs",
        f"Little's law: {float(rate):.3f}/s × {float(before.latency):g} s = {float(running[0]):.1f} at a "
        f"time of {before.users} before, × {float(after.latency):g} s = {float(running[1]):.2f} of "
        f"{after.users} after",
        f"on average {float(running[1]):.1f} requests run after, {_share(running[1] / after.users)} of the "
        "room: the capacity is there, and this traffic does not use it",
        running[1] * 2 >= after.users,
    )
    more = Fraction(after.users, before.users)
    yield Check(
        f"{study.times}x more concurrent requests",
        f"{after.users} / {before.users} = {float(more):g}",
        f"its own figures say {float(more):g}x",
        more == study.times,
    )
    old, new = study.quoted
    yield Check(
        f"“from {_usd(old)} a month to {_usd(new)}” and “monthly savings {_usd(study.saved)}”",
        f"{_usd(old)} - {_usd(new)} = {_usd(old - new)}; {_usd(old)} is less than {_usd(study.saved)}",
        "two stories in one text: nobody saves more than he pays",
        old - new == study.saved,
    )


def consistent(study: Study) -> Iterator[str]:
    """What the figures that can be believed together (traffic, GPUs, utilization before) would give."""
    before, after = study.before, study.after
    busy = before.gpus * before.utilization
    needed = -(-busy // after.utilization)
    bill, less = (gpus * HOURS * study.hourly for gpus in (before.gpus, needed))
    month = study.requests * DAYS
    yield (
        f"{study.requests:,} requests a day kept {before.gpus} GPUs {_share(before.utilization)} busy: "
        f"{float(busy):g} GPUs' work. At {_share(after.utilization)} that is "
        f"{float(busy / after.utilization):.2f}"
        f" GPUs, so {needed}, if no request takes less GPU time than before."
    )
    yield (
        f"At {_usd(study.hourly)} a GPU-hour: {_usd(bill)} a month before, {_usd(less)} after "
        f"({_usd(Fraction(less) / month)} an inference), {_usd(bill - less)} saved "
        f"({_share((bill - less) / bill)}), once {before.gpus - needed} GPUs are given back."
    )


def _usd(amount: Fraction | int) -> str:
    value = float(amount)
    if value >= 1000:
        return f"${value:,.0f}"
    return f"${value:.2f}" if value >= 1 or round(value, 2) == value else f"${value:.4f}".rstrip("0")


def _share(part: Fraction) -> str:
    value = float(100 * part)
    return f"{value:.2g} %" if value < 1 else f"{value:.0f} %"
