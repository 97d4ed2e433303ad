"""`penstock compile`: from a penstock.yaml to the files that run it on a cluster, or on one machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.deploy.objects import Object
    from penstock.deploy.workloads import Bundle
    from penstock.deploy.writing import Applied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the spec, where files go, and in which form."""
    parser.add_argument("file", nargs="?", default="penstock.yaml", help="default: penstock.yaml")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the files; nobody else's are touched"
    )
    parser.add_argument(
        "--format",
        choices=("plain", "kustomize", "helm", "compose", "systemd"),
        default="plain",
        help="for kubectl apply, kustomize with a base and an overlay, a chart; or for one machine "
        "(default: plain)",
    )
    parser.add_argument(
        "--proxy",
        choices=("nginx", "envoy"),
        default="nginx",
        help="what stands before the gateway on one machine, for TLS (default: nginx)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile and write: everything or nothing."""
    from penstock.deploy.bundle import groups
    from penstock.deploy.formats import files, kept
    from penstock.deploy.resolve import resolve
    from penstock.deploy.writing import earlier, write
    from penstock.spec import load

    source, folder = Path(args.file), Path(args.output)
    before = earlier(folder)
    bundle = replace(resolve(load(source)), claimed=before.claimed)
    unsure = list(unsure_flags(bundle))
    parts = {} if args.format in ("compose", "systemd") else groups(bundle)
    texts = files(bundle, args.format, source.name, args.proxy, parts)
    now = _applied(bundle, parts)
    changed = write(folder, texts, kept(args.format), now)
    for each in (*bundle.assumed, *unsure):
        print(f"assumed: {each}", file=sys.stderr)
    new = f"{len(changed)} of {len(texts)} files are new or changed" if changed else "nothing has changed"
    print(f"{folder}: {new}. {folder / 'README.md'} says how they are applied.")
    gone = sorted(set(before.objects) - set(now.objects))
    if args.format in ("plain", "kustomize"):  # a chart's are deleted by helm upgrade
        for line in _to_delete(gone):
            print(line)
    return 0


def _applied(bundle: Bundle, parts: Mapping[str, tuple[Object, ...]]) -> Applied:
    """What a cluster has once these are applied."""
    from penstock.deploy import storage
    from penstock.deploy.writing import Applied

    if not parts:
        return Applied()
    objects = (each for part in parts.values() for each in part)
    made = ((each.metadata.namespace or "", each.kind, each.metadata.name) for each in objects)
    return Applied(tuple(made), storage.claimed(bundle))


def _to_delete(gone: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """What was applied and is no longer here stays in the cluster, with its GPUs; how it goes."""
    lost = [each for each in gone if each[1] in ("PersistentVolumeClaim", "Namespace")]
    spaces: dict[str, list[str]] = {}
    for namespace, kind, name in gone:
        if (namespace, kind, name) not in lost:
            spaces.setdefault(namespace, []).append(f"{kind.lower()}/{name}")
    if spaces:
        yield ("What an earlier time made and this one does not stays in a cluster until it is deleted:")
    for namespace, each in spaces.items():
        yield f"  kubectl -n {namespace} delete --ignore-not-found {' '.join(each)}"
    for _, kind, name in lost:
        yield f"  {kind} {name} stays: everything that it holds would go with it."


def unsure_flags(bundle: Bundle) -> Iterator[str]:
    """Flags that may not be, of images whose version has no table here. Raises StartupError for a flag with
    which the engine of a known version would end at its start."""
    from penstock.check import engines, flags

    for workload in bundle.workloads:
        found = engines.refused(workload.args, workload.engine)
        if found is None:
            continue
        where = f"models.{workload.model_name}.flags"
        tag = workload.image.partition("@")[0].rpartition(":")[2].removeprefix("v")
        known = workload.engine == "penstock" or tag.split("-")[0].startswith(flags.VLLM_VERSION)
        if not known and found.rule in (engines.FLAG_UNKNOWN, engines.FLAG_REMOVED):
            yield f"{where}: {found.what} Whether {workload.image} has it is not known here"
            continue
        raise StartupError(f"{where}: {found.what}", param=where, advice=found.fix or found.rule.fix)
