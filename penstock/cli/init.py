"""`penstock init`: a commented penstock.yaml that `penstock up` runs as it is."""

from __future__ import annotations

import argparse
import os
from importlib import resources
from pathlib import Path

from penstock.core.errors import StartupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where it is written."""
    parser.add_argument("file", nargs="?", default="penstock.yaml", help="default: penstock.yaml")


def run(args: argparse.Namespace) -> int:
    """Write the example; never over a file that is there."""
    path = Path(args.file)
    try:
        # exclusively: not over a file that somebody writes at this moment, nor through a link
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise StartupError(
            f"{path} is there already.", advice="Name another file, or move that one away."
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartupError(f"{path} cannot be written: {reason}.") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(example())
    print(f"{path} is written. `penstock up {path}` starts what is in it.")
    return 0


def example() -> str:
    """The text of the example."""
    return resources.files("penstock.spec").joinpath("example.yaml").read_text(encoding="utf-8")
