"""Files that are written whole or not at all: beside, and then moved to their place.

A pipe or a device is written to as it is, a link stays one, and its file is the one that is replaced.
"""

from __future__ import annotations

import os
from pathlib import Path

from penstock.core.errors import StartupError


def replace(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Put a content in a file's place in one step. Raises OSError; what stood there stays then.

    Args:
        durable: whether it is on the disk before it is in its place.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    place = path.resolve() if path.is_symlink() else path
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, *, durable: bool = False, param: str | None = None) -> None:
    """The same of a text (UTF-8; what cannot be encoded is escaped). Raises StartupError; `param` is the flag
    that named the file."""
    text = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        replace(path, text, durable=durable)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror or error}.", param=param) from error
