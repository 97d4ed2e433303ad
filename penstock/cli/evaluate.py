"""`penstock eval`: whether a candidate may take a baseline's place, on a set of examples."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import StartupError

from .values import parse_json_object

if TYPE_CHECKING:
    from penstock.evaluate.graders.spec import AnyGrader
    from penstock.evaluate.run import Evaluation, Watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `penstock eval`."""
    parser.epilog = (
        "Exit status: 0 the candidate is better or not worse; 1 it is worse; 2 the command, the set or a key "
        "is wrong, and nothing was decided; 3 the set is too small to tell; 4 a server or grader went down, "
        "and the same command goes on; 130 interrupted, likewise. Of several candidates, the gravest."
    )
    parser.add_argument("model", nargs="?", help="for --quantization: the model that is quantised")
    sides = parser.add_argument_group("who is compared")
    sides.add_argument(
        "--quantization",
        metavar="SCHEMES",
        help="compare MODEL in full precision with these, as int4,int8,w8a8",
    )
    sides.add_argument("--baseline", metavar="URL|MODEL", help="what is served now")
    sides.add_argument(
        "--candidate",
        metavar="URL|MODEL",
        action="append",
        default=[],
        help="what may take its place (repeatable)",
    )
    sides.add_argument("--judge", metavar="URL|MODEL", help="who grades where a grader is a judge")
    for side in ("baseline", "candidate", "judge"):
        sides.add_argument(
            f"--{side}-model", metavar="NAME", help="model of that URL (default: the first that it lists)"
        )
    for side in ("baseline", "candidate"):
        sides.add_argument(
            f"--{side}-body",
            metavar="JSON",
            type=parse_json_object,
            default={},
            help="fields of its requests only",
        )
        sides.add_argument(
            f"--{side}-flags",
            metavar="FLAGS",
            default="",
            help="flags of the engine that is started for its MODEL",
        )
        sides.add_argument(
            f"--{side}-price",
            metavar="PRICE",
            help="IN:OUT[:CACHED], US dollars per million tokens, or DOLLARS/h of a device",
        )
    sides.add_argument(
        "--engine-flags", metavar="FLAGS", default="", help="flags of all engines that are started"
    )
    sides.add_argument(
        "--spec", type=Path, metavar="FILE", help="penstock.yaml that has prices of these URLs and models"
    )

    examples = parser.add_argument_group("examples")
    examples.add_argument(
        "--set", type=Path, metavar="FILE", help="JSON lines (default for the demo model: its own)"
    )
    examples.add_argument(
        "--grader",
        metavar="GRADER",
        help="of lines without one: exact, normalised, includes, regex:PATTERN, numeric:TOLERANCE, "
        "json_schema:FILE, python:MODULE:FUNCTION, http://URL, judge[:RUBRIC_FILE], or a JSON object",
    )
    examples.add_argument(
        "--rubric", type=Path, metavar="FILE", help="what a judge grades by, where the set has none"
    )
    examples.add_argument("--limit", type=_count, metavar="N", help="the first N examples only")
    examples.add_argument(
        "--skip-broken", action="store_true", help="leave broken lines out, instead of refusing the set"
    )
    examples.add_argument(
        "--allow-hooks", action="store_true", help="let the set name functions and servers that are called"
    )

    asking = parser.add_argument_group("asking")
    asking.add_argument(
        "--concurrency",
        type=_count,
        default=8,
        metavar="N",
        help="requests under way at each side (%(default)s)",
    )
    asking.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="S", help="for an answer (%(default)g)"
    )
    asking.add_argument(
        "--retries", type=_natural, default=7, metavar="N", help="tries after the first (%(default)s)"
    )
    asking.add_argument(
        "--body",
        metavar="JSON",
        type=parse_json_object,
        default={},
        help="fields of all requests; temperature is 0 otherwise",
    )
    asking.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where answers are kept (default: PENSTOCK_CACHE, else ~/.cache/penstock, /eval)",
    )
    asking.add_argument("--again", action="store_true", help="ask everything, also what is kept")

    deciding = parser.add_argument_group("deciding")
    deciding.add_argument(
        "--margin",
        type=_share,
        default=0.02,
        metavar="D",
        help="how much worse still is not worse (%(default)s: two points of 100)",
    )
    deciding.add_argument(
        "--confidence", type=_confidence, default=0.95, metavar="C", help="of the interval (%(default)s)"
    )
    deciding.add_argument(
        "--max-ungraded",
        type=_natural,
        default=0,
        metavar="N",
        help="examples that may stay without a grade (%(default)s)",
    )

    report = parser.add_argument_group("report")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a report that opens offline")
    report.add_argument("--output-json", type=Path, metavar="FILE", help="write everything as JSON")
    report.add_argument(
        "--disable-tqdm", "--no-progress", dest="no_progress", action="store_true", help="no progress bar"
    )


