"""Model folders with seeded damage: whatever is in them, a start ends in a model or in one StartupError.

    python -m tests.attack.model_fuzz --count 20000 --seed 0

A mutation changes values of a JSON file (to those that break programs), its bytes, the header of the weights,
their bytes, or what kind of file something is. In process, everything that a start does with a folder is
done: configuration, weights, memory plan and first step by `build_engine`, tokenizer and template. Whatever
else is raised is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import io
import json
import logging
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from penstock import assets
from penstock.core.errors import StartupError
from penstock.engine import build
from penstock.engine.config import EngineConfig
from penstock.engine.hardware import Hardware, inspect_hardware
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

DEMO = Path(str(assets.__file__)).parent / "demo"
SECONDS = 5.0
"""A start that is refused takes no longer."""

_INTS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    48,
    64,
    127,
    128,
    4096,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    2**64,
    10**9,
    10**30,
)
_FLOATS = (0.0, -0.0, 0.5, 1.5, -1.0, 1e-45, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), 1e15)
_TEXTS = (
    "",
    "x",
    "\0",
    "\ud800",
    "../..",
    "/etc/passwd",
    "a" * 10_000,
    "silu",
    "float16",
    "LlamaForCausalLM",
    "💥",
)
_ARCHITECTURES = (
    "FalconForCausalLM",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Other",
)
_KEYS = """
    num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size intermediate_size
    vocab_size max_position_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor
    rms_norm_eps layer_norm_eps hidden_act sliding_window use_sliding_window max_window_layers
    layer_types attention_bias mlp_bias tie_word_embeddings dtype torch_dtype eos_token_id bos_token_id
    quantization_config architectures multi_query new_decoder_architecture num_kv_heads n_head n_layer
    n_embed alibi bias parallel_attn num_ln_in_parallel_attn rotary_pct rotary_emb_base
    use_parallel_residual qk_layernorm ffn_hidden_size
