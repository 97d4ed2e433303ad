"""`penstock keys`: who may ask. A secret is printed once, when it is made."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, get_args

import msgspec
from pydantic import ValidationError

from penstock.cli.values import duration
from penstock.core.errors import InvalidRequest
from penstock.gateway.ledger.keys import Key, KeyStore, check_names, expiry
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.tags import read_tags
from penstock.spec.model import Limits
from penstock.spec.parts import ServiceClass

from . import ledger_at

_UNSET: dict[str, Any] = {
    "team": "",
    "tags": {},
    "routes": None,
    "limits": None,
    "local-only": False,
    "service-class": "realtime",
    "expires": None,
}
"""What a key has none of → as it is stored then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add create, update, list, rotate and revoke."""
    commands = parser.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    create = commands.add_parser("create", help="make a key and print its secret, once")
    create.add_argument("name", nargs="?", default="", help="what to call it")
    update = commands.add_parser(
        "update", help="change what a key may, and nothing that is not named here; its secret stays"
    )
    update.add_argument("id")
    update.add_argument("--name", default=argparse.SUPPRESS, help="what to call it")
    for command in (create, update):
        _add_what(command)
    update.add_argument(
        "--unset",
        action="append",
        default=[],
        choices=_UNSET,
        help="what it shall have none of: no limits or no routes of its own, no end",
    )
    rotate = commands.add_parser("rotate", help="give a key a new secret")
    rotate.add_argument("id")
    rotate.add_argument(
        "--grace", default="0", metavar="TIME", help="how long the old one works, as 1h (default: 0)"
    )
    revoke = commands.add_parser("revoke", help="let a key be refused, within two seconds")
    revoke.add_argument("id")
    listed = commands.add_parser("list", help="show all keys, without their secrets")
    listed.add_argument("--json", action="store_true", help="as JSON")
    for command in (create, update, rotate, revoke, listed):
        ledger_at.add_arguments(command)


def _add_what(parser: argparse.ArgumentParser) -> None:
    """What a key may. What is not given is not there."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--team", help="who pays for it, as in the spec")
    add("--tag", action="append", metavar="TAG=VALUE", help="a tag of all its requests, as feature=search")
    add("--route", action="append", metavar="NAME", help="a route that it may use (default: all)")
    add("--local-only", action="store_true", help="its requests never leave the house")
    add("--service-class", choices=get_args(ServiceClass), help="whether somebody waits for its answers")
    add("--expires", metavar="TIME", help="30d, 12h, or a date as 2027-01-31")
    limits = parser.add_argument_group("limits of its own, all together in place of its team's key_limits")
    for name in Limits.model_fields:
        limits.add_argument("--" + name.replace("_", "-"), metavar="N", default=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Do it; 0 if it was done."""
    if args.keys_command == "create":
        values = _values(args)  # before anything is opened
        _check(args, values)
        store = KeyStore(ledger_at.open_store(args, create=True))
        _show_secret(*store.create(**values))
        return 0
    if args.keys_command == "update":
        values = _values(args) | {name.replace("-", "_"): _UNSET[name] for name in args.unset}
        if not values:
            raise InvalidRequest(
                "Nothing is to be changed.", advice="`penstock keys update --help` says what."
            )
        _check(args, values)
        key = KeyStore(ledger_at.open_store(args)).update(args.id, values)
        print(f"{key.id} is changed: {', '.join(sorted(values))}.", file=sys.stderr)
        return 0
    store = KeyStore(ledger_at.open_store(args))
    if args.keys_command == "list":
        _list(store.list(), as_json=args.json)
    elif args.keys_command == "revoke":
        key = store.revoke(args.id)
        print(f"{key.id} is revoked.", file=sys.stderr)
    else:
        _show_secret(*store.rotate(args.id, grace=duration(args.grace, "--grace")))
    return 0


def _check(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Whether its team and its routes are in the spec; with --ledger there is none to look into."""
    spec = ledger_at.spec_of(args)
    if spec is not None:
        check_names(spec, values.get("team", ""), values.get("routes") or ())


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, by the names of KeyStore.create."""
    given = vars(args)
    values: dict[str, Any] = {
        name: given[name] for name in ("name", "team", "local_only", "service_class") if name in given
    }
    if "tag" in given:
        values["tags"] = read_tags(args.tag, "--tag")
    if "route" in given:
        values["routes"] = args.route
    if "expires" in given:
        values["expires"] = _moment(args.expires)
    limits = {name: given[name] for name in Limits.model_fields if name in given}
    try:
        if limits:
            values["limits"] = Limits.model_validate(limits)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise InvalidRequest(f"{flag} {first['input']}: {first['msg']}.", param=flag) from None
    return values


def _moment(text: str) -> int:
    try:
        return expiry(text, time.time_ns())
    except ValueError as error:
        raise InvalidRequest(f"--expires {text}: {error}.", param="--expires") from None


def _show_secret(key: Key, secret: str) -> None:
    print(f"{key.id} {key.name}".rstrip() + "; the secret is shown this once:", file=sys.stderr)
    print(secret)


def _list(keys: list[Key], *, as_json: bool) -> None:
    now = time.time_ns()
    if as_json:
        rows = [{**msgspec.to_builtins(key), "state": key.state(now)} for key in keys]
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "team", "tags", "routes", "secret", "created", "state", box=None)
    for key in keys:
        tags = " ".join(f"{name}={value}" for name, value in sorted(key.tags.items()))
        routes = "all" if key.routes is None else " ".join(key.routes)
        day = datetime.fromtimestamp(key.created / NANO, UTC).strftime("%Y-%m-%d")
        table.add_row(key.id, key.name, key.team, tags, routes, f"…{key.hint}", day, key.state(now))
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 140)
    console.print(table)
