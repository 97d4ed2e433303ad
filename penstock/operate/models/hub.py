"""From Hugging Face: what is there is asked for once, files come one by one and stay, and all are verified.

    listing (commit, sizes, checksums) ─▶ in the store already? a link
                                       ─▶ .partial/COMMIT/FILE.incomplete ─▶ .partial/COMMIT/FILE ─▶ verified
                                                                          ─▶ all of them: a version

A pull that is killed, or whose connection breaks, goes on where it was, to the byte. 429 and 5xx are waited
for, as long as the server asks for it, else 1, 2, 4, … 60 s. Files in large storage are compared with the
hub's sha256, the others with git's sha1 of them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from penstock import __version__
from penstock.core.errors import ModelLoadError, StartupError
from penstock.model.hub import UNWANTED, WANTED

from . import manifest as manifests
from .manifest import File, Manifest
from .store import Say, StoredModel, make_room, remove, unwritable

T = TypeVar("T")

_TRIES = 8
"""In a row without any progress; with the waits between them, over three minutes."""
_LONGEST_WAIT = 60.0
_PIECE = 1 << 22
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of the repository."""

    path: str
    size: int
    sha256: str | None
    """Of a file in large storage."""
    blob: str | None
    """Git's id: sha1 of `blob SIZE\\0` and the content."""


