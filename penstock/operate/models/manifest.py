"""What a version consists of: every file with its size and sha256; and whether a folder is still that."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import StartupError

MANIFEST = ".penstock.json"
_PIECE = 1 << 22
_THREADS = 4
"""Files that are hashed at a time; a disk is what that waits for, more often than a processor."""

Tick = Callable[[int], None]
"""Is told how many bytes more are done."""


class File(msgspec.Struct, frozen=True, order=True):
    """One file."""

    path: str
    """Within the version, with slashes."""
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A version."""

    version: str
    """The beginning of a sha256 of what its files are: the same files, the same version."""
    source: str
    """The folder or the Hugging Face id that it came from."""
    revision: str | None = None
    """The commit, of a Hugging Face id."""
    created: str = ""
    """When it was pulled, ISO 8601."""
    files: tuple[File, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def version_of(files: Sequence[File]) -> str:
    """Twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.path}\0{file.size}\0{file.sha256}\n".encode())
    return digest.hexdigest()[:12]


def write(folder: Path, manifest: Manifest) -> None:
    """Put a manifest beside its files."""
    path = folder / MANIFEST
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    sync(path)


def read(folder: Path) -> Manifest:
    """Raises StartupError for a folder without one."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartupError(
            f"{folder} has no readable manifest ({error}).",
            advice="Pull the model again, or roll back to a version or snapshot that verifies.",
        ) from error


def files_in(folder: Path) -> list[Path]:
    """Regular files below a folder, hidden ones left out, in order. Raises StartupError for links that leave
    it, and for what is no file."""
    found = []
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        inside = path.resolve().is_relative_to(root) or _of_the_hub(root, path.resolve())
        if not path.is_file() or not inside:
            raise StartupError(
                f"{path} is {'a link that leaves the folder' if path.is_symlink() else 'no regular file'}.",
                advice="Put the file itself into the folder, or take the link out.",
            )
        found.append(path)
    return found


def _of_the_hub(root: Path, real: Path) -> bool:
    """The hub's cache has links: snapshots/COMMIT/FILE → ../../blobs/ID."""
    return root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")


def sha256(path: Path, tick: Tick | None = None) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if tick is not None:
                tick(len(piece))
    return digest.hexdigest()


def problems(
    folder: Path, manifest: Manifest, *, sizes_only: bool = False, tick: Tick | None = None
) -> list[str]:
    """What is not as the manifest has it: missing, of another size, damaged, or not in it."""

    def look(file: File) -> str | None:
        path = folder / file.path
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"{file.path} has {size:,} bytes, and had {file.size:,}"
            if not sizes_only and (found := sha256(path, tick)) != file.sha256:
                return f"{file.path} is damaged: its sha256 is {found[:12]}…, and was {file.sha256[:12]}…"
        except FileNotFoundError:
            return f"{file.path} is missing"
        except OSError as error:
            return f"{file.path} cannot be read: {error.strerror or error}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [problem for problem in pool.map(look, manifest.files) if problem is not None]
    known = {file.path for file in manifest.files}
    found += [f"{path} is not in the manifest" for path in _paths(folder) if path not in known]
    return found


def _paths(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name != MANIFEST:
            yield name


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_json(manifest: Manifest) -> dict[str, Any]:
    """Without its files."""
    found: dict[str, Any] = msgspec.to_builtins(manifest)
    return {**found, "files": len(manifest.files), "bytes": manifest.size}
