"""Write a Qwen3 checkpoint as GGUF, so that llama.cpp serves the same weights: bfloat16, or Q8_0.

    python -m benchmarks.peers.workers.gguf_writer CHECKPOINT OUT.gguf --type bf16|q8_0

Runs under the Python of .peers/llama (numpy and gguf; no torch, no safetensors: the file format is a length,
a JSON header and the tensors). Vectors (norms) stay in float32 as llama.cpp wants them; tied embeddings are
written once, and llama.cpp takes them for the output too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`; KeyError for what Qwen3 has not."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as uint16 (the bits of bfloat16) or float32; ValueError for other dtypes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    dtypes = {"BF16": np.uint16, "F32": np.float32}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; this writer reads BF16 and F32")
        begin, end = entry["data_offsets"]
        yield name, data[begin:end].view(dtypes[entry["dtype"]]).reshape(entry["shape"])


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """Exact: bfloat16 is the upper half of float32."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32)


def write(checkpoint: Path, out: Path, kind: str) -> None:
    """Convert; the file appears under its name in one piece."""
    import gguf  # type: ignore[import-not-found, unused-ignore]

    config = json.loads((checkpoint / "config.json").read_text())
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3")
    writer.add_name(checkpoint.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_Q8_0 if kind == "q8_0" else types.MOSTLY_BF16)
    _add_tokenizer(writer, checkpoint, config)
    for name, tensor in read_safetensors(checkpoint / "model.safetensors"):
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), as_float32(tensor))
            continue
        quantization = gguf.GGMLQuantizationType.Q8_0 if kind == "q8_0" else gguf.GGMLQuantizationType.BF16
        data = gguf.quants.quantize(as_float32(tensor), quantization)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def _add_tokenizer(writer: Any, checkpoint: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE of tokenizer.json; ids that have no token become unused ones."""
    import gguf  # type: ignore[import-not-found, unused-ignore]

    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"] for entry in tokenizer["added_tokens"] if entry["special"]}
    by_id |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(config["vocab_size"]):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        types.append(
            kinds.UNUSED if number not in by_id else kinds.CONTROL if number in special else kinds.NORMAL
        )
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if isinstance(config.get("eos_token_id"), int):
        writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("bf16", "q8_0"), default="bf16")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.checkpoint, args.out, args.type)


if __name__ == "__main__":
    main()
