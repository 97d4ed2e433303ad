"""`penstock schema`: the JSON Schema of penstock.yaml, for editors."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from penstock.spec.schema import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0
