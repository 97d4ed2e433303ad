"""`penstock tune --live URL`: load a running engine, and find the flags that serve most within the targets.

URL of `penstock up` ─▶ its control socket ─▶ one replica, restarted with other flags, then with its own again
any other URL        ─▶ measured with more and fewer clients; nothing is changed
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.bench.errors import BenchError
from penstock.cli.values import duration
from penstock.core.errors import InvalidRequest

from .bench import _count, _headers, _natural, _positive

if TYPE_CHECKING:
    from penstock.bench.load import Stop
    from penstock.tune.engines import Fixed, Managed
    from penstock.tune.load import Load
    from penstock.tune.loop import Result, Verdict
    from penstock.tune.search import Search
    from penstock.tune.slo import Slo

_DOCUMENTS_TARGET = 500.0
"""Milliseconds at P95, where guides say `hey -z 60s -c 20` and mean the whole answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--live", metavar="URL", required=True, help="a running engine, or the gateway of `penstock up`"
    )
    parser.add_argument("--model", help="name of the model (default: the first that the server lists)")
    parser.add_argument(
        "--replica", type=_natural, default=0, metavar="N", help="of the model, under `up` (%(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="bearer key (default: OPENAI_API_KEY)")
    parser.add_argument(
        "--header", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="extra headers"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the engine with the flags found, until `penstock up` ends"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and progress on standard error")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write JSON to FILE")

    targets = parser.add_argument_group(
        "targets, of 95 in 100 requests (default: the model's slo in penstock.yaml)"
    )
    targets.add_argument("--ttft-p95", metavar="TIME", help="to the first token, as 500ms")
    targets.add_argument("--tpot-p95", metavar="TIME", help="for each token after it, as 50ms")
    targets.add_argument("--e2e-p95", metavar="TIME", help="of the whole answer, as 2s (stepwise: 500ms)")

    search = parser.add_argument_group("search")
    search.add_argument(
        "--method",
        choices=["bisect", "stepwise"],
        default="bisect",
        help="bisect finds the most goodput; stepwise lowers while P95 is over the target (%(default)s)",
    )
    search.add_argument(
        "--flag",
        choices=["max-num-seqs", "max-num-batched-tokens"],
        default="max-num-seqs",
        help="which one to search (%(default)s); the other stays",
    )
    search.add_argument("--step", type=_count, default=32, metavar="N", help="of stepwise (%(default)s)")
    search.add_argument(
        "--max-settings", type=_count, default=10, metavar="N", help="to try at most (%(default)s)"
    )
    search.add_argument(
        "--repeats",
        type=_count,
        metavar="N",
        help="runs of a setting at most; fewer if they agree (3; stepwise: 1)",
    )

    load = parser.add_argument_group("load")
    load.add_argument(
        "--clients", type=_count, default=20, metavar="N", help="requests at a time (%(default)s)"
    )
    load.add_argument(
        "--request-rate", type=_positive, metavar="R", help="arrivals per second instead of clients"
    )
    load.add_argument("--duration", default="60s", metavar="TIME", help="of a run (%(default)s)")
    load.add_argument(
        "--backend", choices=["openai", "openai-chat"], default="openai", help="API (%(default)s)"
    )
    load.add_argument(
        "--dataset-path", type=Path, metavar="FILE", help='JSON lines with "prompt" or "messages"'
    )
    load.add_argument(
        "--input-len", type=_count, default=256, metavar="N", help="tokens of a prompt (%(default)s)"
    )
    load.add_argument(
        "--output-len", type=_count, default=64, metavar="N", help="tokens of an answer (%(default)s)"
    )
    load.add_argument(
        "--range-ratio", type=float, default=0.0, metavar="R", help="lengths vary by ±R (%(default)s)"
    )
    load.add_argument(
        "--prefix-len", type=_natural, default=0, metavar="N", help="tokens that all share (%(default)s)"
    )
    load.add_argument(
        "--vocab-size", type=_count, default=1000, metavar="N", help="random ids below N (%(default)s)"
    )
    load.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """0 if the best setting keeps the targets, 1 if none does, 130 after Ctrl-C."""
    try:
        return asyncio.run(_run(args))
    except BenchError as error:
        print(f"penstock tune: {error}", file=sys.stderr)
        return 1


async def _run(args: argparse.Namespace) -> int:
    from penstock.bench.client import open_session, split_base_url
    from penstock.bench.load import Stop
    from penstock.tune.engines import Managed
    from penstock.tune.load import Loader

    url, headers, slo, load = split_base_url(args.live), _headers(args), _slo(args), _load(args)
    stop = Stop()
    tell = _teller(args)
    async with open_session() as session:
        engine = await _engine(args, url, headers, session)
        try:
            if args.flag != "max-num-seqs" and not (isinstance(engine, Managed) and args.method == "bisect"):
                raise BenchError(
                    f"--flag {args.flag} needs --method bisect and an engine that can be restarted"
                )
            slo = slo.or_else(engine.slo) if slo.bounds or args.method == "bisect" else slo
            if not slo.bounds and args.method == "stepwise":
                slo = slo.or_else({"e2el": _DOCUMENTS_TARGET})
            if not slo.bounds:
                raise BenchError(
                    "there is no target to tune for; give --ttft-p95, --tpot-p95 or --e2e-p95, or an slo for "
                    "the model in penstock.yaml"
                )
            loader = Loader(session, load, slo, stop)
            with _interruptible(stop):
                if isinstance(engine, Managed):
                    return await _managed(args, engine, loader, slo, load, stop, tell)
                return await _fixed(args, engine, loader, slo, load, tell)
        finally:
            if isinstance(engine, Managed):
                engine.close()


async def _engine(
    args: argparse.Namespace, url: str, headers: Mapping[str, str], session: Any
) -> Managed | Fixed:
    """The replica behind a gateway of `penstock up` on this machine; else the URL as it is."""
    from penstock.bench.client import find_model
    from penstock.tune.engines import Fixed, Managed, control_of, limits
    from penstock.tune.load import scrape

    path = control_of(url)
    if path is not None:
        model = args.model or await find_model(session, url, headers)
        try:
            engine = await Managed.take(path, model, args.replica)
        except OSError:  # it has crashed and left its socket
            pass
        else:
            args.model = model
            return engine
    if args.method == "stepwise":
        raise BenchError(
            f"--method stepwise restarts the engine, and the one at {url} is not run by a penstock up of "
            "this user on this machine; leave the flag out to measure it as it is"
        )
    return Fixed(url, headers, limits(await scrape(session, url, headers)))


async def _managed(
    args: argparse.Namespace,
    engine: Managed,
    loader: Any,
    slo: Slo,
    load: Load,
    stop: Stop,
    tell: Any,
) -> int:
    from penstock.tune.diagnosis import Pressure
    from penstock.tune.loop import decide, tune

    flag, seqs = args.flag, args.flag == "max-num-seqs"
    before = engine.known.seqs if seqs else engine.known.tokens
    if before is None:
        raise BenchError(f"{args.model}'s --{flag} is not known; write it into its flags in penstock.yaml")
    search = _search(args, engine, before)
    tell(f"{args.model}/{args.replica} at {engine.url}, restarted by penstock up. Targets: {slo}.")
    tell(f"{_described(load)}\n--{flag}")

    async def start(value: int) -> float | None:
        took: list[float | None] = []

        async def restart() -> None:
            took.append(await engine.start({} if value == before else {flag: value}))

        await stop.bound(restart())
        return took[0] if took else None

    async def measure(value: int) -> Any:
        return await loader.run(engine.url, engine.headers)

    repeats = args.repeats or (1 if args.method == "stepwise" else 3)
    result = await tune(
        search,
        start,
        measure,
        slo,
        repeats=repeats,
        tell=tell,
        # how many tokens a step has is no matter of places: only goodput tells
        translate=(lambda pressure: pressure) if seqs else (lambda _: Pressure.UNKNOWN),
        restarts=seqs,
    )
    if args.method == "stepwise":
        verdict = _stepwise(result, search.best, before)
    else:
        verdict = decide(result, slo, start=before, flag=flag)
    kept = args.keep and not result.interrupted and verdict.changed and verdict.value is not None
    if not result.interrupted:
        wanted = {flag: verdict.value} if kept and verdict.value is not None else {}
        await engine.start(wanted)
        if kept:
            await engine.keep()
    flags = {flag: verdict.value} if verdict.changed and verdict.value is not None else {}
    if kept:
        state = f"The engine goes on with --{flag} {verdict.value} until penstock up ends."
    elif result.interrupted:
        state = "Where it runs with other flags, penstock up starts it again with the spec's."
    else:
        state = f"The engine runs with the spec's flags again (--{flag} {before})."
    head = {"method": args.method, "restarts": True, "flag": flag, "before": before, "kept": kept}
    _report(args, result, verdict, head, flags, slo, load, state)
    return 130 if result.interrupted else 0 if verdict.met else 1


def _search(args: argparse.Namespace, engine: Managed, before: int) -> Search:
    """Over settings that the engine starts with: a step has a token for every request."""
    from penstock.tune.search import Bisection, Stepwise

    seqs, tokens = engine.known.seqs or 1, engine.known.tokens
    if args.flag == "max-num-batched-tokens":
        return Bisection(before, low=max(seqs, before // 8), high=8 * before, most=args.max_settings)
    if args.method == "stepwise":
        return Stepwise(before, step=args.step)
    high = max(before, args.clients if args.request_rate is None else 4 * before)
    return Bisection(before, low=1, high=min(high, tokens or high), most=args.max_settings)


def _stepwise(result: Result, best: int | None, before: int) -> Verdict:
    """The loop's own answer: the first setting within the targets."""
    from penstock.tune.diagnosis import Pressure
    from penstock.tune.loop import Verdict

    why = [f"At {step.trial.value}: {step.diagnosis.why}." for step in result.measured[-1:]]
    if best is None and result.measured:
        if result.measured[-1].diagnosis.pressure in (Pressure.QUEUE, Pressure.BOTH):
            why.append("Requests wait there, and with fewer places they wait longer.")
        why.append("--method bisect looks between the steps, and up as well as down.")
    return Verdict(best, best is not None and best != before, why, best is not None)


async def _fixed(
    args: argparse.Namespace, engine: Fixed, loader: Any, slo: Slo, load: Load, tell: Any
) -> int:
    from penstock.tune.diagnosis import Pressure
    from penstock.tune.engines import SEQS
    from penstock.tune.loop import advise, tune
    from penstock.tune.search import Bisection

    if args.request_rate is not None:
        raise BenchError(
            "--request-rate needs an engine that can be restarted; leave it out, and --clients is varied"
        )
    tell(f"The engine at {engine.url} is not run by a penstock up of this user here: it is measured with")
    tell(f"more and fewer clients, and nothing of it is changed. Targets: {slo}.")
    tell(f"{_described(load)}\nclients")
    search = Bisection(args.clients, low=1, high=4 * args.clients, most=args.max_settings)
    # more clients than the engine has places only wait: for this search, that is too many
    towards = {
        Pressure.QUEUE: Pressure.COMPUTE,
        Pressure.MEMORY: Pressure.COMPUTE,
        Pressure.NONE: Pressure.QUEUE,
    }

    async def start(value: int) -> None:
        return None

    async def measure(value: int) -> Any:
        return await loader.run(engine.url, engine.headers, clients=value)

    result = await tune(
        search,
        start,
        measure,
        slo,
        repeats=args.repeats or 3,
        tell=tell,
        translate=lambda pressure: towards.get(pressure, pressure),
        restarts=False,
    )
    verdict = advise(result, slo, seqs=engine.known.seqs)
    flags = {SEQS: verdict.value} if verdict.changed and verdict.value is not None else {}
    head = {
        "method": args.method,
        "restarts": False,
        "flag": "clients",
        "before": engine.known.seqs,
        "kept": False,
    }
    state = (
        "Nothing was changed: who runs this engine starts it again with these flags."
        if flags
        else "Nothing was changed."
    )
    _report(args, result, verdict, head, flags, slo, load, state)
    return 130 if result.interrupted else 0 if verdict.met else 1


def _report(
    args: argparse.Namespace,
    result: Result,
    verdict: Verdict,
    head: Mapping[str, Any],
    flags: Mapping[str, int],
    slo: Slo,
    load: Load,
    state: str,
) -> None:
    from dataclasses import asdict

    from penstock.bench.report import describe_machine, timestamp
    from penstock.tune.report import as_json, others, to_paste

    strangers = others(result)
    settings = {**asdict(load), "dataset": None if load.dataset is None else str(load.dataset)}
    about = {
        "date": timestamp(),
        "url": args.live,
        "model": args.model,
        **head,
        "slo_ms": slo.bounds,
        "load": settings,
    }
    whole = as_json(
        result, verdict, {**about, "requests_of_others": strangers, "machine": describe_machine()}, flags
    )
    text = json.dumps(whole, indent=1)
    if args.json:
        print(text)
    else:
        lines = [f"\nEnded: {result.ended}.", *verdict.why]
        if strangers:
            lines.append(
                f"{strangers} requests of others were served meanwhile: they are in these numbers as noise."
            )
        print("\n".join([*lines, state, *to_paste(flags, args.model or "NAME")]), flush=True)
    if args.output_json:
        try:
            args.output_json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise BenchError(f"cannot write the result to {args.output_json}: {error}") from error


def _slo(args: argparse.Namespace) -> Slo:
    from penstock.tune.slo import Slo

    bounds = {}
    for name, metric in (("ttft_p95", "ttft"), ("tpot_p95", "tpot"), ("e2e_p95", "e2el")):
        if (text := getattr(args, name)) is not None:
            bounds[metric] = _duration(text, f"--{name.replace('_', '-')}") * 1000
    return Slo(**bounds)


def _duration(text: str, flag: str) -> float:
    try:
        return duration(text, flag, above_zero=True)
    except InvalidRequest as error:
        raise BenchError(error.message.removesuffix(".")) from None


def _load(args: argparse.Namespace) -> Load:
    from penstock.tune.load import CHAT, COMPLETIONS, Load

    lasts = _duration(args.duration, "--duration")
    return Load(
        clients=args.clients,
        rate=args.request_rate,
        seconds=lasts,
        # the document's loop counts from the first moment
        ramp=0.0 if args.method == "stepwise" else lasts / 6,
        endpoint=CHAT if args.backend == "openai-chat" else COMPLETIONS,
        model=args.model,
        dataset=args.dataset_path,
        input_len=args.input_len,
        output_len=args.output_len,
        range_ratio=args.range_ratio,
        prefix_len=args.prefix_len,
        vocab_size=args.vocab_size,
        # random prompts have no natural end
        body={} if args.dataset_path is not None else {"ignore_eos": True},
        seed=args.seed,
    )


def _described(load: Load) -> str:
    who = f"{load.clients} clients" if load.rate is None else f"{load.rate:g} requests/s"
    what = str(load.dataset) if load.dataset is not None else f"{load.input_len} + {load.output_len} tokens"
    return f"Load: {who} for {load.seconds:g} s, {what}."


def _teller(args: argparse.Namespace) -> Any:
    def tell(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    return tell


@contextlib.contextmanager
def _interruptible(stop: Stop) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run, and what was found is told; a second one is Python's own."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def ask(number: int) -> None:
        loop.remove_signal_handler(number)
        stop.set("interrupt")

    for number in numbers:
        loop.add_signal_handler(number, ask, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
