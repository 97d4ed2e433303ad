"""`penstock apply DIR`: a bundle goes to a cluster through kubectl; why pods do not start is said."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli.values import duration
from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.operate.apply.kubectl import Kubectl
    from penstock.operate.apply.run import Outcome

NOT_READY, REFUSED = 1, 2
"""Exit statuses: applied, and not ready in time; not applied."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the paths, and kubectl's habits."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folders or files of a bundle")
    parser.add_argument(
        "-R", "--recursive", action="store_true", help="folders within folders, too, as kubectl's"
    )
    parser.add_argument("--context", help="of the kubeconfig, as kubectl's")
    parser.add_argument("--kubeconfig", metavar="FILE", help="as kubectl's")
    parser.add_argument("-n", "--namespace", help="of objects that name none")
    parser.add_argument(
        "--dry-run",
        choices=("none", "client", "server"),
        default="none",
        help="server: the API server looks at it, and keeps nothing; client: nothing leaves this machine",
    )
    parser.add_argument(
        "--field-manager",
        default="penstock",
        metavar="NAME",
        help="who has set the fields (default: penstock)",
    )
    parser.add_argument(
        "--force-conflicts", action="store_true", help="take over fields that others have set"
    )
    parser.add_argument(
        "--timeout", default="20m", metavar="TIME", help="how long to wait until all is ready (default: 20m)"
    )
    parser.add_argument("--poll", default="3s", metavar="TIME", help="between two looks (default: 3s)")
    parser.add_argument("--no-wait", action="store_true", help="do not wait")
    parser.add_argument("--no-check", action="store_true", help="do not run `penstock check` first")
    parser.add_argument("--kubectl", default="kubectl", metavar="PROGRAM", help="another one, or its path")
    parser.add_argument("--json", action="store_true", help="print what has come of it as JSON")


def run(args: argparse.Namespace) -> int:
    """0: all is ready. 1: not in time, or never. 2: refused."""
    from penstock.operate.apply import bundle
    from penstock.operate.apply.kubectl import Kubectl
    from penstock.operate.apply.run import Outcome, Watch, apply

    timeout, poll = duration(args.timeout, "--timeout"), duration(args.poll, "--poll")
    for path in args.paths:
        if path.is_dir() and bundle.kind(path) == "helm":
            raise StartupError(
                f"{path} is a Helm chart, which Helm installs.",
                advice=f"helm upgrade --install NAME {path} --wait; or `penstock compile --format plain`.",
            )
    if not args.no_check:
        _check(args.paths)
    kubectl = Kubectl(
        program=args.kubectl, context=args.context, kubeconfig=args.kubeconfig, namespace=args.namespace
    )
    objects = _objects(args.paths, kubectl, args.recursive)
    if args.dry_run == "client":
        ordered = [each for part in bundle.stages(objects) for each in part]
        outcome = Outcome(applied=[f"{bundle.title(each)} (dry run)" for each in ordered])
    else:
        done = apply(
            kubectl, objects, manager=args.field_manager, force=args.force_conflicts, dry_run=args.dry_run
        )
        outcome = Outcome(applied=done)
    for line in outcome.applied:
        _say(line)
    if args.dry_run == "none" and not args.no_wait:
        watch = Watch(
            kubectl,
            objects,
            _say,
            default_namespace=args.namespace,
            timeout=timeout,
            poll=poll,
            explain=_explain,
        )
        seen = watch.run()
        seen.applied = outcome.applied
        outcome = seen
        _say(_end(outcome, timeout))
    if args.json:
        print(json.dumps(_json(outcome), indent=1))
    return 0 if outcome.ready else NOT_READY


def _objects(paths: list[Path], kubectl: Kubectl, recursive: bool) -> list[dict[str, Any]]:
    from penstock.operate.apply import bundle

    plain = [path for path in paths if not path.is_dir() or bundle.kind(path) == "plain"]
    found = bundle.read(plain, recursive=recursive) if plain else []
    for path in paths:
        if path not in plain:
            found += bundle.parse(kubectl.kustomize(str(path)), f"{path} (kustomize)")
    return found


def _check(paths: list[Path]) -> None:
    """What `penstock check` calls an error keeps a bundle here. Raises StartupError."""
    from penstock.check.finding import Severity
    from penstock.check.run import check

    found = [each for each in check(paths) if each.rule.severity is Severity.ERROR]
    if found:
        for each in found[:20]:
            _say(f"{each.path}:{each.line}: {each.rule.id}: {each.what}")
        raise StartupError(
            f"`penstock check` has found {len(found)} errors; nothing was applied.",
            advice="`penstock check` says what to write instead; --no-check applies it as it is.",
        )


def _explain(log: str) -> str | None:
    """The first known problem of a log."""
    from penstock.doctor.logs import examine

    matches, _ = examine([log.encode()])
    if not matches:
        return None
    problem = matches[0].problem
    return f"Its log: {problem.title}. {problem.cause} {problem.fixes[0]}"


def _end(outcome: Outcome, timeout: float) -> str:
    if not outcome.standings:
        return "Applied; nothing in it runs."
    count = len(outcome.standings)
    if outcome.ready:
        return f"All {count} are ready after {outcome.seconds:.0f} s."
    late = [each.object for each in outcome.standings if not each.ready]
    why = "" if outcome.reasons else " Nothing is known of why: `kubectl get events` may say more."
    failed = any(each.failed for each in outcome.standings)
    when = f"after {outcome.seconds:.0f} s" if failed else f"within {timeout:g} s"
    return f"{len(late)} of {count} are not ready {when}: {', '.join(late)}.{why} What was applied stays."


def _json(outcome: Outcome) -> dict[str, Any]:
    return {
        "ready": outcome.ready,
        "seconds": round(outcome.seconds, 3),
        "applied": outcome.applied,
        "workloads": [asdict(each) for each in outcome.standings],
        "reasons": [asdict(each) for each in outcome.reasons],
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
