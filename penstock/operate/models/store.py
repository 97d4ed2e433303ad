"""The folder: models with their versions, snapshots and what is current.

Whatever appears under `versions`, `snapshots` or `current` got there by a rename, when all of it was on the
disk: a machine that stops, a disk that is full and a process that is killed leave what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from penstock import writing
from penstock.core.errors import InvalidRequest, StartupError

from . import manifest as manifests
from .manifest import Manifest

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SNAPSHOT = "%Y-%m-%dT%H-%M-%SZ"
_RESERVED = ("versions", "snapshots", "current")

Say = Callable[[str], None]


class Change(msgspec.Struct, frozen=True):
    """What became current."""

    at: str
    version: str
    why: str


class History(msgspec.Struct):
    """Of one model."""

    changes: list[Change] = []
    pins: list[str] = []
    """Versions that `prune` leaves alone."""


class Store:
    """One store. Nothing is made until something is pulled."""

    def __init__(self, root: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.root = root
        self.now = now

    def model(self, name: str) -> StoredModel:
        """By name, be it there or not. Raises InvalidRequest."""
        if not _NAME.fullmatch(name) or ".." in name or any(part in _RESERVED for part in name.split("/")):
            raise InvalidRequest(
                f"{name!r} is no name of a model in a store.",
                advice="A name is NAME or OWNER/NAME, of letters, digits, dots, dashes and underscores.",
            )
        return StoredModel(self, name)

    def existing(self, name: str) -> StoredModel:
        """Raises StartupError, which lists what there is."""
        model = self.model(name)
        if model.current is None and not model.versions():
            known = ", ".join(each.name for each in self.models()) or "nothing yet"
            raise StartupError(
                f"{self.root} has no model {name!r}: it has {known}.",
                advice=f"`penstock models pull {name}` gets it.",
            )
        return model

    def models(self) -> list[StoredModel]:
        """All of them, by name."""
        found = []
        for path in sorted(self.root.glob("*")):
            if (path / "versions").is_dir():
                found.append(StoredModel(self, path.name))
            elif path.is_dir():
                found += [
                    StoredModel(self, f"{path.name}/{each.name}")
                    for each in sorted(path.iterdir())
                    if (each / "versions").is_dir()
                ]
        return found


class StoredModel:
    """One model. Whatever changes it is done within `alone`."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._store = store
        self.folder = store.root / name

    # ---- what there is ----

    @property
    def current(self) -> Path | None:
        """The folder of the version that is served; None where there is none."""
        link = self.folder / "current"
        return link.resolve() if link.is_symlink() and link.resolve().is_dir() else None

    def versions(self) -> list[Manifest]:
        """Versions with a readable manifest, oldest first."""
        return sorted(_readable(self.folder / "versions"), key=lambda each: (each.created, each.version))

    def snapshots(self) -> dict[str, Manifest]:
        """Timestamp → what it is a snapshot of, oldest first."""
        folder = self.folder / "snapshots"
        found = {}
        for path in sorted(folder.glob("*")) if folder.is_dir() else []:
            with contextlib.suppress(StartupError):
                found[path.name] = manifests.read(path)
        return found

    def history(self) -> History:
        """What was current before. Raises StartupError for a file that cannot be read."""
        path = self.folder / "history.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=History)
        except FileNotFoundError:
            return History()
        except (OSError, msgspec.MsgspecError) as error:
            raise StartupError(f"{path} cannot be read: {error}.", advice="Move it away.") from error

    def version(self, wanted: str) -> tuple[Path, Manifest]:
        """A version or a snapshot, by the beginning of its name. Raises StartupError."""
        found = {
            path.name: path
            for path in (*self._glob("versions"), *self._glob("snapshots"))
            if path.name.startswith(wanted)
        }
        if len(found) != 1:
            names = ", ".join(path.name for path in (*self._glob("versions"), *self._glob("snapshots")))
            which = (
                f"{len(found)} versions of {self.name} begin with" if found else f"{self.name} has no version"
            )
            raise StartupError(f"{which} {wanted!r}.", advice=f"There are {names or 'none'}.")
        path = next(iter(found.values()))
        return path, manifests.read(path)

    def known(self) -> dict[str, Path]:
        """sha256 → a file of that content, in any version or snapshot."""
        found: dict[str, Path] = {}
        for path in (*self._glob("versions"), *self._glob("snapshots")):
            with contextlib.suppress(StartupError):
                found |= {file.sha256: path / file.path for file in manifests.read(path).files}
        return found

    def bytes_on_disk(self) -> int:
        """What all of it takes; hard links count once."""
        seen = set()
        total = 0
        for path in self.folder.rglob("*") if self.folder.is_dir() else ():
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_size
        return total

    @property
    def partial(self) -> Path:
        """Where what has not come whole yet is kept."""
        return self.folder / ".partial"

    # ---- changes ----

    @contextlib.contextmanager
    def alone(self, say: Say = lambda _: None, *, wait: bool = True) -> Iterator[None]:
        """Nobody else changes this model. Whoever comes second waits. Raises StartupError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
                if not wait:
                    raise StartupError(
                        f"{self.name} is being changed by {holder or 'another process'}."
                    ) from None
                say(f"waiting for {holder or 'another process'}, who is at {self.name}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def admit(self, folder: Path, manifest: Manifest) -> Path:
        """Make a version of a folder that is whole and verified; it is moved. The version's folder."""
        target = self.folder / "versions" / manifest.version
        if target.exists():
            shutil.rmtree(folder)
            return target
        for file in manifest.files:
            path = folder / file.path
            path.chmod(0o444)
            manifests.sync(path)
        manifests.write(folder, manifest)
        (folder / manifests.MANIFEST).chmod(0o444)
        for each in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            manifests.sync(each)
            each.chmod(0o555)
        manifests.sync(folder)
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
        target.chmod(0o555)
        manifests.sync(target.parent)
        return target

    def switch(self, version: str, why: str) -> None:
        """Make a version current, in one step."""
        link, new = self.folder / "current", self.folder / ".current"
        new.unlink(missing_ok=True)
        new.symlink_to(Path("versions") / version)
        new.replace(link)
        history = self.history()
        history.changes.append(Change(self._store.now().isoformat(timespec="seconds"), version, why))
        self._write(history)
        manifests.sync(self.folder)

    def snapshot(self) -> str:
        """Hard links to what is current, under the time. Returns the snapshot's name. Raises StartupError."""
        current = self.current
        if current is None:
            raise StartupError(f"Nothing is current of {self.name}.", advice="`penstock models pull` first.")
        name = self._store.now().strftime(_SNAPSHOT)
        target, new = self.folder / "snapshots" / name, self.folder / ".snapshot"
        if target.exists():
            return name
        remove(new)
        try:
            link_tree(current, new)
            target.parent.mkdir(exist_ok=True)
            new.rename(target)
        except OSError as error:
            remove(new)
            raise unwritable(target, error) from error
        manifests.sync(target.parent)
        return name

    def rollback(self, wanted: str | None = None, *, verify: bool = True) -> tuple[str, str]:
        """Make current what was so before, or a version or snapshot that is named.

        Returns (from, to). Raises StartupError where there is nothing to go back to, or it is damaged.
        """
        current = self.current
        now = "" if current is None else current.name
        if wanted is None:
            earlier = [each.version for each in self.history().changes if each.version != now]
            usable = {each.version for each in self.versions()}
            wanted = next((each for each in reversed(earlier) if each in usable), None)
            if wanted is None:
                raise StartupError(
                    f"There is no earlier version of {self.name} to go back to.",
                    advice="`penstock models list` shows snapshots; name one with --to.",
                )
        path, manifest = self.version(wanted)
        if verify and (bad := manifests.problems(path, manifest)):
            raise StartupError(
                f"{path.name} of {self.name} is damaged, and was not made current: {bad[0]}.",
                advice="`penstock models verify` shows all of it; go back to another one with --to.",
            )
        if not (self.folder / "versions" / manifest.version).is_dir():  # pruned, or removed by hand
            new = self.partial / f"restore-{manifest.version}"
            remove(new)
            link_tree(path, new)
            (self.folder / "versions").mkdir(exist_ok=True)
            new.rename(self.folder / "versions" / manifest.version)
        self.switch(manifest.version, f"rollback from {now or 'nothing'}")
        return now, manifest.version

    def pin(self, wanted: str, *, on: bool) -> str:
        """Keep a version whatever `prune` does, or no more. Returns it."""
        _, manifest = self.version(wanted)
        history = self.history()
        pins = set(history.pins) - {manifest.version} | ({manifest.version} if on else set())
        history.pins = sorted(pins)
        self._write(history)
        return manifest.version

    def prune(self, keep: int, *, dry_run: bool = False) -> list[str]:
        """Remove versions and snapshots but the newest `keep` of each, what is current and what is pinned;
        and what has not come whole. Returns what was removed."""
        current = self.current
        safe = set(self.history().pins) | ({current.name} if current else set())
        versions = [each.version for each in self.versions()]
        gone = [f"versions/{each}" for each in versions[: -keep or None] if each not in safe]
        snapshots = [
            name for name, made in self.snapshots().items() if made.version not in self.history().pins
        ]
        gone += [f"snapshots/{each}" for each in snapshots[: -keep or None]]
        gone += [".partial"] if self.partial.is_dir() and any(self.partial.iterdir()) else []
        if not dry_run:
            for each in gone:
                remove(self.folder / each)
        return gone

    def _write(self, history: History) -> None:
        content = msgspec.json.format(msgspec.json.encode(history), indent=1) + b"\n"
        writing.replace(self.folder / "history.json", content, durable=True)

    def _glob(self, kind: str) -> list[Path]:
        folder = self.folder / kind
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def link_tree(source: Path, target: Path) -> None:
    """What `cp -al` does: folders anew, files as hard links."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        new = target / path.relative_to(source)
        if path.is_dir():
            new.mkdir()
        else:
            os.link(path, new)
    for each in sorted((path for path in target.rglob("*") if path.is_dir()), reverse=True):
        each.chmod(0o555)
    # its own mode stays, so that it can be renamed


def remove(path: Path) -> None:
    """A folder, read-only or not, or nothing."""
    if not path.exists():
        return
    for each in (path, *path.rglob("*")):
        if each.is_dir() and not each.is_symlink():
            each.chmod(0o755)
    shutil.rmtree(path)


def unwritable(path: Path, error: OSError, needed: int | None = None) -> StartupError:
    """What to say where the disk refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path)
        wants = f"; {needed / 1e9:,.1f} GB are needed" if needed else ""
        return StartupError(
            f"The disk of {path} is full: {free / 1e9:,.1f} GB are free{wants}.",
            advice="`penstock models prune` removes old versions. What was current before still is.",
        )
    if error.errno == errno.EROFS:
        return StartupError(
            f"{path} is on a read-only file system.",
            advice="Change the store where it is mounted for writing; serving needs no more than reading.",
        )
    return StartupError(f"{path} cannot be written: {error.strerror or error}.")


def free_bytes(path: Path) -> int:
    """On the disk that a path is or would be on."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def make_room(model: StoredModel, needed: int) -> None:
    """Raises StartupError where so many bytes more do not fit."""
    free = free_bytes(model.folder)
    if needed > free:
        raise StartupError(
            f"{model.name} needs {needed / 1e9:,.1f} GB more, and the disk of {model.folder} has "
            f"{free / 1e9:,.1f} GB free.",
            advice="`penstock models prune` removes old versions; or name a store on another disk (--store).",
        )


def as_json(model: StoredModel) -> dict[str, Any]:
    """All that `list` shows."""
    current = model.current
    history = model.history()
    return {
        "name": model.name,
        "current": None if current is None else current.name,
        "bytes_on_disk": model.bytes_on_disk(),
        "pins": history.pins,
        "versions": [manifests.as_json(each) for each in model.versions()],
        "snapshots": [
            {"name": name, "version": each.version, "bytes": each.size}
            for name, each in model.snapshots().items()
        ],
        "partial": model.partial.is_dir() and any(model.partial.iterdir()),
        "history": [msgspec.to_builtins(each) for each in history.changes],
    }


def _readable(folder: Path) -> Iterator[Manifest]:
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(StartupError):
            yield manifests.read(path)
