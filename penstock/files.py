"""How files of a model's folder are read: regular files only, of a bounded size, and not from elsewhere.

A model's folder is somebody else's work. What is in it may be a pipe that nobody writes to, a link to the
operator's keys, a file of a terabyte, or JSON that is nested a million times: each is refused here, by name,
before anything is read, parsed or allocated for it.

    folder/config.json                                   itself
    folder/config.json → ..data/config.json              a link that stays inside the folder
    snapshots/<revision>/config.json → ../../blobs/<id>  the cache of the Hugging Face hub
    folder/config.json → /etc/passwd                     refused

It knows the file system, and no format but JSON. Standard library only.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError

#: Most bytes of a configuration. That of a tokenizer lists its added tokens, which makes a megabyte or two.
CONFIG_BYTES = 16 << 20
#: Most bytes of an index of weights: the largest that are published, of 100,000 tensors, have 10 MB.
INDEX_BYTES = 64 << 20
#: Most bytes of a tokenizer.json: vocabularies of 262,144 pieces with their merges take 35 MB.
TOKENIZER_BYTES = 128 << 20
#: Most bytes of a chat template; the longest that are published have 30 kB.
TEMPLATE_BYTES = 1 << 20

_LINE = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 60
_SHORT.maxlevel = 3

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def exists(path: Path) -> bool:
    """Whether something has this name, be it a link that leads nowhere: then reading says so.

    Raises ModelLoadError where the system does not tell (no permission, a name that is too long).
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return True


def check(path: Path, limit: int | None = None, *, root: Path | None = None) -> int:
    """Size in bytes of a regular file of a model's folder.

    Args:
        limit: most bytes that it may have.
        root: the model's folder, where that is not the file's own.

    Raises:
        ModelLoadError: it is not there, is no regular file, lies outside of the folder, cannot be looked at,
            or is larger than the limit.
    """
    root = root or path.parent
    try:
        status = os.stat(path)
        if os.path.islink(path) or root != path.parent:
            _check_inside(path, root)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise ModelLoadError(f"{shown(path)} is {kind}, not a file.", advice="Download the model again.")
    if limit is not None and status.st_size > limit:
        raise ModelLoadError(
            f"{shown(path)} has {status.st_size:,} bytes; a file of this name has {limit:,} at most.",
            advice="Download the model again, or name another one.",
        )
    return status.st_size


def read_bytes(path: Path, limit: int, *, root: Path | None = None) -> bytes:
    """All of a file, which `check` finds in order. Raises ModelLoadError."""
    check(path, limit, root=root)
    try:
        # if it has become a pipe meanwhile, opening it must not wait for a writer
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if content is None or len(content) > limit:
        raise ModelLoadError(f"{shown(path)} changes while it is read.")
    return content


def read_text(path: Path, limit: int, *, root: Path | None = None) -> str:
    """The same, as text in UTF-8."""
    try:
        return read_bytes(path, limit, root=root).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelLoadError(
            f"{shown(path)} cannot be read: it is not valid JSON or text in UTF-8 ({error})."
        ) from error


def read_json(path: Path, limit: int = CONFIG_BYTES, *, root: Path | None = None) -> dict[str, Any]:
    """A JSON object. Raises ModelLoadError, also for one that is nested too deeply to be read."""
    value = _parsed(path, limit, root)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{shown(path)} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_json_list(path: Path) -> list[Any]:
    """A JSON array, likewise."""
    value = _parsed(path, CONFIG_BYTES, None)
    if not isinstance(value, list):
        raise ModelLoadError(f"{shown(path)} must hold a JSON array, not a {type(value).__name__}.")
    return value


def _parsed(path: Path, limit: int, root: Path | None) -> Any:
    text = read_text(path, limit, root=root)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is no text that anybody could encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ModelLoadError(f"{shown(path)} is nested too deeply.") from None
    except ValueError as error:  # malformed, no text, or an integer of thousands of digits
        raise ModelLoadError(f"{shown(path)} is not valid JSON: {error}.") from error
    return value


def shown(value: object) -> str:
    """A path or a value as an error quotes it: a line at most, whatever a file of somebody else's holds."""
    text = str(value) if isinstance(value, Path) else _SHORT.repr(value)
    text = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    return text if len(text) <= _LINE else f"{text[: _LINE // 2]}…{text[-_LINE // 2 :]}"


def unreadable(path: Path, error: Exception) -> ModelLoadError:
    """What to say where the system refuses a path."""
    if isinstance(error, FileNotFoundError):
        dangling = os.path.islink(path)
        what = (
            f"is a link to {shown(Path(os.readlink(path)))}, which is not there"
            if dangling
            else "does not exist"
        )
        return ModelLoadError(
            f"{shown(path)} {what}.", advice="A model directory holds config.json and *.safetensors files."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelLoadError(f"{shown(path)} cannot be read: {reason}.")


def _check_inside(path: Path, root: Path) -> None:
    """Raises ModelLoadError for a file that really is elsewhere, or FileNotFoundError and its like."""
    real, folder = path.resolve(strict=True), root.resolve(strict=True)
    allowed = [folder, *hub_caches()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelLoadError(
            f"{shown(path)} is a link that leaves the model's folder.",
            advice="Copy the file into the folder if you trust it; a model must not read other files.",
        )


def hub_caches() -> list[Path]:
    """Where the Hugging Face hub keeps files, as far as it is known: its folders are full of links."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return [Path(named).resolve()]
    home = os.environ.get("HF_HOME")
    if not home:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # stays "~" without a home
        home = os.path.join(cache, "huggingface")
    return [Path(home, "hub").resolve()] if os.path.isabs(home) else []
