"""`penstock models`: the store of weights. What is pulled is verified; what is served changes in one step."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import InvalidRequest, StartupError

if TYPE_CHECKING:
    from penstock.operate.models.manifest import Manifest
    from penstock.operate.models.store import Store

DAMAGED = 1
"""Exit status where something is not as its checksum says."""


def default_store() -> Path:
    """PENSTOCK_STORE, or a folder of the user."""
    given = os.environ.get("PENSTOCK_STORE")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "penstock" / "models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be done."""
    commands = parser.add_subparsers(dest="models_command", metavar="COMMAND", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = commands.add_parser(name, help=help)
        found.add_argument(
            "--store", type=Path, metavar="DIR", help="the store (default: PENSTOCK_STORE, else of this user)"
        )
        return found

    pull = command("pull", "bring a model into the store, verify it, and make it current")
    pull.add_argument("source", help="a folder, or a Hugging Face id")
    pull.add_argument("name", nargs="?", help="what to call it (default: the id, or the folder's name)")
    pull.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    pull.add_argument(
        "--no-switch", action="store_true", help="leave what is current; rollback --to VERSION switches later"
    )
    pull.add_argument(
        "--no-snapshot", action="store_true", help="make no snapshot of what was current before"
    )
    pull.add_argument("--no-wait", action="store_true", help="refuse where another process pulls it")
    snapshot = command("snapshot", "hard links to what is current, under the time")
    snapshot.add_argument("name")
    rollback = command("rollback", "make current what was so before")
    rollback.add_argument("name")
    rollback.add_argument("--to", metavar="VERSION", help="a version or a snapshot, or its beginning")
    rollback.add_argument("--no-verify", action="store_true", help="do not read it all first")
    verify = command("verify", "compare files with their checksums")
    verify.add_argument("name", nargs="?", help="default: all models")
    verify.add_argument("--version", metavar="VERSION", help="default: all that there are")
    verify.add_argument("--sizes", action="store_true", help="compare sizes only")
    verify.add_argument(
        "--restore-drill",
        action="store_true",
        help="copy what is current elsewhere, verify it there, open configuration and headers; say how long",
    )
    verify.add_argument("--scratch", type=Path, metavar="DIR", help="where the drill copies to")
    listed = command("list", "what there is, and what it takes")
    listed.add_argument("--json", action="store_true", help="as JSON")
    prune = command("prune", "remove old versions and snapshots")
    prune.add_argument("name", nargs="?", help="default: all models")
    prune.add_argument("--keep", type=int, default=2, metavar="N", help="newest of each to keep (default: 2)")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    for what, help in (("pin", "keep a version whatever prune does"), ("unpin", "keep it no more")):
        pin = command(what, help)
        pin.add_argument("name")
        pin.add_argument("version")
    path = command("path", "print the folder of what is current, for `penstock serve` and `weights:`")
    path.add_argument("name")
    path.add_argument("--version", metavar="VERSION", help="of a version or a snapshot")


def run(args: argparse.Namespace) -> int:
    """0; 1 where something is damaged."""
    from penstock.operate.models.store import Store

    store = Store(args.store or default_store())
    return _COMMANDS[args.models_command](store, args)


def _pull(store: Store, args: argparse.Namespace) -> int:
    from penstock.operate.models import hub, local

    folder = Path(args.source).expanduser()
    from_folder = args.source.startswith((".", "/", "~")) or folder.exists()
    if from_folder and args.revision is not None:
        raise InvalidRequest("--revision is of a Hugging Face id; this is a folder.", param="--revision")
    name = args.name or (_plain(folder.resolve().name) if from_folder else args.source)
    model = store.model(name)
    created = store.now().isoformat(timespec="seconds")
    with model.alone(_say, wait=not args.no_wait):
        before = model.current
        if from_folder:
            manifest = local.fetch(model, folder, created)
        else:
            manifest = hub.fetch(model, args.source, args.revision, created, _say)
        if before is not None and before.name == manifest.version:
            _say(f"{name} is {manifest.version} already")
        elif args.no_switch:
            _say(f"{name} has {_shown(manifest)}; current is {before.name if before else 'nothing'}")
        else:
            if before is not None and not args.no_snapshot:
                _say(f"snapshot of {before.name}: {model.snapshot()}")
            model.switch(manifest.version, f"pull of {args.source}")
            _say(f"{name} is {_shown(manifest)}")
    print(model.folder / "versions" / manifest.version)
    return 0


def _snapshot(store: Store, args: argparse.Namespace) -> int:
    model = store.existing(args.name)
    with model.alone(_say):
        print(model.folder / "snapshots" / model.snapshot())
    return 0


def _rollback(store: Store, args: argparse.Namespace) -> int:
    model = store.existing(args.name)
    with model.alone(_say):
        before, now = model.rollback(args.to, verify=not args.no_verify)
    _say(f"{model.name}: {before or 'nothing'} → {now}. Engines that run go on with what they have loaded.")
    return 0


def _verify(store: Store, args: argparse.Namespace) -> int:
    from penstock.operate.models import drill, manifest

    if args.version is not None and args.name is None:
        raise InvalidRequest("--version is of one model: name it.", param="--version")
    models = store.models() if args.name is None else [store.existing(args.name)]
    if not models:
        raise StartupError(f"{store.root} has no models.", advice="`penstock models pull` brings one.")
    bad = 0
    for model in models:
        if args.restore_drill:
            folder = model.version(args.version)[0] if args.version else model.current
            if folder is None:
                raise StartupError(f"Nothing is current of {model.name}.")
            found = drill.run(folder, manifest.read(folder), args.scratch)
            speed = found.size / 1e9 / found.restored if found.restored else 0.0
            print(
                f"{model.name} {found.version}: restored {found.files} files, {_gb(found.size)}, in "
                f"{found.restored:.1f} s ({speed:.2f} GB/s), checked by sha256; {found.architecture}, "
                f"{found.tensors:,} tensors, opened in {found.opened:.2f} s"
            )
            bad += _tell(found.problems)
            continue
        if args.version is not None:
            folders = [model.version(args.version)[0]]
        else:
            folders = sorted((model.folder / "versions").iterdir()) + sorted(
                (model.folder / "snapshots").glob("*")
            )
        for folder in folders:
            try:
                made = manifest.read(folder)
            except StartupError as error:
                print(f"{model.name} {folder.name}:")
                bad += _tell([error.message])
                continue
            problems = manifest.problems(folder, made, sizes_only=args.sizes)
            print(f"{model.name} {folder.name}: {len(made.files)} files, {_gb(made.size)}: "
                  f"{'well' if not problems else 'not well'}")  # fmt: skip
            bad += _tell(problems)
    return DAMAGED if bad else 0


def _list(store: Store, args: argparse.Namespace) -> int:
    from penstock.operate.models.store import as_json

    models = [as_json(model) for model in store.models()]
    if args.json:
        print(json.dumps({"store": str(store.root), "models": models}, indent=1))
        return 0
    if not models:
        print(f"{store.root} has no models.")
    for each in models:
        print(f"{each['name']}  {_gb(each['bytes_on_disk'])} on disk")
        for version in each["versions"]:
            marks = [
                "current" if version["version"] == each["current"] else "",
                "pinned" if version["version"] in each["pins"] else "",
            ]
            of = version["source"] + (f"@{version['revision'][:12]}" if version["revision"] else "")
            print(
                f"  {version['version']}  {_gb(version['bytes']):>10}  {version['created']}  {of}  "
                f"{' '.join(filter(None, marks))}".rstrip()
            )
        for snapshot in each["snapshots"]:
            print(f"  {snapshot['name']}  snapshot of {snapshot['version']}")
        if each["partial"]:
            print("  (a pull of it did not come to its end; the same command goes on)")
    return 0


def _prune(store: Store, args: argparse.Namespace) -> int:
    if args.keep < 0:
        raise InvalidRequest(f"--keep is {args.keep}; it must be 0 or more.", param="--keep")
    for model in store.models() if args.name is None else [store.existing(args.name)]:
        with model.alone(_say):
            before = model.bytes_on_disk()
            gone = model.prune(args.keep, dry_run=args.dry_run)
            freed = before - model.bytes_on_disk()
        for each in gone:
            print(f"{model.name}: {each}{' would go' if args.dry_run else ' removed'}")
        if gone and not args.dry_run:
            print(f"{model.name}: {_gb(freed)} are free again")
    return 0


def _pin(store: Store, args: argparse.Namespace) -> int:
    model = store.existing(args.name)
    with model.alone(_say):
        version = model.pin(args.version, on=args.models_command == "pin")
    _say(f"{model.name} {version} is {'pinned' if args.models_command == 'pin' else 'not pinned any more'}")
    return 0


def _path(store: Store, args: argparse.Namespace) -> int:
    model = store.existing(args.name)
    folder = model.version(args.version)[0] if args.version else model.current
    if folder is None:
        raise StartupError(f"Nothing is current of {model.name}.", advice="`penstock models rollback --to`.")
    print(folder)
    return 0


_COMMANDS: dict[str, Callable[[Store, argparse.Namespace], int]] = {
    "pull": _pull,
    "snapshot": _snapshot,
    "rollback": _rollback,
    "verify": _verify,
    "list": _list,
    "prune": _prune,
    "pin": _pin,
    "unpin": _pin,
    "path": _path,
}


def _tell(problems: list[str]) -> int:
    for each in problems[:20]:
        print(f"  {each}")
    if len(problems) > 20:
        print(f"  and {len(problems) - 20} more")
    return len(problems)


def _shown(manifest: Manifest) -> str:
    return f"{manifest.version}: {len(manifest.files)} files, {_gb(manifest.size)}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 10**8 else f"{size / 1e9:.5f} GB"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name).lstrip("._-") or "model"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
