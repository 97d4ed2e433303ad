"""`penstock costs estimate`: self-hosting against a cloud's price, before anything runs."""

from __future__ import annotations

import argparse
import datetime
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import InvalidRequest
from penstock.spec import load
from penstock.spec.units import nanodollars

if TYPE_CHECKING:
    from penstock.gateway.costs.estimate import Case, Cloud, Dated, Hosted

_MOST_TOKENS = 1_000_000_000
_NONE = "A price without a date and a source is none."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the load, the two prices, and the case study."""
    load_ = parser.add_argument_group("the load")
    load_.add_argument("--input-tokens", type=int, metavar="N", help="of an average request")
    load_.add_argument("--output-tokens", type=int, metavar="N", help="of its answer")
    load_.add_argument(
        "--requests-per-second", action="append", default=[], metavar="X", help="also this one"
    )
    load_.add_argument("--requests-per-day", action="append", default=[], metavar="N", help="this, too")
    own = parser.add_argument_group("self-hosted: a replica")
    own.add_argument(
        "--tokens-per-second",
        metavar="X",
        help="prompt and answer together, of a replica that is busy all the time, within your latency: "
        "a measurement, as by penstock bench",
    )
    own.add_argument("--devices", type=int, default=1, metavar="N", help="of a replica (default: 1)")
    own.add_argument(
        "--most-utilization", default="0.85", metavar="SHARE", help="to plan a replica for (default: 0.85)"
    )
    own.add_argument("--gpu-price", metavar="DOLLARS", help="of a device and hour")
    own.add_argument("--gpu-as-of", metavar="DATE", help="when that was looked up")
    own.add_argument("--gpu-source", metavar="TEXT", help="where")
    own.add_argument("--pool", metavar="NAME", help="all three from this pool of --spec")
    cloud = parser.add_argument_group("the cloud")
    cloud.add_argument("--cloud-input", metavar="DOLLARS", help="for a million input tokens")
    cloud.add_argument("--cloud-output", metavar="DOLLARS", help="for a million output tokens")
    cloud.add_argument("--cloud-batch", metavar="SHARE", help="what batches pay of these, as 0.5")
    cloud.add_argument("--cloud-as-of", metavar="DATE", help="when these were looked up")
    cloud.add_argument("--cloud-source", metavar="TEXT", help="where")
    cloud.add_argument("--cloud", metavar="UPSTREAM/MODEL", help="all of them from this model of --spec")
    parser.add_argument(
        "--spec",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="prices (penstock.yaml)",
    )
    parser.add_argument(
        "--case-study", action="store_true", help="a published case study, with its arithmetic and its errors"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Reckon and print."""
    if args.case_study:
        return _case_study(args)
    from penstock.gateway.costs import estimate

    for name in ("input_tokens", "output_tokens", "tokens_per_second"):
        if getattr(args, name) is None:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"{flag} is missing.", param=flag, advice=_ADVICE[name])
    if args.input_tokens < 0 or args.output_tokens < 0 or args.input_tokens + args.output_tokens < 1:
        raise InvalidRequest("A request has one token at least.", param="--input-tokens")
    if max(args.input_tokens, args.output_tokens) > _MOST_TOKENS:
        raise InvalidRequest(f"A request has at most {_MOST_TOKENS:,} tokens here.", param="--input-tokens")
    request = estimate.Request(args.input_tokens, args.output_tokens)
    most = _number(args.most_utilization, "--most-utilization")
    if most > 1:
        raise InvalidRequest(f"--most-utilization {args.most_utilization} is over 1.")
    own = [_number(each, "--requests-per-second") for each in args.requests_per_second]
    own += [_number(each, "--requests-per-day") / 86_400 for each in args.requests_per_day]
    hosted, cloud = _hosted(args), _cloud(args)
    if cloud is not None and not request.cost(cloud):
        raise InvalidRequest(
            "The cloud takes nothing for such a request: there is nothing to compare with.",
            param="--cloud-input",
        )
    cases = list(estimate.rates(hosted, cloud, request, most, own))
    shares = [estimate.at_utilization(hosted, cloud, request, share) for share in estimate.SHARES]
    even = None if cloud is None else estimate.break_even(hosted, cloud, request)
    if args.json:
        print(json.dumps(_whole(hosted, cloud, cases, shares, even), indent=2, default=float))
        return 0
    _print(request, hosted, cloud, cases, shares, even, most, set(own))
    return 0


_ADVICE = {
    "input_tokens": "Tokens of an average prompt; penstock costs has them of a ledger.",
    "output_tokens": "Tokens of an average answer; penstock costs has them of a ledger.",
    "tokens_per_second": "Measure it with penstock bench, or take a published figure for your GPU and model.",
}


