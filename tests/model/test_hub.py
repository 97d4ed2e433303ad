"""Model names: bundled, local, Hugging Face; no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from penstock import assets
from penstock.core.errors import ModelLoadError
from penstock.model.hub import resolve_model


def answer(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[dict[str, Any]]:
    """Let the hub answer with a path or an exception; returns what it is asked."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if isinstance(result, BaseException):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def bare(cls: type[Exception]) -> Exception:
    """An exception whose constructor wants an HTTP response that nothing here looks at."""
    error = cls.__new__(cls)
    error.args = ("the hub says no",)
    return error


def test_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, "unused")
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == tmp_path
    assert not asked


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelLoadError, match="not in this installation"):
        resolve_model("demo")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_model("demo") == resolve_model("penstock/demo") == tmp_path / "demo"


def test_hugging_face_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, tmp_path)
    assert resolve_model("Qwen/Qwen3-0.6B", "main") == tmp_path
    (call,) = asked
    assert (call["name"], call["revision"]) == ("Qwen/Qwen3-0.6B", "main")
    heads = {"sparse_linear.pt", "colbert_linear.pt"}  # of BGE-M3
    assert {"*.safetensors", "*.json", "*.jinja"} | heads == set(call["allow_patterns"])
    unwanted = {"original/*", "onnx/*", "openvino/*", "consolidated*.safetensors"}
    assert unwanted == set(call["ignore_patterns"])
    assert call["cache_dir"] is None


def test_download_dir_is_the_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    resolve_model("Qwen/Qwen3-0.6B", None, "~/models")
    assert asked[0]["cache_dir"] == tmp_path / "models"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            bare(errors.GatedRepoError),
            r"owner/name@v1 is a gated repository.*huggingface.co/owner/name.*HF_TOKEN",
        ),
        (bare(errors.RevisionNotFoundError), r"has no revision 'v1'"),
        (bare(errors.RepositoryNotFoundError), r"neither a local directory nor a repository.*spelling"),
        (bare(errors.LocalEntryNotFoundError), r"not in the local Hugging Face cache.*HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled("offline"), r"not in the local Hugging Face cache"),
        (errors.HFValidationError("bad"), r"nor a valid Hugging Face id"),
        (OSError("no space left"), r"Downloading owner/name@v1 failed: no space left"),
    ],
)
def test_what_can_go_wrong(error: Exception, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, error)
    with pytest.raises(ModelLoadError, match=why):
        resolve_model("owner/name", "v1")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c", "...", "owner/", ""])
def test_paths_that_do_not_exist_are_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, "unused")
    with pytest.raises(ModelLoadError, match="does not exist"):
        resolve_model(name)
    assert not asked


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelLoadError, match=rf"is a file.*Name its directory: {tmp_path}"):
        resolve_model(str(file))


def test_a_local_model_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="--revision v2 cannot apply") as caught:
        resolve_model(str(tmp_path), "v2")
    assert caught.value.param == "--revision"