def fetch(
    model: StoredModel,
    id: str,
    revision: str | None,
    created: str,
    say: Say,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Manifest:
    """Bring a repository's files into the store as a version, under the model's lock. Its manifest.

    Raises StartupError: offline, gated, not there, damaged on the way, no room.
    """
    hub = _Hub(id, revision, say, sleep)
    commit, listed = hub.listing()
    for made in model.versions():
        place = model.folder / "versions" / made.version
        if (made.source, made.revision) == (id, commit) and not manifests.problems(
            place, made, sizes_only=True
        ):
            return made
    known = model.known()
    folder = model.partial / commit
    here = {each.path for each in listed if each.sha256 in known or (folder / each.path).exists()}
    needed = sum(each.size for each in listed if each.path not in here)
    if model.partial.is_dir():
        for path in model.partial.iterdir():  # of another commit, which nobody will go on with
            if path != folder:
                remove(path)
    begun = sum(path.stat().st_size for path in folder.rglob("*.incomplete")) if folder.is_dir() else 0
    make_room(model, max(0, needed - begun))
    if folder.is_dir():
        say(f"going on with what came before: {needed - begun:,} bytes of {needed:,} are left")
    files = []
    try:
        for each in listed:
            target = folder / each.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() and each.sha256 is not None and each.sha256 in known:
                os.link(known[each.sha256], target)
            if not target.exists():
                say(f"{each.path} ({each.size / 1e9:.2f} GB)")
                hub.download(each, commit, target)
            files.append(File(each.path, each.size, _verified(each, target)))
    except OSError as error:
        raise unwritable(model.folder, error, needed) from error
    made = Manifest(
        version=manifests.version_of(files), source=id, revision=commit, created=created, files=tuple(files)
    )
    model.admit(folder, made)
    return made


class _Hub:
    """One repository."""

    def __init__(self, id: str, revision: str | None, say: Say, sleep: Callable[[float], None]) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants
        except ImportError as error:
            raise ModelLoadError(
                f"{id} is not a local folder, and downloading it needs huggingface-hub.",
                advice='Install it with: pip install "penstock[engine]".',
            ) from error
        self._hub = huggingface_hub
        self._id, self._revision, self._say, self._sleep = id, revision, say, sleep
        asked = getattr(constants, "is_offline_mode", None)  # of late
        if asked() if asked is not None else constants.HF_HUB_OFFLINE:
            raise StartupError(
                f"{id} cannot be pulled: HF_HUB_OFFLINE is set.",
                advice="Unset it, or pull from a folder: penstock models pull FOLDER NAME.",
            )

    def listing(self) -> tuple[str, list[Listed]]:
        """The commit, and the files that serving needs."""
        info = self._patiently(
            lambda: self._hub.HfApi().model_info(self._id, revision=self._revision, files_metadata=True),
            lambda: 0,
        )
        siblings: Sequence[Any] = info.siblings or []
        listed = [
            Listed(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in siblings
            if any(fnmatch(each.rfilename, pattern) for pattern in WANTED)
            and not any(fnmatch(each.rfilename, pattern) for pattern in UNWANTED)
            and not any(part.startswith(".") and part != ".." for part in each.rfilename.split("/"))
        ]
        if not any(each.path.endswith(".safetensors") for each in listed):
            raise StartupError(
                f"{self._id} has no *.safetensors files.", advice="Name a repository that has them."
            )
        if any(".." in Path(each.path).parts or Path(each.path).is_absolute() for each in listed):
            raise StartupError(f"{self._id} lists files outside of its folder, and was not pulled.")
        if not re.fullmatch(r"[0-9a-f]{7,64}", str(info.sha)):  # it becomes the name of a folder
            raise StartupError(f"The hub names no commit of {self._id}, and it was not pulled.")
        return str(info.sha), listed

    def download(self, file: Listed, commit: str, target: Path) -> None:
        """One file, from where it was left."""
        from huggingface_hub.file_download import http_get

        token = self._hub.get_token()
        headers = {"user-agent": f"penstock/{__version__}"}
        headers |= {"authorization": f"Bearer {token}"} if token else {}
        url = self._hub.hf_hub_url(self._id, file.path, revision=commit)
        part = target.with_name(target.name + ".incomplete")

        def get() -> None:
            with open(part, "ab") as out:
                begun = out.tell()
                if begun < file.size or not begun:
                    http_get(
                        url,
                        out,
                        resume_size=begun,
                        headers=dict(headers),
                        expected_size=file.size,
                        displayed_filename=file.path,
                    )
                os.fsync(out.fileno())

        self._patiently(get, lambda: part.stat().st_size if part.exists() else 0)
        part.rename(target)

    def _patiently(self, work: Callable[[], T], progress: Callable[[], int]) -> T:
        """Do it until it is done; as often as there is progress, and `_TRIES` times without."""
        from huggingface_hub import errors

        tries, seen = 0, progress()
        while True:
            try:
                return work()
            except errors.GatedRepoError as error:
                raise StartupError(
                    f"{self._id} is a gated repository.",
                    advice=f"Accept its terms at https://huggingface.co/{self._id}, then set HF_TOKEN.",
                ) from error
            except errors.RevisionNotFoundError as error:
                raise StartupError(
                    f"{self._id} has no revision {self._revision!r} on Hugging Face.", param="--revision"
                ) from error
            except errors.RepositoryNotFoundError as error:
                raise StartupError(
                    f"{self._id} is neither a folder nor a repository on Hugging Face that you may read.",
                    advice="Check the spelling; for a private repository set HF_TOKEN.",
                ) from error
            except errors.HFValidationError as error:
                raise StartupError(
                    f"{self._id!r} is neither a local folder nor a Hugging Face id."
                ) from error
            except Exception as error:
                wait = self._wait(error, tries)
                if (now := progress()) > seen:
                    tries, seen = 0, now
                tries += 1
                if wait is None or tries >= _TRIES:
                    raise StartupError(
                        f"{self._id} could not be pulled: {_said(error)}.",
                        advice="The same command goes on where this one was. Without a way to the hub, copy "
                        "a folder here: penstock models pull FOLDER NAME.",
                    ) from error
                self._say(f"{_said(error)}; again in {wait:g} s")
                self._sleep(wait)

    def _wait(self, error: Exception, tries: int) -> float | None:
        """Seconds until it is worth another try; None where it is not. Raises OSError of the disk."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        wait = min(_LONGEST_WAIT, 2.0**tries)
        if status is not None:
            if status not in (408, 429) and status < 500:
                return None
            asked = str(response.headers.get("retry-after", "")) if response is not None else ""
            return min(float(asked), 600.0) if asked.isdigit() else wait
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise error
        return wait if _of_the_network(error) else None


def _of_the_network(error: Exception) -> bool:
    """httpx's errors have one base in each of its versions; Python's own are OSErrors."""
    names = {each.__name__ for each in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"}) or "Consistency check" in str(
        error
    )


def _said(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the hub answers {response.status_code}"
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"the hub cannot be reached ({text or type(error).__name__})"


def _verified(listed: Listed, path: Path) -> str:
    """The sha256 of a file that is what the hub has. Raises StartupError, and removes it, where it is not."""
    size = path.stat().st_size
    plain, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            plain.update(piece)
            if listed.sha256 is None:
                git.update(piece)
    right = plain.hexdigest() == listed.sha256 if listed.sha256 else git.hexdigest() == listed.blob
    if size != listed.size or not right:
        path.unlink()
        raise StartupError(
            f"{listed.path} was damaged on the way: it is not what the hub has a checksum of.",
            advice="The same command gets it again; what was current before still is.",
        )
    return plain.hexdigest()
