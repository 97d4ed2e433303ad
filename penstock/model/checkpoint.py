"""Which files hold a model's weights. Imports no torch: the API process looks, before the engine has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from penstock.core.errors import ModelLoadError
from penstock.files import INDEX_BYTES, check, exists, read_json, shown

#: Endings of weights in other formats.
_FOREIGN = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


def find_safetensors(directory: Path) -> tuple[Path, list[Path]]:
    """(the file that says what there is, all shards) of a model directory.

    Raises ModelLoadError when there are no weights, only weights in other formats, a shard is missing or no
    file, or the index names files outside of the directory.
    """
    index = directory / "model.safetensors.index.json"
    if exists(index):
        shards = read_json(index, INDEX_BYTES).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelLoadError(f"{shown(index)}: 'weight_map' is missing or empty.")
        files = [_shard(index, name) for name in _names(index, shards.values())]
        missing = [file for file in files if not exists(file)]
        if missing:
            raise ModelLoadError(
                f"{shown(missing[0])} is missing: {index.name} lists {len(files)} shards, {len(missing)} not "
                "there.",
                advice="Download the checkpoint again.",
            )
        for file in files:
            check(file, root=directory)
        return index, files
    single = directory / "model.safetensors"
    if exists(single):
        check(single)
        return single, [single]
    try:
        raise _no_weights(directory, [file.name for file in directory.iterdir()])
    except OSError as error:
        raise ModelLoadError(f"{shown(directory)} cannot be read: {error.strerror}.") from error


def _names(index: Path, values: Iterable[object]) -> list[str]:
    """The names of shards, each once, in order."""
    for value in values:
        if not isinstance(value, str):
            raise ModelLoadError(f"{shown(index)}: weight_map names {shown(value)}, which is no file name.")
    return sorted(set(cast(Iterable[str], values)))


def _shard(index: Path, name: str) -> Path:
    """A shard by the name that the index gives it, in the index's directory or below it."""
    parts = name.split("/")
    if not name.endswith(".safetensors") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ModelLoadError(
            f"{shown(index)}: weight_map names {shown(name)}, which is no *.safetensors file of this folder.",
            advice="Download the checkpoint again.",
        )
    return index.parent / name


def _no_weights(directory: Path, names: Sequence[str]) -> ModelLoadError:
    """What to say of a directory without weights that can be loaded."""
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return ModelLoadError(
            f"{shown(directory)} holds {', '.join(others[:3])} but neither model.safetensors nor "
            "model.safetensors.index.json.",
            advice="Download the checkpoint again, or restore its index.",
        )
    foreign = sorted(name for name in names if name.endswith(_FOREIGN) and name != "training_args.bin")
    if foreign:
        return ModelLoadError(
            f"{shown(directory)} has weights only as {', '.join(foreign[:3])}.",
            advice="Only safetensors are loaded: convert the checkpoint, or use a revision that has them.",
        )
    return ModelLoadError(f"{shown(directory)} has no weights: there is no *.safetensors file.")
