"""What compiling a grammar and filling a mask cost, by library and vocabulary.

    python -m benchmarks.structured.libraries [--vocabulary qwen.tiktoken] [--json FILE]

On the demo model's vocabulary and on one of 150,000 tokens: of a file in tiktoken's format (the PyPI
package `dashscope` has Qwen's, dashscope/resources/qwen.tiktoken), or, without one, of a byte-level BPE
vocabulary that is made here of pairs and of words by their letters. Libraries that are not installed are
left out: llguidance is what the engine uses; xgrammar needs apache-tvm-ffi and, for its package, torch and
transformers.

A row is one grammar followed along one text, token by token: milliseconds of the processor to compile it,
then microseconds of the processor for each mask and for each token taken in; medians and maxima over the
tokens, in a matcher's first life.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import penstock.assets
from penstock.core.structured import StructuredOutputsParams
from penstock.grammar.compiler import Compiler
from penstock.grammar.prepare import prepare
from penstock.grammar.vocabulary import Vocabulary
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
    },
    "required": ["name", "age", "tags", "address"],
}
PERSON_TEXT = json.dumps(
    {
        "name": "John Smith Émile",
        "age": 42,
        "tags": ["alpha", "beta gamma", "δelta"],
        "address": {"street": '12 Long Road "x" of the world', "zip": "12345"},
    },
    ensure_ascii=False,
)
#: name → (what is asked for, a text that matches)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "schema of a person": ({"json": PERSON}, PERSON_TEXT),
    "any JSON object": ({"json_object": True}, PERSON_TEXT),
    "regex": ({"regex": r"[A-Za-z ]{3,200}: \d{4}-\d{2}-\d{2}"}, "The quick brown fox jumps: 2024-01-02"),
    "regex, letters of Unicode": ({"regex": r"[\p{L} ]{3,200}"}, "The quick brown fox Émile ßüö наверное"),
    "enum of 5,000": ({"json": {"enum": [f"value {i}" for i in range(5000)]}}, '"value 4321"'),
    "text of at most 2,000": ({"json": {"type": "string", "maxLength": 2000}}, f'"{"hello world " * 20}"'),
}


@dataclass(frozen=True)
class Row:
    """One library, vocabulary and grammar."""

    library: str
    vocabulary: int
    grammar: str
    compile_ms: float
    mask_us: float
    mask_max_us: float
    accept_us: float
    tokens: int
    error: str = ""


Follow = Callable[[list[int]], tuple[list[float], list[float]]]
"""Tokens → seconds of each mask, and of each token taken in."""


def guidance(words: Vocabulary) -> Callable[[dict[str, Any]], Follow]:
    """The library behind the seam, through it."""
    compiler = Compiler(words)

    def compile_(asked: dict[str, Any]) -> Follow:
        matcher = compiler.compile(prepare(StructuredOutputsParams(**asked))[0]).matcher()
        masks = compiler.masks(1)

        def follow(ids: list[int]) -> tuple[list[float], list[float]]:
            filled, taken = [], []
            for count in range(1, len(ids) + 1):
                at = time.thread_time()
                matcher.fill(masks, 0)
                middle = time.thread_time()
                matcher.follow(ids[:count])
                taken.append(time.thread_time() - middle)
                filled.append(middle - at)
            if matcher.error:
                raise ValueError(matcher.error)
            return filled, taken

        return follow

    return compile_


def xgrammar(words: Vocabulary) -> Callable[[dict[str, Any]], Follow]:
    """The other one, as vLLM uses it. Raises ImportError."""
    import xgrammar as library

    pieces = _pieces(words)
    info = library.TokenizerInfo(
        pieces, vocab_type=library.VocabType.RAW, vocab_size=words.size, stop_token_ids=list(words.eos_ids)
    )
    compiler = library.GrammarCompiler(info, cache_enabled=False, max_threads=1)

    def compile_(asked: dict[str, Any]) -> Follow:
        if "json" in asked:
            compiled = compiler.compile_json_schema(
                json.dumps(asked["json"]), any_whitespace=True, strict_mode=False
            )
        elif "json_object" in asked:
            compiled = compiler.compile_builtin_json_grammar()
        else:
            compiled = compiler.compile_regex(asked["regex"])
        matcher = library.GrammarMatcher(compiled)
        mask = library.allocate_token_bitmask(1, words.size)

        def follow(ids: list[int]) -> tuple[list[float], list[float]]:
            filled, taken = [], []
            for token in ids:
                at = time.thread_time()
                matcher.fill_next_token_bitmask(mask)
                middle = time.thread_time()
                accepted = matcher.accept_token(token)
                taken.append(time.thread_time() - middle)
                filled.append(middle - at)
                if not accepted:
                    raise ValueError(f"token {token} is refused")
            return filled, taken

        return follow

    return compile_


def measure(name: str, make: Callable[[Vocabulary], Any], words: Vocabulary) -> Iterator[Row]:
    """Every case."""
    tokenizer = _encoder(words)
    began = time.process_time()
    compile_ = make(words)
    yield Row(name, words.size, "(the vocabulary)", 1e3 * (time.process_time() - began), 0, 0, 0, 0)
    for case, (asked, text) in CASES.items():
        began = time.process_time()
        try:
            follow = compile_(asked)
            took = time.process_time() - began
            ids = tokenizer(text)
            filled, taken = follow(ids)
        except Exception as error:
            yield Row(name, words.size, case, 0, 0, 0, 0, 0, str(error).splitlines()[0][:120])
            continue
        yield Row(
            name,
            words.size,
            case,
            round(1e3 * took, 2),
            round(1e6 * statistics.median(filled), 1),
            round(1e6 * max(filled), 1),
            round(1e6 * statistics.median(taken), 1),
            len(ids),
        )


def large(file: Path | None) -> Vocabulary:
    """150,000 tokens: of a file, or made."""
    if file is not None:
        pieces = [base64.b64decode(line.split()[0]) for line in file.read_bytes().splitlines()]
    else:
        letters = b"etaoinshrdlucmfwypvbgk"
        pieces = [bytes([each]) for each in range(256)]
        pieces += [bytes(pair) for pair in itertools.product(range(32, 127), repeat=2)]
        words = itertools.chain.from_iterable(itertools.product(letters, repeat=size) for size in (3, 4))
        for word in words:
            pieces += [bytes(word), b" " + bytes(word)]
            if len(pieces) >= 151_000:
                break
        pieces = list(dict.fromkeys(pieces))
    alphabet = _alphabet()
    vocab = {"".join(alphabet[byte] for byte in piece): place for place, piece in enumerate(pieces)}
    end = len(pieces)
    text = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                | {"id": end, "content": "<|endoftext|>", "special": True}
            ],
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )
    return Vocabulary(text, end + 1, (end,), (("<|endoftext|>", end),))


def _pieces(words: Vocabulary) -> list[bytes]:
    state = json.loads(words.tokenizer)
    byte_of = {character: byte for byte, character in _alphabet().items()}
    pieces = [b""] * words.size
    for piece, id in state["model"]["vocab"].items():
        pieces[id] = bytes(byte_of[character] for character in piece) if set(piece) <= byte_of.keys() else b""
    for text, id in words.special:
        pieces[id] = text.encode()
    return pieces


def _encoder(words: Vocabulary) -> Callable[[str], list[int]]:
    """Longest pieces first: for any vocabulary, whatever its merges."""
    ids = {piece: id for id, piece in enumerate(_pieces(words)) if piece}
    longest = max(map(len, ids))

    def encode(text: str) -> list[int]:
        data, place, found = text.encode(), 0, []
        while place < len(data):
            size = next(
                n for n in range(min(longest, len(data) - place), 0, -1) if data[place : place + n] in ids
            )
            found.append(ids[data[place : place + size]])
            place += size
        return found

    return encode


def _alphabet() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    demo = Tokenizer.from_directory(Path(str(penstock.assets.__file__)).parent / "demo")
    rows: list[Row] = []
    print(f"| {'library':10} | {'tokens':>7} | {'grammar':26} | compile ms | mask µs | worst | accept µs |")
    print("|---|---|---|---|---|---|---|")
    for words in (vocabulary(demo, demo.vocab_size, (2,)), large(args.vocabulary)):
        for name, make in (("llguidance", guidance), ("xgrammar", xgrammar)):
            with contextlib.suppress(ImportError):
                for row in measure(name, make, words):
                    rows.append(row)
                    print(_line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if np.isfinite([row.mask_us for row in rows]).all() else 1


def _line(row: Row) -> str:
    values = row.error or (
        f"{row.compile_ms:10.2f} | {row.mask_us:7.1f} | {row.mask_max_us:5.0f} | {row.accept_us:9.1f}"
    )
    return f"| {row.library:10} | {row.vocabulary:7} | {row.grammar:26} | {values} |"


if __name__ == "__main__":
    sys.exit(main())
