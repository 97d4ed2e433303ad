"""Which ledger `penstock keys` and `penstock ledger` mean: `--ledger URL`, or the one of a spec."""

from __future__ import annotations

import argparse
from pathlib import Path

from penstock.core.errors import StartupError
from penstock.gateway.ledger.store import Store
from penstock.spec import load
from penstock.spec.model import Spec

DEFAULT = Path("penstock.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--spec` and `--ledger`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--spec", type=Path, metavar="FILE", help=f"whose ledger it is (default: {DEFAULT})")
    where.add_argument("--ledger", metavar="URL", help="sqlite:///FILE or postgresql://USER@HOST/DATABASE")


def spec_of(args: argparse.Namespace) -> Spec | None:
    """The spec that is meant; None where the ledger is named. Raises StartupError, SpecError."""
    if args.ledger is not None:
        return None
    if args.spec is None and not DEFAULT.exists():
        raise StartupError(f"There is no {DEFAULT} here.", advice="Say --spec FILE or --ledger URL.")
    return load(args.spec or DEFAULT)


def open_store(args: argparse.Namespace, *, create: bool = False) -> Store:
    """The ledger's database, with its tables. Raises StartupError, SpecError.

    `create` makes a SQLite file that is not there yet: reading one that does not exist is a mistake.
    """
    spec = spec_of(args)
    store = Store(args.ledger if spec is None else spec.ledger.url)
    file = store.engine.url.database
    if not create and store.engine.dialect.name == "sqlite" and not Path(str(file)).exists():
        raise StartupError(
            f"There is no ledger {file} yet.", advice="A gateway or `penstock keys create` makes it."
        )
    store.open()
    return store
