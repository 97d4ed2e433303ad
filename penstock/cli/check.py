"""`penstock check`: what is wrong with manifests, queries, commands, code and specs, before they run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.check.finding import Rule
    from penstock.check.run import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is checked, which rules count, and how findings are told."""
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files and folders: penstock.yaml, Kubernetes YAML, Prometheus rules, dashboards, Compose, "
        "Dockerfiles, shell, Markdown, Python, JavaScript, TypeScript; - for YAML or JSON on standard input "
        "(default: .)",
    )
    parser.add_argument(
        "--format", choices=("text", "json", "sarif"), default="text", help="of the findings (default: text)"
    )
    parser.add_argument("--strict", action="store_true", help="warnings count for the exit status, too")
    parser.add_argument(
        "--select", action="append", default=[], metavar="RULE", help="only these rules; several with commas"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="RULE",
        help="all rules but these; several with commas",
    )
    parser.add_argument(
        "--crds",
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder with definitions of custom resources (KEDA, Prometheus operator, Gateway API), "
        "which their objects are checked against; several times",
    )
    parser.add_argument(
        "--kubernetes",
        metavar="VERSION",
        help="version of Kubernetes whose schemas count, as 1.33 (default: the newest that is installed)",
    )
    parser.add_argument(
        "--free-gpus",
        type=int,
        metavar="N",
        help="GPUs that are free while a new version is rolled out (default: what the objects say)",
    )
    parser.add_argument("--list-rules", action="store_true", help="list all rules, and end")
    parser.add_argument("--explain", metavar="RULE", help="tell what a rule is about, and end")


def run(args: argparse.Namespace) -> int:
    """Check and print. 0: nothing found, 1: something found, 2: it could not be checked."""
    from penstock import __version__
    from penstock.check import report
    from penstock.check import run as checker
    from penstock.check.sources import UNREADABLE, walk

    rules = checker.rules()
    if args.list_rules:
        print(report.list_of(rules), end="")
        return 0
    if args.explain is not None:
        print(report.explain(_named(rules, args.explain, "--explain")), end="")
        return 0
    selected, ignored = _names(rules, args.select, "--select"), _names(rules, args.ignore, "--ignore")
    options = _options(args)
    paths = args.paths or ["."]
    for path in paths:
        if path != "-" and not os.path.lexists(path):
            raise StartupError(f"{path}: there is no such file or folder.", param="PATH")
    sources = []
    for path in paths:
        found = list(walk([path]))
        if not found:
            raise StartupError(
                f"{path}: there is no file in it that is checked.",
                param="PATH",
                advice="Folders that begin with a dot and folders of others' work (node_modules, venv) are "
                "passed over; a file that is named is read whatever its suffix.",
            )
        sources += found
    findings = [
        finding
        for finding in checker.check_sources(sources, options)
        if (not selected or finding.rule.id in selected) and finding.rule.id not in ignored
    ]
    if args.format == "json":
        print(report.as_json(findings, files=len(sources), strict=args.strict, version=__version__), end="")
    elif args.format == "sarif":
        lines = {source.path: source.text.split("\n") for source in sources}
        print(report.sarif(findings, rules, lines, version=__version__), end="")
    else:
        _show(report.text(findings, files=len(sources), style=_styled if sys.stdout.isatty() else _plain))
    if any(finding.rule == UNREADABLE for finding in findings):
        return report.CANNOT
    return report.status(findings, strict=args.strict)


def _options(args: argparse.Namespace) -> Options:
    from penstock.check.run import Options
    from penstock.check.schemas import chosen

    crds = tuple(Path(each) for each in args.crds)
    for path in crds:
        if not path.exists():
            raise StartupError(f"--crds {path}: there is no such file or folder.", param="--crds")
    try:
        chosen(args.kubernetes)
    except ValueError as error:
        raise StartupError(f"--kubernetes: {error}", param="--kubernetes") from None
    if args.free_gpus is not None and args.free_gpus < 0:
        raise StartupError(f"--free-gpus {args.free_gpus}: it must be 0 or more.", param="--free-gpus")
    return Options(crds=crds, kubernetes=args.kubernetes, free_gpus=args.free_gpus)


def _names(rules: tuple[Rule, ...], given: list[str], flag: str) -> frozenset[str]:
    words = [word.strip() for each in given for word in each.split(",") if word.strip()]
    return frozenset(_named(rules, word, flag).id for word in words)


def _named(rules: tuple[Rule, ...], name: str, flag: str) -> Rule:
    from penstock.core.near import meant

    found = next((rule for rule in rules if rule.id == name), None)
    if found is None:
        hint = meant(name, [rule.id for rule in rules], 0.5)
        raise StartupError(
            f"{flag} {name}: there is no such rule.",
            param=flag,
            advice=f"{hint} `penstock check --list-rules` lists them.".strip(),
        )
    return found


def _plain(text: str, style: str) -> str:
    return text


def _styled(text: str, style: str) -> str:
    from rich.markup import escape

    return f"[{style}]{escape(text)}[/]"


def _show(text: str) -> None:
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, end="")
