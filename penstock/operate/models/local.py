"""From a folder of this machine: copied, hashed on the way, and there as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from penstock.core.errors import StartupError

from . import manifest as manifests
from .manifest import File, Manifest, Tick
from .store import StoredModel, make_room, remove, unwritable

_PIECE = 1 << 22


def fetch(model: StoredModel, source: Path, created: str, tick: Tick | None = None) -> Manifest:
    """Copy a folder into the store as a version, under the model's lock. Its manifest.

    Files that the store has already, by their sha256, are linked to. Raises StartupError: it is no folder of
    a model, a link leaves it, it changes meanwhile, or there is no room.
    """
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise StartupError(f"{source} {what}; a model is a folder with config.json and *.safetensors files.")
    if not (source / "config.json").is_file():
        raise StartupError(f"{source} has no config.json.", advice="Name the folder that has it.")
    paths = manifests.files_in(source)
    sizes = {path: path.stat().st_size for path in paths}
    known = model.known()
    new = model.partial / "import"
    try:
        remove(new)
        new.mkdir(parents=True)
        # what is in the store already need not be copied: only files of a size that it has are hashed first
        stored = {path.stat().st_size for path in known.values() if path.exists()}
        same = {
            path: digest
            for path in paths
            if sizes[path] in stored and (digest := manifests.sha256(path)) in known
        }
        make_room(model, sum(size for path, size in sizes.items() if path not in same))
        files = []
        for path in paths:
            name = path.relative_to(source).as_posix()
            target = new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in same:
                os.link(known[same[path]], target)
                digest = same[path]
            else:
                digest = copy(path, target, tick)
            if target.stat().st_size != sizes[path]:
                raise StartupError(
                    f"{path} changes while it is copied.", advice="Pull again when it is still."
                )
            files.append(File(name, sizes[path], digest))
    except OSError as error:
        remove(new)
        raise unwritable(model.folder, error, sum(sizes.values())) from error
    except BaseException:
        remove(new)
        raise
    made = Manifest(
        version=manifests.version_of(files), source=str(source.resolve()), created=created, files=tuple(files)
    )
    model.admit(new, made)
    return made


def copy(source: Path, target: Path, tick: Tick | None = None) -> str:
    """Copy a file; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while piece := reader.read(_PIECE):
            digest.update(piece)
            written = 0
            while written < len(piece):
                written += writer.write(memoryview(piece)[written:])
            if tick is not None:
                tick(len(piece))
    return digest.hexdigest()
