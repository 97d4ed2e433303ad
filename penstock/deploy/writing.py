"""Files into a folder: all of them or none, and never over what somebody else has written.

    texts ─▶ what is there? (a list of what was made, with digests) ─▶ beside, whole ─▶ renamed into place

`.penstock-compile.json` is that list. A file that is not in it, or that has been changed since, is
somebody's: it is named, and nothing is written. What an earlier time made, and this one does not, goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.errors import StartupError

LIST = ".penstock-compile.json"
"""Name of the list."""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Applied:
    """What a cluster may have of a folder's files: files go, objects stay until somebody deletes them."""

    objects: tuple[tuple[str, str, str], ...] = ()
    """(namespace, kind, name)."""
    claimed: int = 0
    """Bytes of the claim for weights."""


def earlier(folder: Path) -> Applied:
    """What the list of an earlier time says of it. Raises StartupError for a list that is damaged."""
    found = _list(folder).get("applied", {})
    try:
        named = ((str(space), str(kind), str(name)) for space, kind, name in found.get("objects", ()))
        return Applied(tuple(named), int(found.get("claimed", 0)))
    except (ValueError, TypeError, AttributeError):
        raise _damaged(folder) from None


def write(
    folder: Path,
    texts: Mapping[str, str],
    kept: frozenset[str] = frozenset(),
    applied: Applied | None = None,
) -> list[str]:
    """Write; returns the paths that are new or other than before.

    Args:
        texts: path in the folder → text.
        kept: paths that are written if they are not there, and not touched if they are.
        applied: for the list, and the next time.

    Raises StartupError: the folder has files of somebody's, or cannot be written. Nothing is changed then.
    """
    try:
        return _write(folder, texts, kept, applied or Applied())
    except OSError as error:
        raise StartupError(f"{folder} cannot be written: {error.strerror or error}.", param="-o") from error


def _write(folder: Path, texts: Mapping[str, str], kept: frozenset[str], applied: Applied) -> list[str]:
    if folder.exists() and not folder.is_dir():
        raise StartupError(f"{folder} is no folder.", param="-o", advice="Name another one.")
    made = _made(folder)
    _refuse_foreign(folder, texts, kept, made)
    wanted = {name: text for name, text in texts.items() if name not in kept or not (folder / name).exists()}
    changed = [name for name, text in wanted.items() if made.get(name) != _digest(text.encode())]
    listed = {name: _digest(text.encode()) for name, text in texts.items() if name not in kept}
    entries = {"version": _VERSION, "files": listed}
    if applied.objects:
        entries["applied"] = {"objects": sorted(applied.objects), "claimed": applied.claimed}
    wanted[LIST] = json.dumps(entries, indent=1, sort_keys=True) + "\n"
    stale = [name for name in made if name not in texts and (folder / name).is_file()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _fill(beside, wanted)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
        if not folder.exists():
            beside.chmod(0o755)
            beside.rename(folder)
        else:
            _exchange(beside, folder, list(wanted), stale)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sorted(changed)


def _made(folder: Path) -> dict[str, str]:
    """Path → digest of what an earlier time has made there."""
    try:
        files = {str(name): str(digest) for name, digest in _list(folder).get("files", {}).items()}
    except (TypeError, AttributeError):
        raise _damaged(folder) from None
    # a list that somebody has written by hand leads nowhere else
    return {name: digest for name, digest in files.items() if _inside(name)}


def _list(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        raise _damaged(folder) from None
    if not isinstance(found, dict) or "files" not in found:
        raise _damaged(folder)
    return found


def _damaged(folder: Path) -> StartupError:
    return StartupError(
        f"{folder / LIST} is damaged, so nobody knows which files are whose.",
        param="-o",
        advice="Name another folder, or move this one away.",
    )


def _inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in Path(name).parts and name != LIST


def _refuse_foreign(
    folder: Path, texts: Mapping[str, str], kept: frozenset[str], made: Mapping[str, str]
) -> None:
    foreign = []
    for name in sorted({*texts, *made} - kept):
        path = folder / name
        ours = path.is_file() and not path.is_symlink() and made.get(name) == _digest(path.read_bytes())
        if (path.exists() or path.is_symlink()) and not ours:
            foreign.append(name)
    if foreign:
        what = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise StartupError(
            f"{folder} has files that `penstock compile` did not make, or that were changed since: {what}.",
            param="-o",
            advice="Name another folder, or move them away. Nothing was written.",
        )


def _fill(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _exchange(beside: Path, folder: Path, names: list[str], stale: list[str]) -> None:
    """Rename each into place; what was there is kept until all are, and put back if one fails."""
    old = beside / ".old"
    done: list[str] = []
    try:
        for name in (*stale, *names):
            target, before = folder / name, old / name
            if target.exists():
                before.parent.mkdir(parents=True, exist_ok=True)
                os.replace(target, before)
            done.append(name)
            if name in names:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(beside / name, target)
    except OSError:
        for name in reversed(done):
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
            if (old / name).exists():
                with contextlib.suppress(OSError):
                    os.replace(old / name, folder / name)
        raise
    for name in stale:
        _prune(folder, (folder / name).parent)


def _prune(folder: Path, path: Path) -> None:
    """Folders that are empty now."""
    while path != folder:
        try:
            path.rmdir()
        except OSError:
            return
        path = path.parent


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