def _hosted(args: argparse.Namespace) -> Hosted:
    from penstock.gateway.costs.estimate import Dated, Hosted

    throughput = _number(args.tokens_per_second, "--tokens-per-second")
    if args.devices < 1:
        raise InvalidRequest(f"--devices {args.devices}: a replica has one at least.")
    if args.pool is not None:
        _alone(args, "--pool", ("gpu_price", "gpu_as_of", "gpu_source"))
        spec = load(_spec(args))
        pool = spec.pools.get(args.pool)
        if pool is None:
            raise InvalidRequest(
                f"There is no pool {args.pool} in {_spec(args)}.", param="--pool", advice=_choices(spec.pools)
            )
        if pool.price_per_hour is None or pool.price_as_of is None or pool.price_source is None:
            raise InvalidRequest(
                f"pools.{args.pool} has no dated price. {_NONE}",
                param="--pool",
                advice="Write price_per_hour, price_as_of and price_source there.",
            )
        price, dated = pool.price_per_hour, Dated(pool.price_as_of, pool.price_source)
    elif args.gpu_price is None:
        raise InvalidRequest("--gpu-price is missing.", param="--gpu-price", advice="Or --spec and --pool.")
    else:
        price, dated = _dollars(args.gpu_price, "--gpu-price"), _dated(args, "gpu")
    return Hosted(price, dated, throughput, args.devices)


def _cloud(args: argparse.Namespace) -> Cloud | None:
    from penstock.gateway.costs.estimate import Cloud, Dated

    if args.cloud is not None:
        _alone(args, "--cloud", ("cloud_input", "cloud_output", "cloud_as_of", "cloud_source", "cloud_batch"))
        spec = load(_spec(args))
        upstream, _, name = args.cloud.partition("/")
        found = spec.upstreams.get(upstream)
        model = None if found is None else found.models.get(name)
        if model is None:
            names = [f"{up}/{each}" for up, served in spec.upstreams.items() for each in served.models]
            raise InvalidRequest(
                f"There is no {args.cloud} in {_spec(args)}.", param="--cloud", advice=_choices(names)
            )
        if model.price is None:
            raise InvalidRequest(f"upstreams.{upstream}.models.{name} has no price.", param="--cloud")
        price = model.price
        taken, given = (round(Fraction(each * 1_000_000, price.per)) for each in (price.input, price.output))
        batch = None if price.batch is None else Fraction(str(price.batch))
        return Cloud(taken, given, Dated(price.as_of, price.source), batch)
    if args.cloud_input is None and args.cloud_output is None:
        return None
    if args.cloud_input is None or args.cloud_output is None:
        name = "--cloud-input" if args.cloud_input is None else "--cloud-output"
        raise InvalidRequest(f"{name} is missing: clouds have two prices.", param=name)
    batch = None if args.cloud_batch is None else _number(args.cloud_batch, "--cloud-batch")
    return Cloud(
        _dollars(args.cloud_input, "--cloud-input"),
        _dollars(args.cloud_output, "--cloud-output"),
        _dated(args, "cloud"),
        batch,
    )


def _dated(args: argparse.Namespace, kind: str) -> Dated:
    from penstock.gateway.costs.estimate import Dated

    as_of, source = getattr(args, f"{kind}_as_of"), getattr(args, f"{kind}_source")
    for flag, value in ((f"--{kind}-as-of", as_of), (f"--{kind}-source", source)):
        if not value:
            raise InvalidRequest(f"{flag} is missing. {_NONE}", param=flag)
    try:
        return Dated(datetime.date.fromisoformat(as_of), source)
    except ValueError:
        raise InvalidRequest(f"--{kind}-as-of {as_of} is no date.", advice="Write 2026-11-21.") from None


def _spec(args: argparse.Namespace) -> Path:
    return getattr(args, "spec", None) or Path("penstock.yaml")


def _alone(args: argparse.Namespace, flag: str, others: tuple[str, ...]) -> None:
    for name in others:
        if getattr(args, name) is not None:
            raise InvalidRequest(f"{flag} and --{name.replace('_', '-')} are two prices.", param=flag)


def _choices(names: Any) -> str:
    return f"There are {', '.join(sorted(names))}." if names else "There is none."


def _number(text: str, flag: str) -> Fraction:
    try:
        number = Decimal(text)
        # digits first: 1e999999999 is short, and has a billion of them
        if number.is_finite() and abs(number.adjusted()) <= 12 and 0 < number < 10**12 and len(text) <= 40:
            return Fraction(number)
    except ArithmeticError:
        pass
    raise InvalidRequest(f"{flag} {text} is no number over 0.", param=flag)


def _dollars(text: str, flag: str) -> int:
    try:
        amount = nanodollars(text)
    except ValueError as error:
        raise InvalidRequest(f"{flag}: {error}.", param=flag) from None
    if amount <= 0:
        raise InvalidRequest(f"{flag} {text}: a price is more than nothing.", param=flag)
    return amount


