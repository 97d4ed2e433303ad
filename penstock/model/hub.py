"""From a model's name to a directory on this machine.

    "demo"                     the model that comes with the package
    "./my-model", "/models/x"  a local directory
    "Qwen/Qwen3-0.6B"          a Hugging Face id: downloaded once, then found in its cache

Imports no torch, and huggingface_hub only when it is needed: start-up time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from penstock import assets
from penstock.core.errors import ModelLoadError
from penstock.files import exists, shown
from penstock.observe import logs

_DEMO = ("demo", "penstock/demo")
#: What serving needs: weights, configurations, tokenizer, chat template.
WANTED = ["*.safetensors", "*.json", "*.jinja", "sparse_linear.pt", "colbert_linear.pt"]
UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(name: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local directory of a model.

    Args:
        name: "demo", a directory, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
        download_dir: where downloads are kept, laid out as the Hugging Face cache; None is that cache.

    Raises:
        ModelLoadError: nothing of that name is there, the repository is gated, or it is not cached and this
            machine is offline; the message says which.
    """
    if name in _DEMO:
        directory = Path(str(assets.__file__)).parent / "demo"
        if not (directory / "config.json").exists():
            raise ModelLoadError(
                f"The bundled demo model is not in this installation ({directory}).",
                advice="Install penstock again, or name another model.",
            )
        return _local(directory, revision, name)
    path = _path(name)
    if path is not None and exists(path):
        if not path.is_dir():
            raise ModelLoadError(
                f"{shown(path)} is a file; a model is a directory with config.json and *.safetensors files.",
                advice=f"Name its directory: {shown(path.parent)}.",
            )
        current = path / "current"  # of a model in a store (`penstock models`)
        if not exists(path / "config.json") and current.is_symlink() and exists(current / "config.json"):
            path = current.resolve()  # what is current now, also while it is being loaded
        return _local(path, revision, name)
    if not _HUB_ID.fullmatch(name):
        raise ModelLoadError(
            f"{shown(name)} does not exist.",
            advice="Give a local directory, a Hugging Face id (owner/name), or 'demo'.",
        )
    return _download(name, revision, download_dir)


def _local(directory: Path, revision: str | None, name: str) -> Path:
    if revision is not None:
        raise ModelLoadError(
            f"--revision {revision} cannot apply to the local model {name}.",
            param="--revision",
            advice="It selects a revision of a Hugging Face id.",
        )
    return directory


def _download(name: str, revision: str | None, download_dir: str | None) -> Path:
    if logs.in_json():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read as it is imported
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ModelLoadError(
            f"{name} is not a local directory, and downloading it needs huggingface-hub.",
            advice='Install it with: pip install "penstock[engine]".',
        ) from error
    logs.adopt()  # the hub's loggers have handlers, and a format, of their own
    where = f"{name}@{revision}" if revision else name
    try:
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=Path(download_dir).expanduser() if download_dir else None,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{where} is a gated repository.",
            advice=f"Accept its terms at https://huggingface.co/{name}, then set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(
            f"{name} has no revision {revision!r} on Hugging Face.",
            param="--revision",
            advice="Check the branch, tag or commit.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{name} is neither a local directory nor a repository on Hugging Face that you may read.",
            advice="Check the spelling; for a private repository set HF_TOKEN.",
        ) from error
    except errors.HFValidationError as error:
        raise ModelLoadError(
            f"{name} is neither a local directory nor a valid Hugging Face id.", advice="An id is owner/name."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelLoadError(
            f"{where} is not in the local Hugging Face cache, and the hub cannot be reached.",
            advice="Check the network and HF_HUB_OFFLINE, or give a local directory.",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"Downloading {where} failed: {error}.") from error
    return Path(path)


def is_local(name: str) -> bool:
    """Whether `resolve_model` would find it without asking the hub. Raises ModelLoadError, as it does."""
    path = _path(name)
    return name in _DEMO or (path is not None and exists(path))


def _path(name: str) -> Path | None:
    """The path that a name may mean; without a home directory, "~" stays as it is."""
    return Path(os.path.expanduser(name)) if name else None
