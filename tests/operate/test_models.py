"""The store of models: whole versions or none, checksums, snapshots, ways back; from folders and a hub."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.model.hub import resolve_model
from penstock.operate.models import drill, local, manifest
from penstock.operate.models import hub as hubs
from penstock.operate.models import store as stores
from penstock.operate.models.store import Store

from .hub import Hub

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()


def safetensors(fill: int, size: int = 4096) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes([fill]) * size


def files(fill: int = 1, **more: bytes) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": safetensors(fill), "tokenizer.json": b"{}", **more}


def folder(path: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub({"o/m": files(nested_not_wanted=b"x") | {"onnx/model.json": b"{}"}})
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    yield server
    server.stop()


def models(*arguments: str) -> int:
    return main(["models", *arguments])


def path_of(name: str, capsys: pytest.CaptureFixture[str], *flags: str) -> Path:
    capsys.readouterr()
    assert models("path", name, *flags) == 0
    return Path(capsys.readouterr().out.strip())


Captured = pytest.CaptureFixture[str]


def test_from_pull_to_rollback(root: Path, tmp_path: Path, capsys: Captured) -> None:
    source = folder(tmp_path / "m", files(1))
    assert models("pull", str(source)) == 0
    first = path_of("m", capsys)
    assert (first / "model.safetensors").read_bytes() == safetensors(1)
    assert not (first / "model.safetensors").stat().st_mode & 0o222
    assert not first.stat().st_mode & 0o222
    assert resolve_model(str(root / "m")) == first  # `penstock serve STORE/NAME`

    folder(source, {"model.safetensors": safetensors(2)})
    assert models("pull", str(source)) == 0
    said = capsys.readouterr().err
    second = path_of("m", capsys)
    assert second != first
    assert f"snapshot of {first.name}" in said
    # what both have is there once; so is what the snapshot has
    assert (first / "tokenizer.json").stat().st_ino == (second / "tokenizer.json").stat().st_ino
    (snapshot,) = (root / "m" / "snapshots").iterdir()
    assert (snapshot / "model.safetensors").stat().st_ino == (first / "model.safetensors").stat().st_ino

    assert models("rollback", "m") == 0
    assert path_of("m", capsys) == first
    assert models("rollback", "m") == 0  # and forth
    assert path_of("m", capsys) == second
    # a version that is gone comes back from its snapshot
    stores.remove(first)
    assert models("rollback", "m", "--to", snapshot.name) == 0
    assert path_of("m", capsys) == first
    assert models("verify") == 0
    assert capsys.readouterr().out.count(": well") == 3
    assert os.readlink(root / "m" / "current") == f"versions/{first.name}"  # a mount elsewhere finds it, too


def test_the_same_again_changes_nothing(root: Path, tmp_path: Path, capsys: Captured) -> None:
    source = folder(tmp_path / "m", files())
    assert models("pull", str(source), "o/x") == 0
    assert models("pull", str(source), "o/x") == 0
    assert "already" in capsys.readouterr().err
    model = Store(root).existing("o/x")
    assert (len(model.versions()), len(model.snapshots()), len(model.history().changes)) == (1, 0, 1)
    assert models("list", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)["models"]
    assert listed["name"] == "o/x"
    assert listed["versions"][0]["bytes"] == sum(map(len, files().values()))
    assert not listed["partial"]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            lambda path: path.write_bytes(b"x" * path.stat().st_size),
            "model.safetensors is damaged: its sha256",
        ),
        (lambda path: path.write_bytes(b"x"), "model.safetensors has 1 bytes, and had"),
        (lambda path: path.unlink(), "model.safetensors is missing"),
        (lambda path: (path.parent / "extra.bin").touch(), "extra.bin is not in the manifest"),
        (lambda path: (path.parent / ".penstock.json").unlink(), "no readable manifest"),
    ],
)
def test_what_is_damaged_is_named(
    root: Path, tmp_path: Path, harm: Callable[[Path], Any], says: str, capsys: Captured
) -> None:
    assert models("pull", str(folder(tmp_path / "m", files(1)))) == 0
    first = path_of("m", capsys)
    assert models("pull", str(folder(tmp_path / "m", files(2))), "--no-snapshot") == 0
    first.chmod(0o755)
    for each in first.iterdir():
        each.chmod(0o644)
    harm(first / "model.safetensors")
    capsys.readouterr()
    assert models("verify", "m") == 1
    assert says in capsys.readouterr().out
    current = path_of("m", capsys)
    if "extra" not in says:  # and it is not gone back to
        assert models("rollback", "m", "--to", first.name) == 2
        assert path_of("m", capsys) == current


def test_a_restore_drill(root: Path, tmp_path: Path, capsys: Captured) -> None:
    assert models("pull", str(folder(tmp_path / "m", files()))) == 0
    scratch = tmp_path / "scratch"
    assert models("verify", "m", "--restore-drill", "--scratch", str(scratch)) == 0
    said = capsys.readouterr().out
    assert "restored 3 files" in said
    assert "LlamaForCausalLM, 1 tensors" in said
    assert not any(scratch.iterdir())
    weights = path_of("m", capsys) / "model.safetensors"
    weights.chmod(0o644)
    with open(weights, "r+b") as file:
        file.truncate(2000)
    assert models("verify", "m", "--restore-drill", "--scratch", str(scratch)) == 1
    said = capsys.readouterr().out
    assert "model.safetensors is damaged" in said
    assert "reaches beyond its end" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"1234567", "too short"),
        (struct.pack("<Q", 1 << 62) + b"{}", "header would have"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 2) + b"{x", "no JSON"),
        (struct.pack("<Q", 7) + b'{"a":1}', "has no place"),
    ],
)
def test_headers_of_files_that_are_none(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        drill.header(path)


def test_prune_leaves_what_is_needed(root: Path, tmp_path: Path, capsys: Captured) -> None:
    versions = []
    for fill in range(5):
        assert models("pull", str(folder(tmp_path / "m", files(fill))), "--no-snapshot") == 0
        versions.append(path_of("m", capsys).name)
        made = root / "m" / "versions" / versions[-1]
        made.chmod(0o755)
        text = (made / manifest.MANIFEST).read_text().replace('"created": "', f'"created": "{fill}')
        (made / manifest.MANIFEST).chmod(0o644)
        (made / manifest.MANIFEST).write_text(text)
    assert models("pin", "m", versions[0][:6]) == 0
    assert models("rollback", "m", "--to", versions[1]) == 0
    (root / "m" / ".partial" / "dead").mkdir(parents=True)
    capsys.readouterr()
    assert models("prune", "m", "--keep", "1", "--dry-run") == 0
    said = capsys.readouterr().out
    assert [each in said for each in versions] == [False, False, True, True, False]
    assert len(Store(root).existing("m").versions()) == 5
    assert models("prune", "--keep", "1") == 0
    assert {each.version for each in Store(root).existing("m").versions()} == {
        versions[0], versions[1], versions[4],
    }  # fmt: skip
    assert not (root / "m" / ".partial").exists()
    assert models("verify") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pull", "./nowhere"], "nowhere does not exist"),
        (["pull", "{file}"], "is a file; a model is a folder"),
        (["pull", "{empty}"], "has no config.json"),
        (["pull", "{link}"], "is a link that leaves the folder"),
        (["pull", "{pipe}"], "is no regular file"),
        (["pull", "{empty}", "../evil"], "is no name of a model in a store"),
        (["pull", "{empty}", "a/versions"], "is no name of a model in a store"),
        (["pull", "{empty}", "--revision", "v1"], "--revision is of a Hugging Face id"),
        (["rollback", "nobody"], "has no model 'nobody': it has nothing yet"),
        (["path", "nobody"], "has no model 'nobody'"),
        (["verify"], "has no models"),
        (["prune", "--keep", "-1"], "--keep is -1"),
    ],
)
def test_what_is_refused(
    root: Path, tmp_path: Path, arguments: list[str], says: str, capsys: Captured
) -> None:
    places = {name: tmp_path / name for name in ("file", "empty", "link", "pipe")}
    places["file"].touch()
    for name in ("empty", "link", "pipe"):
        places[name].mkdir()
    for name in ("link", "pipe"):
        (places[name] / "config.json").write_bytes(CONFIG)
    (places["link"] / "model.safetensors").symlink_to("/etc/hostname")
    os.mkfifo(places["pipe"] / "model.safetensors")
    assert models(*(each.format(**places) for each in arguments)) == 2
    assert says in capsys.readouterr().err
    assert not list(root.rglob("versions/*"))


def test_a_disk_that_is_full_leaves_what_was_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    source = folder(tmp_path / "m", files(1))
    assert models("pull", str(source)) == 0
    before = path_of("m", capsys)
    folder(source, files(2))
    monkeypatch.setattr(stores, "free_bytes", lambda path: 1000)
    assert models("pull", str(source)) == 2
    assert "GB more, and the disk of" in capsys.readouterr().err

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "free_bytes", lambda path: 1 << 40)
    monkeypatch.setattr(local, "copy", full)
    assert models("pull", str(source)) == 2
    assert "is full" in capsys.readouterr().err
    assert path_of("m", capsys) == before
    assert not any((root / "m" / ".partial").iterdir())
    assert [each.name for each in (root / "m" / "versions").iterdir()] == [before.name]


def test_who_comes_second_waits_and_finds_it_there(root: Path, tmp_path: Path, capsys: Captured) -> None:
    source = folder(tmp_path / "m", files())
    model = Store(root).model("m")
    waits = threading.Event()
    done: list[int] = []

    def second() -> None:
        with Store(root).model("m").alone(lambda _: waits.set()):
            done.append(len(Store(root).model("m").versions()))

    with model.alone():
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(20)
        assert not done
        with pytest.raises(StartupError, match="is being changed by process"), model.alone(wait=False):
            pass
        local.fetch(model, source, "now")
    thread.join(20)
    assert done == [1]


def test_a_disk_that_is_full_in_the_middle(root: Path, hub: Hub, capsys: Captured) -> None:
    """The kernel refuses to write on; here by a limit on the size of files."""
    hub.repositories["o/m"]["model.safetensors"] = safetensors(3, 12_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        assert models("pull", "o/m") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written: File too large" in capsys.readouterr().err
    assert not list(root.rglob("versions/*"))
    assert models("pull", "o/m") == 0
    assert models("verify") == 0


# ---- from a hub ----


def test_two_who_want_the_same_download_it_once(root: Path, hub: Hub) -> None:
    hub.hold = threading.Event()
    ends: list[int] = []
    waits = threading.Event()

    def second() -> None:
        model = Store(root).model("o/m")
        with model.alone(lambda _: waits.set()):
            ends.append(len(hubs.fetch(model, "o/m", None, "now", lambda _: None).files))

    first = threading.Thread(target=lambda: ends.append(models("pull", "o/m")))
    first.start()
    assert hub.half_sent.wait(20)
    late = threading.Thread(target=second)
    late.start()
    assert waits.wait(20)
    hub.hold.set()
    first.join(20)
    late.join(20)
    assert sorted(ends) == [0, 3]
    assert hub.downloads("model.safetensors") == 1


def test_a_pull_from_the_hub(root: Path, hub: Hub, capsys: Captured) -> None:
    assert models("pull", "o/m") == 0
    got = path_of("o/m", capsys)
    assert sorted(each.name for each in got.iterdir()) == [
        ".penstock.json", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    made = manifest.read(got)
    assert (made.source, made.revision) == ("o/m", hub.commit)
    # the same commit: only the listing is asked for
    asked = len(hub.asked)
    assert models("pull", "o/m", "--revision", "main") == 0
    assert len(hub.asked) == asked
    # another one, of which one file is new
    hub.commit = "f" * 40
    hub.repositories["o/m"]["config.json"] = CONFIG.replace(b"Llama", b"Qwen2")
    assert models("pull", "o/m") == 0
    assert hub.downloads("model.safetensors") == 1
    assert path_of("o/m", capsys) != got


def test_a_pull_whose_connection_breaks_goes_on(
    root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.repositories["o/m"]["model.safetensors"] = safetensors(3, 24_000_000)
    hub.cut = 21_000_000
    assert models("pull", "o/m") == 0
    ranges = [range_ for path, range_ in hub.asked if path.endswith(".safetensors")]
    assert ranges[0] is None
    assert ranges[-1] is not None
    assert int(ranges[-1].removeprefix("bytes=").partition("-")[0]) > 0


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_is_waited_for(
    root: Path, hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.refusals = [(status, {"Retry-After": "7"})] * 2
    model = Store(root).model("o/m")
    with model.alone():
        hubs.fetch(model, "o/m", None, "now", lambda _: None, sleep=waits.append)
    assert len(model.versions()) == 1
    assert sum(each >= 7 for each in waits) == 2


def test_a_hub_that_stays_busy_is_given_up(
    root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(hubs, "_TRIES", 2)
    hub.refusals = [(503, {})] * 100
    model = Store(root).model("o/m")
    with pytest.raises(StartupError, match="the hub answers 503"), model.alone():
        hubs.fetch(model, "o/m", None, "now", lambda _: None, sleep=lambda _: None)
    assert model.versions() == []


def test_what_was_damaged_on_the_way_is_not_admitted(root: Path, hub: Hub, capsys: Captured) -> None:
    hub.damage = True
    assert models("pull", "o/m") == 2
    assert "was damaged on the way" in capsys.readouterr().err
    assert not list(root.rglob("versions/*"))
    hub.damage = False
    assert models("pull", "o/m") == 0
    assert models("verify") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/body"], "neither a folder nor a repository on Hugging Face"),
        (["secret/gated"], "is a gated repository"),
        (["o/m", "--revision", "v9"], "has no revision 'v9'"),
        (["o/empty"], "has no *.safetensors files"),
    ],
)
def test_what_the_hub_refuses(
    root: Path, hub: Hub, arguments: list[str], says: str, capsys: Captured
) -> None:
    hub.repositories["o/empty"] = {"README.md": b"x"}
    assert models("pull", *arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(root.rglob("versions/*"))


def test_a_hub_that_is_not_to_be_trusted(root: Path, hub: Hub, tmp_path: Path, capsys: Captured) -> None:
    hub.repositories["o/m"][".penstock.json"] = b"{}"  # what would stand in place of the manifest
    hub.repositories["o/out"] = files() | {"../../evil.json": b"{}"}
    assert models("pull", "o/m") == 0
    assert manifest.read(path_of("o/m", capsys)).source == "o/m"
    assert models("pull", "o/out") == 2
    assert "lists files outside of its folder" in capsys.readouterr().err
    hub.commit = "../../../evil"
    assert models("pull", "o/m") == 2
    assert "names no commit" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*evil*"))


def test_offline_is_said(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    assert models("pull", "o/m") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_pull_that_is_killed_leaves_nothing_half_and_goes_on(root: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["o/m"]["model.safetensors"] = safetensors(3, 30_000_000)
    hub.hold = threading.Event()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "models", "pull", "o/m"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    part = root / "o" / "m" / ".partial" / hub.commit / "model.safetensors.incomplete"
    try:
        assert hub.half_sent.wait(60)
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        hub.hold.set()
    hub.hold = None
    have = part.stat().st_size
    assert have > 0
    assert not (root / "o" / "m" / "versions").exists()
    assert not (root / "o" / "m" / "current").exists()
    assert models("pull", "o/m") == 0
    assert hub.asked[-1][1] == f"bytes={have}-" or f"bytes={have}-" in [each for _, each in hub.asked]
    assert models("verify") == 0


def test_modes_are_left_readable(root: Path, tmp_path: Path) -> None:
    """Whoever serves needs no more than reading: a volume may be mounted so."""
    assert models("pull", str(folder(tmp_path / "m", files() | {"sub/x.json": b"{}"}))) == 0
    for path in (root / "m" / "versions").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o555 if path.is_dir() else 0o444), path