""".split()


@dataclass
class Found:
    """What came of a number of starts."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """served, refused, broken, slow → how often."""
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0


def tiny(directory: Path) -> Path:
    """A checkpoint like the demo's with its tokenizer, but a tenth of its size."""
    shutil.copytree(DEMO, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
    config |= {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (2048, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (32,)
        for name, rows, columns in (("q", 32, 32), ("k", 16, 32), ("v", 16, 32), ("o", 32, 32)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, columns)
        for name in "qk":
            shapes[f"{prefix}.self_attn.{name}_norm.weight"] = (16,)
        for name, rows, columns in (("gate", 64, 32), ("up", 64, 32), ("down", 32, 64)):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (rows, columns)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def start(directory: Path) -> None:
    """All that a start does with a model's folder. Raises what stops it."""
    config = EngineConfig(model=str(directory), device="cpu", kv_cache_memory_bytes=1 << 22, max_model_len=-1)
    with mock.patch.object(build, "inspect_hardware", _hardware):
        engine = build.build_engine(config)
    try:
        tokenizer = Tokenizer.from_directory(directory)
        tokenizer.encode("What is a Pod?")
        ChatTemplate.from_tokenizer(tokenizer)
    finally:
        engine.close()


@functools.cache
def _hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """Measured once: that is the slowest part of a start."""
    return inspect_hardware(device, dtype)


def fuzz(count: int, seed: int, work: Path, report: Callable[[str], None] = lambda line: None) -> Found:
    """Damage a tiny model `count` times, and start each."""
    found = Found()
    good = tiny(work / "good")
    with _quiet():
        start(good)  # the first one imports
        for number in range(count):
            random_ = random.Random(f"{seed}/{number}")
            directory = work / "model"
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(good, directory)
            what = damage(directory, random_)
            began = time.monotonic()
            outcome, error = "served", None
            try:
                start(directory)
            except StartupError as refusal:
                outcome = "refused"
                text = str(refusal)
                if not (str(directory) in text or "--" in text) or len(text) > 2000 or "\n" in text:
                    outcome, error = "shapeless", f"{type(refusal).__name__}: {text[:300]!r}"
            except BaseException as broken:
                if isinstance(broken, KeyboardInterrupt):
                    raise
                outcome, error = "broken", f"{type(broken).__name__}: {str(broken)[:300]}"
            took = time.monotonic() - began
            found.slowest = max(found.slowest, took)
            if took > SECONDS and outcome != "served":
                outcome, error = "slow", f"{took:.1f} s ({outcome})"
            found.outcomes[outcome] += 1
            if error is not None:
                found.findings.append(f"{seed}/{number}: {what}: {error}")
                report(found.findings[-1])
    return found


def damage(directory: Path, random_: random.Random) -> str:
    """Break something in a folder; returns what, in words."""
    kind = random_.choice(
        ["config"] * 6
        + ["header"] * 4
        + ["json bytes", "bytes", "generation", "tokenizer", "tokenizer config"] * 2
        + ["index", "kind of file", "truncate"]
    )
    return {
        "config": _config,
        "header": _header,
        "json bytes": _json_bytes,
        "bytes": _bytes,
        "generation": lambda d, r: _values(d / "generation_config.json", r),
        "tokenizer": lambda d, r: _values(d / "tokenizer.json", r),
        "tokenizer config": lambda d, r: _values(d / "tokenizer_config.json", r),
        "index": _index,
        "kind of file": _kind,
        "truncate": _truncate,
    }[kind](directory, random_)


def value(random_: random.Random, depth: int = 0) -> Any:
    """Something that a program may not expect."""
    kind = random_.randrange(8 if depth < 3 else 4)
    if kind == 0:
        return random_.choice(_INTS)
    if kind == 1:
        return random_.choice(_FLOATS)
    if kind == 2:
        return random_.choice(_TEXTS)
    if kind == 3:
        return random_.choice([None, True, False, [], {}])
    if kind == 4:
        return [value(random_, depth + 1) for _ in range(random_.randrange(4))]
    if kind == 5:
        return {random_.choice(_TEXTS): value(random_, depth + 1) for _ in range(random_.randrange(3))}
    if kind == 6:
        return 10 ** random_.randrange(1, 400)
    return random_.choice(_INTS) * random_.choice([1, -1]) + random_.randrange(3)


def _config(directory: Path, random_: random.Random) -> str:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    changed = []
    for _ in range(random_.randrange(1, 4)):
        key = random_.choice(_KEYS)
        if key == "architectures":
            config[key] = [random_.choice(_ARCHITECTURES)]
        elif key in ("rope_scaling", "rope_parameters") and random_.random() < 0.8:
            kind = random_.choice(["yarn", "llama3", "linear", "default", value(random_)])
            config[key] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0}
            config[key] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
            inner = random_.choice(
                [*config[key], "beta_fast", "beta_slow", "mscale", "attention_factor", "truncate"]
            )
            config[key][inner] = value(random_)
        else:
            config[key] = value(random_)
        changed.append(f"{key}={str(config[key])[:60]!r}")
    path.write_text(json.dumps(config))
    return f"config.json {', '.join(changed)}"


def _values(path: Path, random_: random.Random) -> str:
    """Replace, remove or add some values, anywhere in a JSON file."""
    tree = json.loads(path.read_text())
    places = []
    for _ in range(random_.randrange(1, 4)):
        node, where = tree, ""
        while True:
            key = random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
            where += f"/{key}"
            child = node[key]
            if not isinstance(child, dict | list) or not child or random_.random() < 0.3:
                break
            node = child
        if random_.random() < 0.2:
            del node[key]
        else:
            node[key] = value(random_)
        places.append(where[:80])
        if not tree:
            break
    path.write_text(json.dumps(tree))
    return f"{path.name} {', '.join(places)}"


def _json_bytes(directory: Path, random_: random.Random) -> str:
    path = random_.choice(sorted(directory.glob("*.json")))
    data = bytearray(path.read_bytes())
    choice = random_.randrange(4)
    if choice == 0:
        depth = random_.choice([100, 1000, 10_000, 100_000])
        data = bytearray(random_.choice([b"[", b'{"a":']) * depth)
    elif choice == 1:
        at = random_.randrange(len(data))
        data[at : at + random_.randrange(5)] = random_.randbytes(random_.randrange(5))
    elif choice == 2:
        data[random_.randrange(len(data)) :] = b""
    else:
        data = bytearray(b'{"vocab_size":' + b"9" * random_.choice([400, 5000]) + b"," + bytes(data[1:]))
    path.write_bytes(data)
    return f"{path.name}: bytes {choice}"


def _header(directory: Path, random_: random.Random) -> str:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = random_.choice(names)
    entry = header[name]
    choice = random_.randrange(9)
    claimed = None
    if choice == 0:
        claimed = random_.choice([0, 1, length - 1, length + 1, 2**31, 2**60, 2**64 - 1, 100_000_001])
    elif choice == 1:
        entry["shape"] = [random_.choice(_INTS) for _ in range(random_.randrange(4))]
    elif choice == 2:
        entry["dtype"] = random_.choice(
            ["F32", "F16", "I8", "U8", "BOOL", "F64", "F8_E4M3", "X", "", 5, None]
        )
    elif choice == 3:
        entry["data_offsets"] = [random_.choice([0, 1, 10, len(body), 2**40, 2**63, -1]) for _ in range(2)]
    elif choice == 4:
        del header[name]
    elif choice == 5:
        header[random_.choice(_TEXTS[:4]) + name] = dict(entry)
    elif choice == 6:
        header[name] = value(random_)
    elif choice == 7:
        other = random_.choice(names)
        header[name], header[other] = header[other], header[name]
    else:
        entry[random_.choice(["shape", "dtype", "data_offsets"])] = value(random_)
    text = json.dumps(header).encode()
    if choice == 5 and random_.random() < 0.5:  # the same name twice
        text = text[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(entry).encode() + b"}"
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + body)
    return f"header {choice} of {name}: {str(header.get(name))[:100]}"


def _bytes(directory: Path, random_: random.Random) -> str:
    path = random_.choice([directory / "model.safetensors", directory / "tokenizer.json"])
    data = bytearray(path.read_bytes())
    end = random_.choice([8, 100, 2000, len(data)])
    for _ in range(random_.randrange(1, 8)):
        data[random_.randrange(min(end, len(data)))] = random_.randrange(256)
    path.write_bytes(data)
    return f"{path.name}: bytes of the first {end}"


def _index(directory: Path, random_: random.Random) -> str:
    target = random_.choice(
        ["../../x", "/etc/passwd", "model.safetensors", "model.safetensors/", "./model.safetensors", "",
         "config.json", "\0", ".", "..", "a" * 5000 + ".safetensors", "sub/../../model.safetensors",
         "gone.safetensors"]
    )  # fmt: skip
    weight_map = random_.choice([{"x": target}, {"x": value(random_)}, value(random_), [target]])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return f"index {str(weight_map)[:80]}"


def _kind(directory: Path, random_: random.Random) -> str:
    name = random_.choice([*sorted(path.name for path in directory.iterdir()), "chat_template.jinja"])
    path = directory / name
    path.unlink(missing_ok=True)
    kind = random_.choice(["fifo", "directory", "link", "loop", "outside", "gone"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nothing")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "outside":
        path.symlink_to(random_.choice(["/etc/passwd", "/dev/zero", "/dev/stdin"]))
    return f"{name} is {kind}"


def _truncate(directory: Path, random_: random.Random) -> str:
    path = random_.choice(sorted(path for path in directory.iterdir() if path.suffix != ".md"))
    size = random_.choice([0, 1, 7, 8, 9, path.stat().st_size - 1, path.stat().st_size // 2])
    os.truncate(path, size)
    return f"{path.name} has {size} bytes"


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the engine's log and its memory tables."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def main() -> int:
    """By command: many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = sys.stdout
    faulthandler.dump_traceback_later(3600, exit=True, file=out)
    with tempfile.TemporaryDirectory() as work:
        found = fuzz(args.count, args.seed, Path(work), lambda line: print(line, file=out, flush=True))
    print(f"{args.count} starts: {dict(found.outcomes)}, slowest {found.slowest:.2f} s")
    return bool(found.findings)


if __name__ == "__main__":
    sys.exit(main())
