"""Models that were made to break a start: each is refused at once, with the file and the field, or served.

The start is the real one in process, up to the model's first step (`model_fuzz.start`); a few go through the
command, to see its exit status and that nothing but one line is said.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import files
from penstock.core.errors import ModelLoadError, StartupError
from penstock.kernels.cpu import build as cpu_build
from penstock.model.generation import generation_defaults
from penstock.model.hub import is_local, resolve_model
from penstock.text.tokenizer import Tokenizer
from tests.attack import model_fuzz
from tests.attack.model_fuzz import SECONDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_fuzz.tiny(tmp_path / "model")


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(action: Callable[[], object]) -> str:
    """The one error of a start, which must come soon and fit on a terminal."""
    began = time.monotonic()
    with pytest.raises(StartupError) as caught:
        action()
    assert time.monotonic() - began < SECONDS
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_seeded_damage_ends_in_a_model_or_in_one_refusal(tmp_path: Path) -> None:
    """More by command: python -m tests.attack.model_fuzz."""
    found = model_fuzz.fuzz(100, 1, tmp_path)
    assert not found.findings, "\n".join(found.findings)
    assert found.outcomes["refused"] > 30
    assert found.outcomes["served"] > 5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_hidden_layers": 4000}, "holds 2 layers, but config.json calls for 4000"),
        ({"vocab_size": 10**15}, "vocab_size"),
        ({"hidden_size": 2**20}, "embed_tokens"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings"),
        ({"max_position_embeddings": [2048]}, "max_position_embeddings=[2048]"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"rms_norm_eps": 1e30}, "rms_norm_eps=1e+30: must be at most 1"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e300}}, "rope_scaling.factor=1e+300"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2}}, "rope type ['yarn'] is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 1e6}, "max_position_embeddings": 4096}, "context of"),
        ({"hidden_act": "x" * 10_000_000}, "activation"),
        ({"head_dim": 1}, "head_dim=1"),
        ({"layer_types": 7, "use_sliding_window": True}, "layer_types=7"),
        ({"architectures": [{}]}, "architecture {} is not supported"),
        ({"eos_token_id": 1.5}, "eos_token_id=1.5"),
        ({"quantization_config": {"quant_method": "x" * 10**6}}, "quantization_config"),
    ],
)  # fmt: skip
def test_values_of_the_configuration(folder: Path, changes: dict[str, Any], named: str) -> None:
    configure(folder, **changes)
    text = refusal(lambda: model_fuzz.start(folder))
    assert named in text
    assert str(folder) in text


def test_ends_outside_of_the_vocabulary_are_ignored_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(folder, eos_token_id=[2, 10**30, -1])
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4000]}')
    model_fuzz.start(folder)
    warnings = [record.getMessage() for record in caplog.records if "outside of the vocabulary" in record.msg]
    assert len(warnings) == 2
    assert "generation_config.json" in warnings[1]
    assert "4000" in warnings[1]


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "chat_template.jinja", "model.safetensors", "model.safetensors.index.json", "special_tokens_map.json"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "directory", "dangling", "loop", "outside", "device", "large"])
def test_what_is_no_file_is_never_opened(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # sparse
    else:
        elsewhere = {"dangling": "nothing", "loop": name, "outside": "/etc/passwd", "device": "/dev/zero"}
        path.symlink_to(elsewhere[kind])
    text = refusal(lambda: model_fuzz.start(folder))
    assert name in text


def test_links_inside_of_the_folder_and_into_the_hubs_cache_are_followed(
    folder: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    model_fuzz.start(snapshot)
    (folder / "real.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("real.json")
    model_fuzz.start(folder)


@pytest.mark.parametrize(
    "target",
    ["../../x.safetensors", "/etc/passwd", "/etc/x.safetensors", "a/../../x.safetensors", "config.json", "",
     "..", "x\0.safetensors", "a//x.safetensors", 7, None, ["model.safetensors"]],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_only(folder: Path, target: object) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
    text = refusal(lambda: model_fuzz.start(folder))
    assert str(index) in text
    assert "weight_map" in text


def test_a_shard_that_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "sub").symlink_to(tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "sub/secret.safetensors"}}))
    assert "leaves the model's folder" in refusal(lambda: model_fuzz.start(folder))


def test_a_shard_in_a_folder_below(folder: Path) -> None:
    (folder / "sub").mkdir()
    shutil.move(folder / "model.safetensors", folder / "sub" / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "sub/a.safetensors"}}))
    model_fuzz.start(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}))
    assert "is also in" in refusal(lambda: model_fuzz.start(folder))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 0, 100_000_001])
def test_a_header_that_lies_about_its_length(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "model.safetensors is truncated or corrupt" in refusal(lambda: model_fuzz.start(folder))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 1_000_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"vocab_size": ' + "9" * 100_000 + "}", "not valid JSON"),
        ('{"bos_token": "\\ud800"}', "surrogates not allowed"),
        ('{"a": "' + "x" * files.CONFIG_BYTES + '"}', "bytes"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_nobody_can_read(folder: Path, name: str, content: str, why: str) -> None:
    (folder / name).write_text(content)
    text = refusal(lambda: model_fuzz.start(folder))
    assert why in text
    assert name in text


@pytest.mark.parametrize(
    "added",
    [
        {"x": {"content": "y"}},
        {"1e9": {"content": "y"}},
        {"-1": {"content": "y"}},
        {"9" * 5000: {"content": "y"}},
    ],
)
def test_added_tokens_need_ids(folder: Path, added: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    text = refusal(lambda: Tokenizer.from_directory(folder))
    assert "tokenizer_config.json" in text
    assert "added_tokens_decoder" in text


def test_a_panic_of_the_tokenizer_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # as the binding's, which is no Exception and cannot be imported
        pass

    def panics(path: str) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("penstock.text.tokenizer.RustTokenizer", type("Rust", (), {"from_file": panics}))
    assert "index out of bounds" in refusal(lambda: Tokenizer.from_directory(folder))


@pytest.mark.parametrize("name", ["/" + "a" * 5000, "/" + "a/" * 2500, "./" + "b" * 300, "a\0b", "/a\0b"])
def test_paths_that_are_none(name: str) -> None:
    refusal(lambda: (is_local(name), resolve_model(name)))
    refusal(lambda: generation_defaults(name, Path("/nowhere")))
    refusal(lambda: Tokenizer.from_directory(Path(name)))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PENSTOCK_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert "does not exist" in refusal(lambda: resolve_model("~/model"))
    with pytest.raises(cpu_build.BuildError, match=r"no home directory.*PENSTOCK_CACHE"):
        cpu_build.find_library()
    folder = model_fuzz.tiny(tmp_path / "model")
    (folder / "real.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("real.json")
    assert files.read_json(folder / "config.json")["vocab_size"] == 2048


def test_what_may_not_be_read(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def denied(path: object, *args: object, **kwargs: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)  # permissions do not stop the tests' own user, where that is root
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read: Permission denied"):
        files.read_json(folder / "config.json")


def serve(*args: str, **environment: str) -> tuple[int, str]:
    """(exit status, what was printed) of the command, whose start must fail."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "serve", *args, "--host", "127.0.0.1", "--port", "0"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_says_one_line(folder: Path) -> None:
    configure(folder, num_hidden_layers=10**9)
    status, said = serve(str(folder))
    assert status == 2
    assert "Traceback" not in said
    assert f" penstock serve: {folder}/config.json: num_hidden_layers=1000000000" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("model", "environment", "named"),
    [("/" + "a" * 5000, {}, "File name too long"), ("demo", {"TMPDIR": "/nonexistent"}, "TMPDIR")],
)
def test_the_command_without_what_it_needs(
    model: str, environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named == "TMPDIR":  # tempfile would find another one in /tmp, which tests may write
        code = "import tempfile, sys; tempfile._candidate_tempdir_list = lambda: ['/nonexistent']; "
        code += "from penstock.cli.main import main; sys.exit(main(['serve', 'demo']))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        status, said = done.returncode, done.stderr
    else:
        status, said = serve(model, **environment)
    assert status == 2
    assert "Traceback" not in said
    assert named in said
