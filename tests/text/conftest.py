"""Small real tokenizers of every kind, made here in milliseconds, the same in every run."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from penstock.text.tokenizer import Tokenizer

CORPUS = [
    "The engine keeps the keys and values of every request in blocks of sixteen tokens.",
    "A Pod is the smallest unit that Kubernetes schedules; hello world, hello there!",
    "Ünïcödé wörds, naïve café — 你好，世界。こんにちは世界 привет мир",
    "emoji 😀 👩‍👩‍👧‍👦 🏳️‍🌈 done",
    "def main():\n    return 1\n\n\tprint('x')  # 42",
] * 3
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def save(rust: RustTokenizer, directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    rust.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def learn_bpe(words: list[str], merges: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Alphabet and merges; the library's own trainer breaks ties differently in every process."""
    pieces = [list(word) for word in words]
    learnt: list[tuple[str, str]] = []
    for _ in range(merges):
        pairs = Counter(pair for word in pieces for pair in pairwise(word))
        if not pairs:
            break
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(pair)
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = ["".join(pair)]
                i += 1
    return sorted({character for word in words for character in word}), learnt


def words_of(rust: RustTokenizer, corpus: list[str]) -> list[str]:
    """The corpus as the model behind `rust` gets it."""
    return [
        word
        for text in corpus
        for word, _ in rust.pre_tokenizer.pre_tokenize_str(
            rust.normalizer.normalize_str(text) if rust.normalizer else text
        )
    ]


def numbered(*groups: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(token for group in groups for token in group))}


def byte_level() -> RustTokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _, merges = learn_bpe(words_of(rust, CORPUS), 120)
    vocab = numbered(sorted(pre_tokenizers.ByteLevel.alphabet()), ["".join(pair) for pair in merges])
    rust.model = models.BPE(vocab=vocab, merges=merges)
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.ByteLevel(trim_offsets=False)
    rust.add_special_tokens(SPECIAL)
    return rust


def sentencepiece() -> RustTokenizer:
    """As Llama 2 and Mistral have it: ▁ for spaces, bytes for what is not in the vocabulary."""
    rust = RustTokenizer(models.BPE())
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet, merges = learn_bpe(words_of(rust, CORPUS[:2] + CORPUS[4:5]), 120)
    rust = RustTokenizer(
        models.BPE(
            vocab=numbered(
                ["<unk>", *SPECIAL],
                [f"<0x{byte:02X}>" for byte in range(256)],
                [character for character in alphabet if character != "\n"],
                ["".join(pair) for pair in merges if "\n" not in "".join(pair)],
            ),
            merges=[pair for pair in merges if "\n" not in "".join(pair)],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens(["<unk>", *SPECIAL])
    rust.post_processor = processors.TemplateProcessing(
        single=["<s>:0", "$A:0"], special_tokens=[("<s>", rust.token_to_id("<s>"))]
    )
    return rust


def gemma() -> RustTokenizer:
    """SentencePiece without a space before the first word."""
    rust = sentencepiece()
    rust.normalizer = normalizers.Replace(" ", "▁")
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return rust


def metaspace() -> RustTokenizer:
    """A decoder that only the library understands (as T5 has it)."""
    rust = sentencepiece()
    rust.decoder = decoders.Metaspace()
    return rust


def wordpiece() -> RustTokenizer:
    """Pieces joined by the decoder (as BERT has it)."""
    rust = RustTokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = words_of(rust, CORPUS)
    alphabet = sorted({character for word in words for character in word})
    vocab = numbered(["[UNK]", *SPECIAL], alphabet, [f"##{c}" for c in alphabet], sorted(set(words))[::2])
    rust.model = models.WordPiece(vocab, unk_token="[UNK]")
    rust.decoder = decoders.WordPiece(cleanup=False)
    rust.add_special_tokens(["[UNK]", *SPECIAL])
    return rust


KINDS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "gemma": gemma,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories by kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: save(make(), root / name) for name, make in KINDS.items()}


@pytest.fixture(scope="session")
def tokenizers(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    """Tokenizers by kind."""
    return {name: Tokenizer.from_directory(path) for name, path in directories.items()}


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """A byte-level model directory that a test may change."""
    return save(byte_level(), tmp_path / "model")
