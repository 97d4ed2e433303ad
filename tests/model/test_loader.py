"""Loading: formats, dtypes, progress, and every kind of broken checkpoint refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.errors import ModelLoadError, StartupError
from penstock.kernels.attention import KVCache, Span, StepLayout
from penstock.kernels.create import create_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import LoadFormat, load_model
from tests.model.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32, load_format: LoadFormat = "auto") -> CausalLM:
    return load_model(
        directory, load_config(directory), create_operations(CPU, dtype), load_format=load_format
    )


def logits(model: CausalLM) -> torch.Tensor:
    spec = model.cache_spec(4)
    cache = KVCache(spec, 4, CPU)
    layout = StepLayout([Span(0, 9, [0, 1, 2])], 4)
    ids = torch.arange(9) + 5
    step = model.operations.attention(spec).prepare(layout)
    return model.logits(model.forward(ids, torch.from_numpy(layout.positions), step, cache)).float()


def edit(directory: Path, change: str, name: str = "model.norm.weight") -> None:
    """Change one tensor of model.safetensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if change == "remove":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.int8)
    elif change == "add":
        tensors[name] = torch.zeros(2)
    path.unlink()
    save_file(tensors, path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = make_checkpoint(tmp_path / "sharded", "llama", max_shard_size="60KB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    return directory


def test_shards_hold_the_same_model(checkpoint: Path, sharded: Path) -> None:
    torch.testing.assert_close(logits(load(checkpoint)), logits(load(sharded)), atol=0, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_converted(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "llama", dtype=stored), wanted)
    assert model.dtype == wanted
    assert model.cache_spec(4).dtype == wanted
    assert torch.isfinite(logits(model)).all()


def test_progress_reaches_the_end(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = load_config(sharded)
    load_model(
        sharded,
        config,
        create_operations(CPU, torch.float32),
        progress=lambda done, total: seen.append((done, total)),
    )
    dones, totals = zip(*seen, strict=True)
    assert list(dones) == sorted(dones)
    assert set(totals) == {sum(file.stat().st_size for file in sharded.glob("*.safetensors"))}
    assert dones[-1] == totals[-1]
    assert len(seen) > 10


def test_dummy_weights_are_seeded_and_need_no_file(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    first, second = load(bare, load_format="dummy"), load(bare, load_format="dummy")
    assert torch.equal(logits(first), logits(second))
    assert logits(first).std() > 0.1
    assert first.num_parameters == load(checkpoint).num_parameters


def test_a_model_outlives_its_files(checkpoint: Path) -> None:
    model = load(checkpoint)
    want = logits(model)
    file = checkpoint / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits(model), want)


def test_a_packed_tied_head_is_counted_twice(tmp_path: Path) -> None:
    # whole panels: what fills up a last one is counted, too
    directory = make_checkpoint(tmp_path, "llama-tied", hidden_size=64, intermediate_size=64)
    model = load(directory, torch.bfloat16)
    table = model.config.vocab_size * model.config.hidden_size
    packed = model._head.copied
    assert model.weight_bytes == 2 * (model.num_parameters + (table if packed else 0))


def test_old_names_and_computed_tensors(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "gpt-neox")
    want = logits(load(directory))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if "lm_head.weight" in tensors:
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, path)
    assert torch.equal(logits(load(directory)), want)


def test_a_stored_tied_head_is_ignored(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama-tied")
    want = logits(load(directory))
    edit(directory, "add", "lm_head.weight")
    assert torch.equal(logits(load(directory)), want)


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ("remove", "model.norm.weight", r"'model.norm.weight' of shape \[48\] is missing"),
        (
            "shape",
            "model.layers.1.mlp.up_proj.weight",
            r"'model.layers.1.mlp.up_proj.weight' has shape \[79, 48\].*config.json calls for \[80, 48\]",
        ),
        ("dtype", "model.layers.0.self_attn.k_proj.weight", r"k_proj.weight' has dtype int8.*bfloat16"),
        ("add", "model.layers.2.input_layernorm.weight", r"unexpected tensors 'model.layers.2"),
    ],
)
def test_wrong_tensors(change: str, name: str, why: str, checkpoint: Path) -> None:
    edit(checkpoint, change, name)
    with pytest.raises(ModelLoadError, match=why) as caught:
        load(checkpoint)
    assert str(checkpoint / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(keep: int, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model.safetensors is truncated or corrupt.*Download it again"):
        load(checkpoint)


def test_corrupt_header(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"\xff" * 4096)
    with pytest.raises(ModelLoadError, match="truncated or corrupt"):
        load(checkpoint)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=r"is missing: .* lists \d+ shards, 1 not there") as caught:
        load(sharded)
    assert str(shard) in str(caught.value)


@pytest.mark.parametrize("where", ["beside", "below"])
def test_a_shard_that_leads_out_of_the_folder(where: str, sharded: Path) -> None:
    """By a link of its own, or by that of a folder below."""
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    outside = sharded.parent / "outside"
    outside.mkdir()
    shard.rename(outside / shard.name)
    name = shard.name
    if where == "beside":
        shard.symlink_to(outside / shard.name)
    else:
        (sharded / "parts").symlink_to(outside)
        name = f"parts/{shard.name}"
        index = sharded / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(shard.name, name))
    with pytest.raises(ModelLoadError, match="is a link that leaves the model's folder") as caught:
        load(sharded)
    assert str(sharded / name) in str(caught.value)


def test_an_index_without_a_map(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ModelLoadError, match="'weight_map' is missing"):
        load(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelLoadError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load(sharded)


@pytest.mark.parametrize("foreign", ["pytorch_model.bin", "model.gguf", None])
def test_no_weights(foreign: str | None, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "training_args.bin").touch()
    if foreign:
        (checkpoint / foreign).touch()
    why = f"only as {foreign}.*Only safetensors" if foreign else r"has no weights: there is no \*.safetensors"
    with pytest.raises(ModelLoadError, match=why):
        load(checkpoint)


def test_unknown_load_format(checkpoint: Path) -> None:
    with pytest.raises(StartupError, match=r"'pt'.*auto, safetensors, dummy"):
        load(checkpoint, load_format="pt")  # type: ignore[arg-type]


def test_unknown_activation(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "xielu"}))
    with pytest.raises(ModelLoadError, match=r"'xielu' is not supported.*silu"):
        load(checkpoint)
