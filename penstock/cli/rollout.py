"""`penstock rollout`: a route's requests move to another of its targets, step by step, or not at all."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli.values import duration
from penstock.core.errors import InvalidRequest, StartupError
from penstock.spec import load
from penstock.spec.model import Slo, Spec

if TYPE_CHECKING:
    from penstock.operate.rollout.admin import AdminApi
    from penstock.operate.rollout.state import Rollout, StateFile

_STEPS = "1,5,25,50,100"
ABORTED = 1
"""Exit status of a rollout that was given up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add start, status, promote and abort."""
    commands = parser.add_subparsers(dest="rollout_command", metavar="COMMAND", required=True)
    start = commands.add_parser("start", help="begin, or go on, and watch until it is promoted or aborted")
    status = commands.add_parser("status", help="how far it is, and what has happened")
    promote = commands.add_parser("promote", help="all requests to the candidate, at once")
    abort = commands.add_parser("abort", help="weights as they were before the start, at once")
    for command in (start, status, promote, abort):
        command.add_argument("route", help="a route of the spec with two targets or more")
        command.add_argument("--spec", type=Path, default=Path("penstock.yaml"), metavar="FILE")
        command.add_argument(
            "--state",
            type=Path,
            metavar="FILE",
            help="where it is written how far it is (default: .penstock/rollout-ROUTE.json beside the spec)",
        )
    for command in (start, promote, abort):
        command.add_argument(
            "--url", help="the gateway's admin API, as http://HOST:PORT (default: the address in the spec)"
        )
        command.add_argument(
            "--admin-key-env",
            metavar="NAME",
            help="environment variable with the admin key (default: gateway.admin.key_env of the spec)",
        )
    abort.add_argument("--reason", default="by hand", help="for the record")
    status.add_argument("--json", action="store_true", help="print JSON")
    _add_how(start)


def _add_how(start: argparse.ArgumentParser) -> None:
    start.add_argument("--to", metavar="TARGET", help="the candidate: MODEL, or MODEL@UPSTREAM")
    start.add_argument(
        "--steps", default=_STEPS, metavar="PERCENT,…", help=f"its shares, in this order (default: {_STEPS})"
    )
    start.add_argument("--hold", default="5m", metavar="TIME", help="how long each step lasts (default: 5m)")
    start.add_argument(
        "--min-requests",
        type=int,
        default=100,
        metavar="N",
        help="requests that the candidate must have had in a step (default: 100)",
    )
    start.add_argument(
        "--max-error-rate",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of its attempts that may go wrong beyond that of the others (default: 0.01)",
    )
    start.add_argument(
        "--max-latency-ratio",
        type=float,
        default=1.25,
        metavar="N",
        help="how many times the others' P95 its own may be; 0 does not compare (default: 1.25)",
    )
    start.add_argument(
        "--ttft-p95", metavar="TIME", help="that its first bytes must keep (default: slo of the model)"
    )
    start.add_argument(
        "--e2e-p95", metavar="TIME", help="that its answers must keep (default: slo of the model)"
    )
    start.add_argument(
        "--verdict",
        type=Path,
        metavar="FILE",
        help="what `penstock eval --output-json FILE` has found; wanted of a quantised or smaller model",
    )
    start.add_argument("--verdict-of", metavar="NAME", help="which candidate of that report it is")
    start.add_argument("--no-verdict", metavar="REASON", help="go without; the reason stands in the record")
    start.add_argument("--poll", default="5s", metavar="TIME", help="between two looks (default: 5s)")


def run(args: argparse.Namespace) -> int:
    """0: promoted, or done. 1: aborted by what was seen. 2: refused."""
    from penstock.operate.rollout import run as rollouts
    from penstock.operate.rollout.state import StateFile

    spec = load(args.spec)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", args.route)
    file = StateFile(args.state or args.spec.parent / ".penstock" / f"rollout-{name}.json")
    if args.rollout_command == "status":
        _show(rollouts.existing(file), as_json=args.json)
        return 0
    api = _api(spec, args)
    if args.rollout_command == "start":
        return _start(spec, args, file, api)
    if args.rollout_command == "promote":
        rollout = rollouts.promote(file, api, time.time())
        print(f"All of {rollout.route} goes to {rollout.candidate}.", file=sys.stderr)
        print(_last(rollout), file=sys.stderr)
        return 0
    rollout = rollouts.abort_by_hand(file, api, time.time(), args.reason)
    shown = ", ".join(f"{name} {weight:g}" for name, weight in rollout.before.items())
    print(f"{rollout.route} is shared out as before: {shown}.", file=sys.stderr)
    return 0


def _start(spec: Spec, args: argparse.Namespace, file: StateFile, api: AdminApi) -> int:
    from penstock.operate.rollout.run import Runner

    poll = duration(args.poll, "--poll")
    with file.alone("run", wait=False):
        with file.alone():
            rollout = file.read()
            if rollout is not None and rollout.phase == "running":
                if args.to is not None and args.to != rollout.candidate:
                    raise StartupError(
                        f"{rollout.candidate} is being rolled out, and has {100 * rollout.share:g} %.",
                        advice="End it first: `penstock rollout promote` or `penstock rollout abort`.",
                    )
                print(f"going on at {100 * rollout.share:g} %", file=sys.stderr)
            else:
                rollout = _new(spec, args, api)
                file.write(rollout)
        try:
            phase = Runner(file, api, _say, poll=poll).run()
        except KeyboardInterrupt:
            _say(
                "Interrupted: weights stay as they are. `penstock rollout start` goes on, "
                "`penstock rollout abort` goes back."
            )
            raise
    rollout = file.read()
    if phase == "promoted" and rollout is not None:
        _say(_last(rollout))
    return 0 if phase == "promoted" else ABORTED


def _new(spec: Spec, args: argparse.Namespace, api: AdminApi) -> Rollout:
    """A rollout that has not begun. Raises StartupError, InvalidRequest."""
    from penstock.gateway.policy.weights import own
    from penstock.operate.rollout import verdict
    from penstock.operate.rollout.judge import Limits
    from penstock.operate.rollout.state import Rollout

    route = spec.routes.get(args.route)
    if route is None:
        raise StartupError(
            f"The spec has no route {args.route!r}.", advice=f"It has {', '.join(spec.routes) or 'none'}."
        )
    targets = {each.name: target for each, target in zip(own(route), route.targets, strict=True)}
    names = ", ".join(targets)
    if len(targets) < 2:
        raise StartupError(
            f"{args.route} has one target, {names}.",
            advice="Add the candidate under targets, with `weight: 0`, and start the gateway with that spec.",
        )
    if args.to not in targets:
        what = "Say with --to which target is the candidate" if args.to is None else f"{args.to!r} is none"
        raise StartupError(f"{what}: the targets of {args.route} are {names}.")
    others = [target for name, target in targets.items() if name != args.to]
    slo = (None if targets[args.to].upstream else spec.models[targets[args.to].model].slo) or Slo()
    limits = Limits(
        error_rate=args.max_error_rate,
        latency_ratio=args.max_latency_ratio,
        ttft_p95=duration(args.ttft_p95, "--ttft-p95") if args.ttft_p95 else slo.ttft_p95,
        e2e_p95=duration(args.e2e_p95, "--e2e-p95") if args.e2e_p95 else slo.e2e_p95,
        min_requests=args.min_requests,
        hold=duration(args.hold, "--hold"),
    )
    for flag, value, least in (
        ("--min-requests", limits.min_requests, 1),
        ("--max-error-rate", limits.error_rate, 0),
        ("--max-latency-ratio", limits.latency_ratio, 0),
    ):
        if not value >= least:
            raise InvalidRequest(f"{flag} is {value:g}; it must be {least} or more.", param=flag)
    steps = _steps(args.steps)
    why = verdict.wanted(spec, targets[args.to], others, _facts)
    if args.verdict is not None:
        said = verdict.passed(args.verdict, args.verdict_of)
    elif args.no_verdict:
        said = f"none: {args.no_verdict}"
    elif why is not None:
        raise StartupError(
            f"An evaluation is wanted first: {why}.",
            param="--verdict",
            advice="Run penstock eval --set FILE --baseline OLD --candidate NEW --output-json result.json, "
            "and say --verdict result.json; or --no-verdict REASON.",
        )
    else:
        said = "none was wanted: as many parameters, and as many bits for each"
    before = api.weights(args.route)
    if set(before) != set(targets):
        raise StartupError(
            f"The gateway at {api.url} runs with another spec: its targets of {args.route} are "
            f"{', '.join(before)}, and those of {args.spec} are {names}.",
            advice="Start it with this spec, or name the one that it runs with: --spec FILE.",
        )
    return Rollout(
        route=args.route,
        candidate=args.to,
        url=api.url,
        steps=steps,
        limits=asdict(limits),
        before=before,
        verdict=said,
    )


def _api(spec: Spec, args: argparse.Namespace) -> AdminApi:
    from penstock.operate.rollout.admin import AdminApi

    admin = spec.gateway.admin
    variable = args.admin_key_env or (None if admin is None else admin.key_env)
    if variable is None:
        raise StartupError(
            "The spec's gateway has no admin API, over which weights are set.",
            advice="Add `admin: {key_env: PENSTOCK_ADMIN_KEY}` under gateway, and start it again.",
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise StartupError(f"The environment variable {variable}, with the admin key, is not set.")
    if args.url is not None:
        return AdminApi(args.url, key)
    own = admin is not None and admin.port is not None
    host, port = (admin.host, admin.port) if own and admin else (spec.gateway.host, spec.gateway.port)
    if not port:
        raise StartupError("The spec's gateway takes a free port.", advice="Say --url http://HOST:PORT.")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if spec.gateway.ssl_certfile else "http"
    return AdminApi(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", key)


def _facts(weights: str) -> Any:
    from penstock.fleet.asked import facts_of

    return facts_of(weights)


def _steps(text: str) -> list[float]:
    try:
        steps = [float(each.strip().removesuffix("%")) / 100 for each in text.split(",")]
    except ValueError:
        steps = []
    if not steps or steps != sorted(set(steps)) or steps[0] <= 0 or steps[-1] != 1:
        raise InvalidRequest(
            f"--steps is {text!r}.", param="--steps", advice=f"Write rising percentages up to 100: {_STEPS}."
        )
    return steps


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


def _last(rollout: Rollout) -> str:
    model, _, upstream = rollout.candidate.partition("@")
    target = f"{{model: {model}, upstream: {upstream}}}" if upstream else f"{{model: {model}}}"
    return (
        "To make it last, write it into the spec, whose weights count from the gateway's next start:\n"
        f"  routes: {{{rollout.route}: {{targets: [{target}]}}}}"
    )


def _show(rollout: Rollout, *, as_json: bool) -> None:
    from penstock.operate.rollout.run import as_json as convert

    if as_json:
        print(json.dumps(convert(rollout), indent=1))
        return
    print(f"{rollout.route} → {rollout.candidate}: {rollout.phase} at {100 * rollout.share:g} %")
    print(f"  evaluation: {rollout.verdict}")
    shown = ", ".join(f"{name} {weight:g}" for name, weight in rollout.before.items())
    print(f"  weights before: {shown}")
    for each in rollout.events:
        when = datetime.fromtimestamp(each.at, UTC)
        print(f"  {when:%Y-%m-%d %H:%M:%S} UTC  {100 * each.share:g} %  {each.what}")