def run(args: argparse.Namespace) -> int:
    """Ask, grade, report: the exit status says what was found."""
    import asyncio

    from rich.console import Console

    from penstock.evaluate.report import print_report, write_json
    from penstock.evaluate.result import build_result
    from penstock.evaluate.run import evaluate

    evaluation = _evaluation(args)
    for path in filter(None, (args.html, args.output_json)):
        _check_writable(path)
    problems = evaluation.dataset.skipped
    if problems:
        print(f"penstock eval: {len(problems)} broken lines are left out: {problems[0]} …", file=sys.stderr)
    with _watch(hidden=args.no_progress) as watch:
        try:
            outcome = asyncio.run(_until_told(evaluate(evaluation, watch)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            watch.say("interrupted; the answers so far are kept, and the same command goes on")
            return 130
    result = build_result(
        outcome, margin=args.margin, confidence=args.confidence, most_ungraded=args.max_ungraded
    )
    print_report(result, Console())
    if args.output_json:
        write_json(args.output_json, result)
    if args.html:
        from penstock.evaluate.page import write_html  # which imports jinja2

        write_html(args.html, result)
    return result.status


async def _until_told(work: Any) -> Any:
    """Let Ctrl-C, and SIGTERM, which CI sends, end the work: engines are ended, too. A second one ends the
    process as it would any other.

    Both are heard between two callbacks of the loop; asyncio's own answer to Ctrl-C cancels in the middle of
    whatever is being done.
    """
    import asyncio
    import signal

    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    heard = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        task.cancel()
        for number in heard:
            loop.remove_signal_handler(number)

    try:
        for number in heard:
            loop.add_signal_handler(number, stop)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread
        return await task
    try:
        return await task
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


# ---- from flags to what is run ----


def _evaluation(args: argparse.Namespace) -> Evaluation:
    from penstock.evaluate.asking import Patience
    from penstock.evaluate.dataset import read_dataset
    from penstock.evaluate.run import Evaluation

    from .evaluate_sides import judge, sides

    baseline, candidates = sides(args)
    dataset = read_dataset(
        _set(args),
        grader=_grader(args.grader),
        skip_broken=args.skip_broken,
        hooks_allowed=args.allow_hooks,
        limit=args.limit,
    )
    return Evaluation(
        dataset=dataset,
        baseline=baseline,
        candidates=candidates,
        judge=judge(args),
        rubric=_text(args.rubric, "--rubric"),
        cache=args.cache or _cache_folder(),
        again=args.again,
        patience=Patience(concurrency=args.concurrency, timeout=args.timeout, retries=args.retries),
    )


def _set(args: argparse.Namespace) -> Path:
    if args.set is not None:
        return Path(args.set)
    from penstock import assets

    models = {args.model, args.baseline, *args.candidate} - {None}
    if models <= {"demo", "penstock/demo"}:
        return Path(str(assets.__file__)).parent / "evaluation" / "demo.jsonl"
    raise StartupError(
        "There is no set.", advice="Name one with --set FILE.jsonl; docs/eval.md has its format."
    )


def _grader(text: str | None) -> AnyGrader | None:
    from penstock.evaluate.graders.spec import read_flag

    if text is None:
        return None
    try:
        return read_flag(text)
    except ValueError as error:
        raise StartupError(f"--grader: {error}.") from None


def _text(path: Path | None, flag: str) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{flag} {path} cannot be read: {error}.") from None


def _cache_folder() -> Path:
    if named := os.environ.get("PENSTOCK_CACHE"):
        return Path(named) / "eval"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "penstock" / "eval"


def _check_writable(path: Path) -> None:
    """Before anything is asked and paid for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}.") from None


@contextmanager
def _watch(*, hidden: bool) -> Iterator[Watch]:
    """A progress bar for each side on standard error; without a terminal, a line for what begins."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    hidden = hidden or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=hidden) as progress:
        tasks: dict[str, Any] = {}

        class Bars:
            def begin(self, name: str, total: int) -> None:
                tasks[name] = progress.add_task(name, total=total)

            def advance(self, name: str) -> None:
                progress.advance(tasks[name])

            def say(self, text: str) -> None:
                print(f"penstock eval: {text}", file=sys.stderr) if hidden else progress.console.print(text)

        yield Bars()


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _seconds(text: str) -> float:
    if not 0 < (value := float(text)) <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0, up to a day")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a share from 0 to below 1; two points of 100 are 0.02"
        )
    return value


def _confidence(text: str) -> float:
    if not 0.5 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.5 to below 1, as 0.95 is")
    return value
