"""`penstock bench`: flags to configuration, a call, a table. Flags are spelt as in `vllm bench`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock import writing
from penstock.bench.errors import BenchError

if TYPE_CHECKING:
    from penstock.bench.serve import ServeBench

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BACKENDS = {"openai": COMPLETIONS, "vllm": COMPLETIONS, "openai-chat": CHAT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands `serve` and `startup`."""
    commands = parser.add_subparsers(dest="bench_command", metavar="COMMAND", required=True)
    about = "put load on any OpenAI-compatible server; report latency, throughput and goodput"
    _add_serve_arguments(
        commands.add_parser("serve", help=about, description=about[0].upper() + about[1:] + ".")
    )
    about = "measure a server from exec to its first token"
    _add_startup_arguments(
        commands.add_parser(
            "startup",
            help=about,
            description=about[0].upper() + about[1:] + ".",
            usage="penstock bench startup [options] MODEL [flags of penstock serve]\n"
            "       penstock bench startup [options] --base-url URL -- COMMAND [ARG ...]",
        )
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 0 if it measured something, 1 with one line on stderr if it could not."""
    try:
        return _run_serve(args) if args.bench_command == "serve" else _run_startup(args)
    except BenchError as error:
        print(f"penstock bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("penstock bench: interrupted before anything was measured", file=sys.stderr)
        return 130


def _positive(text: str) -> float:
    """A number above 0, inf included, as an argparse type."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _natural(text: str) -> int:
    """A whole number of at least 0, as an argparse type."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--backend", choices=sorted(BACKENDS), default="openai", help="API to use (%(default)s)"
    )
    server.add_argument("--base-url", metavar="URL", help="server, instead of --host and --port")
    server.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    server.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    server.add_argument("--endpoint", metavar="PATH", help=f"{COMPLETIONS} or {CHAT} (by --backend)")
    server.add_argument("--model", help="model name (default: first of /v1/models)")
    server.add_argument("--api-key", metavar="KEY", help="bearer key (default: OPENAI_API_KEY)")
    server.add_argument(
        "--header", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="extra request headers"
    )
    server.add_argument(
        "--request-timeout",
        type=_positive,
        metavar="S",
        default=600.0,
        help="give up a request after S s (%(default)g)",
    )

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--dataset-name", choices=["random", "jsonl", "custom"], default="random", help="source (%(default)s)"
    )
    prompts.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help='JSON lines with "prompt" or "messages" (jsonl, custom)',
    )
    prompts.add_argument(
        "--num-prompts", type=_count, default=1000, metavar="N", help="requests (%(default)s)"
    )
    prompts.add_argument(
        "--num-warmups", type=_natural, default=0, metavar="N", help="not counted (%(default)s)"
    )
    prompts.add_argument(
        "--random-input-len", "--input-len", type=int, default=1024, metavar="N", help="tokens (%(default)s)"
    )
    prompts.add_argument(
        "--random-output-len", "--output-len", type=int, default=128, metavar="N", help="tokens (%(default)s)"
    )
    prompts.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths vary by ±R, 0 to 1 (%(default)s)",
    )
    prompts.add_argument(
        "--random-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens shared by all prompts (%(default)s)",
    )
    prompts.add_argument(
        "--prompt-format",
        choices=["auto", "text", "token-ids"],
        default="auto",
        help="random prompts as token ids (exact lengths; auto for completions) or words (auto for chat)",
    )
    prompts.add_argument(
        "--vocab-size", type=int, default=1000, metavar="N", help="token ids are drawn below N (%(default)s)"
    )
    prompts.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (%(default)s)")

    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=_positive,
        default=math.inf,
        metavar="R",
        help="requests per second (inf: all at once)",
    )
    load.add_argument(
        "--burstiness",
        type=_positive,
        default=1.0,
        metavar="B",
        help="1 Poisson, <1 burstier, >1 evener, inf constant",
    )
    load.add_argument(
        "--max-concurrency",
        type=_count,
        metavar="N",
        help="most requests in flight; with rate inf a closed loop",
    )
    load.add_argument("--max-duration", type=_positive, metavar="S", help="end the run after S seconds")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--ignore-eos", action="store_true", help="always generate the full output length")
    for flag, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float)):
        sampling.add_argument(f"--{flag}", type=kind, metavar="X", help="(default: the server's)")
    sampling.add_argument("--extra-body", metavar="JSON", help="object merged into every request body")

    report = parser.add_argument_group("report")
    report.add_argument(
        "--percentile-metrics",
        metavar="LIST",
        help="rows of the table (default ttft,tpot,itl,e2el; more in open loop)",
    )
    report.add_argument("--metric-percentiles", default="50,90,99", metavar="LIST", help="(%(default)s)")
    report.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count requests within all of ttft, tpot, e2el",
    )
    report.add_argument(
        "--save-result", action="store_true", help="write JSON under a name made of the settings"
    )
    report.add_argument("--result-dir", type=Path, metavar="DIR", help="folder for --save-result")
    report.add_argument("--result-filename", metavar="NAME", help="name for --save-result")
    report.add_argument("--output-json", type=Path, metavar="FILE", help="write JSON to FILE")
    report.add_argument(
        "--disable-tqdm", "--no-progress", dest="no_progress", action="store_true", help="no progress bar"
    )


def _run_serve(args: argparse.Namespace) -> int:
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from penstock.bench.client import RequestRecord
    from penstock.bench.report import METRICS, print_report
    from penstock.bench.serve import bench_serve

    bench = _serve_bench(args)
    metrics = _metrics(args.percentile_metrics, closed=bench.closed)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise BenchError(f"--percentile-metrics {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = Console(stderr=True)
    hidden = args.no_progress or not stderr.is_terminal
    with Progress(*columns, console=stderr, disable=hidden, transient=True) as progress:
        task = progress.add_task("requests", total=bench.num_prompts)

        def advance(_: RequestRecord) -> None:
            progress.advance(task)

        result = asyncio.run(bench_serve(bench, advance))
    print_report(result, Console(), metrics=metrics, percentiles=bench.percentiles)
    for path in _result_paths(args, result):
        _write_json(path, result)
    if result["ended_by"] == "interrupt":
        return 130
    if result["completed"] == 0:
        print("penstock bench: no request was completed", file=sys.stderr)
        return 1
    return 0


def _serve_bench(args: argparse.Namespace) -> ServeBench:
    from penstock.bench.client import split_base_url
    from penstock.bench.report import parse_goodput
    from penstock.bench.serve import ServeBench

    endpoint = args.endpoint or BACKENDS[args.backend]
    if not endpoint.startswith("/") or not endpoint.endswith("/completions"):
        raise BenchError(f"--endpoint is {endpoint!r}; it must be {COMPLETIONS} or {CHAT}")
    if (args.dataset_name == "random") != (args.dataset_path is None):
        raise BenchError(
            f"--dataset-name {args.dataset_name} with --dataset-path {args.dataset_path}: jsonl needs a file"
            " and random takes none"
        )
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    body = {name: value for name, value in sampling.items() if value is not None}
    if args.ignore_eos:
        body["ignore_eos"] = True
    return ServeBench(
        base_url=split_base_url(args.base_url or f"http://{args.host}:{args.port}"),
        endpoint=endpoint,
        model=args.model,
        dataset_path=args.dataset_path,
        num_prompts=args.num_prompts,
        num_warmups=args.num_warmups,
        random_input_len=args.random_input_len,
        output_len=args.random_output_len,
        random_range_ratio=args.random_range_ratio,
        random_prefix_len=args.random_prefix_len,
        prompt_format=args.prompt_format,
        vocab_size=args.vocab_size,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        max_duration=args.max_duration,
        request_timeout=args.request_timeout,
        seed=args.seed,
        body=body | _extra_body(args.extra_body),
        headers=_headers(args),
        percentiles=_percentiles(args.metric_percentiles),
        goodput_ms=parse_goodput(args.goodput),
    )


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for pair in args.header:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise BenchError(f"--header {pair!r}: write KEY=VALUE")
        headers[name] = value
    return headers


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError as error:
        raise BenchError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BenchError(f"--extra-body is {text!r}; it must be a JSON object")
    return body


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        ranks = tuple(float(rank) for rank in text.split(","))
    except ValueError:
        ranks = (-1.0,)
    if not all(0 <= rank <= 100 for rank in ranks):
        raise BenchError(f"--metric-percentiles is {text!r}; write numbers from 0 to 100 like 50,90,99")
    return ranks


def _metrics(text: str | None, *, closed: bool) -> list[str]:
    if text:
        return text.split(",")
    # In the closed loop nothing is due before it is sent, so the two ways to measure agree.
    intended = [] if closed else ["ttft_including_client_queue", "e2el_including_client_queue"]
    return ["ttft", "tpot", "itl", "e2el", *intended]


def _result_paths(args: argparse.Namespace, result: dict[str, Any]) -> list[Path]:
    paths = [args.output_json] if args.output_json else []
    if args.save_result or args.result_dir or args.result_filename:
        concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
        model = result["model_id"].rsplit("/", 1)[-1]
        name = f"{args.backend}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
        paths.append((args.result_dir or Path()) / (args.result_filename or name))
    return paths


def _write_json(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.replace(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise BenchError(f"cannot write the result to {path}: {error}") from error
    print(f"Result written to {path}")


def _add_startup_arguments(parser: argparse.ArgumentParser) -> None:
    _add_startup_options(parser)
    parser.add_argument("--api-key", metavar="KEY", help="bearer key (default: OPENAI_API_KEY); before MODEL")
    parser.add_argument(
        "--model", dest="request_model", help="model name for the request (default: first listed)"
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="where the COMMAND after -- will listen (default: http://127.0.0.1:8000)",
    )
    # Everything from MODEL or "--" on, dashes included.
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="MODEL | -- COMMAND", help="what to start")


def _add_startup_options(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """The options that may also follow MODEL; `again` leaves values given before it alone."""

    def default(value: Any) -> Any:
        return argparse.SUPPRESS if again else value

    parser.add_argument("--repeats", type=_count, default=default(3), metavar="N", help="runs (default 3)")
    parser.add_argument(
        "--timeout", type=_positive, default=default(600.0), metavar="S", help="per run (default 600)"
    )
    parser.add_argument("--output-json", type=Path, default=default(None), metavar="FILE", help="write JSON")


def _run_startup(args: argparse.Namespace) -> int:
    from rich.console import Console

    from penstock.bench.client import split_base_url
    from penstock.bench.startup import StartupBench, bench_startup, free_port, print_startup, serve_command

    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    if not args.rest or args.rest == ["--"]:
        raise BenchError("startup: name a MODEL for penstock serve, or a COMMAND after --")
    if args.rest[0] == "--":
        command, base_url = tuple(args.rest[1:]), split_base_url(args.base_url or "http://127.0.0.1:8000")
    elif args.base_url:
        raise BenchError("startup: --base-url goes with a COMMAND after --; a MODEL is served on a free port")
    else:
        options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        _add_startup_options(options, again=True)
        _, flags = options.parse_known_args(args.rest[1:], namespace=args)
        if any(flag.partition("=")[0] in ("--host", "--port") for flag in flags):
            raise BenchError("startup: --host and --port are chosen here; leave them out after MODEL")
        port = free_port()
        command, base_url = serve_command(args.rest[0], flags, port), f"http://127.0.0.1:{port}"
    report = bench_startup(
        StartupBench(
            command=command,
            base_url=base_url,
            model=args.request_model,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            repeats=args.repeats,
            timeout=args.timeout,
        )
    )
    print_startup(report, Console())
    if args.output_json:
        _write_json(args.output_json, report)
    return 0
