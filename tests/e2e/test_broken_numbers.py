"""What the device and the checkpoint can do wrong while a server runs: it says so, and goes on."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path

import openai
import pytest
from safetensors.torch import load_file, save_file

from penstock import assets
from penstock.cli.main import main

from .server import Server, serving
from .test_lifecycle import refused

SMALL = ("--kv-cache-memory-bytes", "16MiB", "--dtype", "float32")


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def damaged(directory: Path, tensor: str, row: int) -> Path:
    """The demo model with a row of NaN."""
    shutil.copytree(Path(assets.__file__).parent / "demo", directory)
    weights = load_file(directory / "model.safetensors")
    weights[tensor][row] = math.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_model_that_computes_no_numbers_is_refused_and_the_layer_is_named(tmp_path: Path) -> None:
    path = damaged(tmp_path / "damaged", "model.layers.3.mlp.down_proj.weight", 5)
    log = refused(tmp_path, str(path), *SMALL)
    assert "first in the output of the mlp of layer 3: NaN at position 0" in log
    assert f"{path}: a test prompt of 8 tokens fails: logits contain NaN" in log
    assert "Traceback" not in log


def test_logits_that_are_not_finite_fail_their_request_and_say_where_they_come_from(tmp_path: Path) -> None:
    """A damaged row of the embedding: the model is good but for one token."""
    path = damaged(tmp_path / "damaged", "model.embed_tokens.weight", 1000)
    # tied, the row is a column of the output layer, too: every prompt would fail
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].nan_to_num(0.0)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with serving(str(path), *SMALL, "--served-model-name", "m", log=tmp_path / "log") as server:
        with client_of(server) as client:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match="logits contain NaN") as caught:
                    client.completions.create(model="m", prompt=[5, 6, 1000, 7], max_tokens=4)
                assert caught.value.status_code == 500
                assert caught.value.body["reason"] == "request_failed"  # type: ignore[index]
                assert client.completions.create(model="m", prompt=[5, 6, 8, 7], max_tokens=4).choices
        assert server.get("/health")[0] == 200
        log = server.log
    where = "at position 3 are not finite; first in the output of the embedding: NaN at position 2"
    assert log.count(where) == 1
    assert log.count("are not finite (not examined") == 1
    assert "Traceback" not in log


def test_a_step_that_does_not_fit_into_memory_is_made_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's address space is limited while it runs, to 2 MiB more than it has: the activations of
    the prompt need some ten times as much, so that torch fails in earnest. Threads share one arena of memory:
    glibc sets 64 MiB of addresses aside for each further one."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    record = tmp_path / "steps.jsonl"
    flags = (*SMALL, "--max-num-batched-tokens", "2048", "--record-steps", str(record))
    prompt = "A Deployment keeps Pods running. " * 150
    with serving(*flags, log=tmp_path / "log") as server, client_of(server) as client:

        def ask(salt: str) -> str:
            extra = {"cache_salt": salt, "ignore_eos": True}
            made = client.completions.create(
                model="demo", prompt=prompt, max_tokens=4, temperature=0, extra_body=extra
            )
            return made.choices[0].text

        pid = server.engine_pid()
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.prlimit(pid, resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))
        got = ask("during")
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        log = server.log
        assert got == ask("after")
        assert "out of memory in step 0 with" in log
        assert server.get("/health")[0] == 200
    assert main(["replay", str(record)]) == 0
    assert "all identical" in capsys.readouterr().out