def _print(
    request: Any,
    hosted: Hosted,
    cloud: Cloud | None,
    cases: list[Case],
    shares: list[Case],
    even: Fraction | None,
    most: Fraction,
    own: set[Fraction],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from penstock.gateway.costs.estimate import HOURS, verdict
    from penstock.gateway.costs.words import count, money, percent

    console = Console(highlight=False, markup=False)
    console.width = 140
    million = 1_000_000
    each = f"{request.input:,} tokens in, {request.output:,} out"
    print(f"A request: {each}. A month: {float(HOURS):g} hours.")
    print(
        f"Self-hosted: {hosted.devices} × {money(hosted.price)} an hour ({hosted.dated}); "
        f"{count(float(hosted.throughput))} tokens/s when busy: "
        f"{money(round(hosted.token * million))} for a million tokens at 100 % utilization."
    )
    if cloud is not None:
        blended = request.cost(cloud) / request.tokens
        print(
            f"Cloud: {money(cloud.input)} for a million in, {money(cloud.output)} out ({cloud.dated}): "
            f"{money(round(blended * million))} for a million of these."
        )
    else:
        print("Cloud: no price was given (--cloud-input, --cloud-output, with date and source).")
    table = Table("requests", "tokens a day", "replicas", "utilization", "self-hosted", "cloud", "saving", "",
                  box=None, pad_edge=False, title="By requests", title_justify="left")  # fmt: skip
    for case in cases:
        daily = case.rate * 86_400
        name = f"{count(float(case.rate))}/s" if case.rate >= 1 else f"{count(float(daily))}/day"
        saving = case.saving
        table.add_row(
            f"{name} *" if case.rate in own else name,
            count(round(daily * request.tokens)),
            str(case.replicas),
            percent(case.utilization),
            f"{money(round(case.hosted))}/month",
            "-" if case.cloud is None else f"{money(round(case.cloud))}/month",
            _saving(case),
            verdict(saving),
        )
    print()
    console.print(table)
    table = Table("utilization", "requests", "$ for a million tokens", "cloud", "saving", "",
                  box=None, pad_edge=False, title="By utilization", title_justify="left")  # fmt: skip
    for case in shares:
        monthly = case.rate * 3600 * HOURS * request.tokens
        table.add_row(
            percent(case.utilization),
            f"{count(float(case.rate * 86_400))}/day",
            money(round(case.hosted / monthly * million)),
            "-" if case.cloud is None else money(round(case.cloud / monthly * million)),
            _saving(case),
            verdict(case.saving),
        )
    print()
    console.print(table)
    if even is None or cloud is None:
        return
    print()
    rate = even * hosted.throughput / request.tokens * 86_400
    if even > most:
        print(
            f"Break-even is at a utilization of {percent(even)}, and a replica is planned for "
            f"{percent(most)}: "
            "self-hosting does not pay at these prices, however many requests there are."
        )
    else:
        print(
            f"Break-even: a utilization of {percent(even)}, {count(float(rate))} requests a day on one "
            "replica."
        )
    if cloud.batch is not None:
        batch = even / cloud.batch
        print(
            f"Against the cloud's batches ({percent(cloud.batch)} of the price): {percent(batch)}"
            + (", which no replica reaches." if batch > 1 else ".")
        )


def _saving(case: Case) -> str:
    from penstock.gateway.costs.words import count, percent

    if case.saving is None or case.cloud is None:
        return "-"
    return (
        percent(case.saving) if case.saving > -1 else f"{count(float(case.hosted / case.cloud))} × the bill"
    )


def _whole(
    hosted: Hosted, cloud: Cloud | None, cases: list[Case], shares: list[Case], even: Fraction | None
) -> dict[str, Any]:
    from penstock.gateway.costs.estimate import verdict

    def told(case: Case) -> dict[str, Any]:
        return {
            "requests_per_second": case.rate,
            "replicas": case.replicas,
            "utilization": case.utilization,
            "self_hosted_dollars_per_month": case.hosted / 10**9,
            "cloud_dollars_per_month": None if case.cloud is None else case.cloud / 10**9,
            "saving": case.saving,
            "verdict": verdict(case.saving),
        }

    return {
        "self_hosted_price": {"dollars_per_hour": hosted.price / 1e9, "source": str(hosted.dated)},
        "cloud_price": None
        if cloud is None
        else {
            "input_dollars": cloud.input / 1e9,
            "output_dollars": cloud.output / 1e9,
            "source": str(cloud.dated),
        },
        "by_requests": [told(case) for case in cases],
        "by_utilization": [told(case) for case in shares],
        "break_even_utilization": even,
    }


def _case_study(args: argparse.Namespace) -> int:
    from penstock.gateway.costs.case_study import Study, checks, consistent

    study = Study()
    if args.gpu_price is not None:
        hourly = Fraction(_dollars(args.gpu_price, "--gpu-price"), 10**9)
        study = Study(hourly=hourly, hourly_source=str(_dated(args, "gpu")))
    found = list(checks(study))
    if args.json:
        whole = [
            {"claim": each.claim, "arithmetic": each.arithmetic, "finding": each.finding, "holds": each.holds}
            for each in found
        ]
        print(
            json.dumps({"checks": whole, "consistent": list(consistent(study))}, indent=2, ensure_ascii=False)
        )
        return 0
    print("A 13B model, 50,000 requests a day, 8 A100-40GB: “$180K/month”, then “monthly savings: $155K”.\n")
    for number, each in enumerate(found, 1):
        mark = "holds" if each.holds else "does not hold"
        print(f"{number}. {each.claim}: {mark}.\n   {each.arithmetic}\n   {each.finding}.\n")
    print("What can be believed together:")
    for line in consistent(study):
        print(f"- {line}")
    return 0
