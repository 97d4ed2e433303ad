"""What is sent: random prompts of a wanted length, and prompts read from JSON lines.

Everything is drawn beforehand from a seeded generator: the same arguments give the same prompts on
every machine. Knows no tokenizer. Exact lengths come from token-id prompts; text prompts are made of
common words, whose real length the server reports in `usage.prompt_tokens`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from penstock.bench.errors import BenchError

PromptFormat = Literal["text", "token-ids"]

FIRST_TOKEN_ID = 100
"""Random token ids start here: the special tokens of most vocabularies lie below."""

# Each word is one token in the vocabulary of nearly every model, when a space stands before it.
_TEXT = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force
"""
WORDS = tuple(_TEXT.split())
"""What random text prompts are made of."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to be: what to say and how many tokens to ask for."""

    content: str | list[int] | list[dict[str, Any]]
    """Text, token ids (completions only), or chat messages (chat completions only)."""
    max_tokens: int
    """Output tokens asked for."""
    input_tokens: int | None = None
    """Length in tokens where it is known beforehand (token ids), else None."""

    def body(self, *, chat: bool) -> dict[str, Any]:
        """The part of the request body that says what to generate from, and how much."""
        if not chat:
            return {"prompt": self.content, "max_tokens": self.max_tokens}
        messages = (
            [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content
        )
        return {"messages": messages, "max_completion_tokens": self.max_tokens}


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Prompts of random content; lengths in tokens."""

    input_len: int = 1024
    """Mean length of the part that differs from request to request."""
    output_len: int = 128
    """Mean number of output tokens asked for."""
    range_ratio: float = 0.0
    """Both lengths are uniform in [len·(1 - r), len·(1 + r)]."""
    prefix_len: int = 0
    """Length of a prefix shared by all prompts, in addition to `input_len`."""
    format: PromptFormat = "token-ids"
    vocab_size: int = 1000
    """Token ids are drawn below this; must not exceed the vocabulary of the model."""
    tokens_per_word: float = 1.0
    """Measured by the caller for text prompts; word counts are divided by it."""

    def __post_init__(self) -> None:
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0:
            raise BenchError(
                f"input length {self.input_len}, output length {self.output_len} and prefix length "
                f"{self.prefix_len} must be at least 1, 1 and 0 tokens"
            )
        if not 0 <= self.range_ratio < 1:
            raise BenchError(f"--random-range-ratio is {self.range_ratio}; it must be in [0, 1)")
        if self.vocab_size < 2:
            raise BenchError(f"--vocab-size is {self.vocab_size}; it must be at least 2")

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """Draw `count` prompts."""
        return list(islice(self.stream(seed), count))

    def stream(self, seed: int) -> Iterator[Prompt]:
        """Draw prompts without end."""
        rng = random.Random(seed)
        prefix = self._units(rng, self.prefix_len)
        while True:
            yield self._prompt(rng, prefix)

    def _prompt(self, rng: random.Random, prefix: Sequence[int]) -> Prompt:
        units = [*prefix, *self._units(rng, self._length(rng, self.input_len))]
        output_len = self._length(rng, self.output_len)
        if self.format == "token-ids":
            return Prompt(units, output_len, len(units))
        return Prompt(" ".join(WORDS[unit] for unit in units), output_len)

    def _length(self, rng: random.Random, mean: int) -> int:
        low = max(1, round(mean * (1 - self.range_ratio)))
        return rng.randint(low, max(low, round(mean * (1 + self.range_ratio))))

    def _units(self, rng: random.Random, tokens: int) -> list[int]:
        if self.format == "token-ids":
            first = min(FIRST_TOKEN_ID, self.vocab_size // 2)
            return [rng.randrange(first, self.vocab_size) for _ in range(tokens)]
        words = 0 if tokens == 0 else max(1, round(tokens / self.tokens_per_word))
        return [rng.randrange(len(WORDS)) for _ in range(words)]


def read_jsonl(path: Path, count: int | None, *, chat: bool, output_len: int) -> list[Prompt]:
    """Read prompts in the order of the file, repeating it until there are `count`; once without a count.

    Each line is an object with `prompt` (text or token ids) or `messages`, and optionally
    `max_tokens` or `output_tokens`; `output_len` is asked for where a line gives neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read --dataset-path {path}: {error}") from error
    prompts = [
        _parse_line(line, f"{path}:{number}", chat=chat, output_len=output_len)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise BenchError(f'{path} has no prompts; write one JSON object per line: {{"prompt": "…"}}')
    return [prompts[index % len(prompts)] for index in range(len(prompts) if count is None else count)]


def _parse_line(line: str, where: str, *, chat: bool, output_len: int) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BenchError(f"{where}: not JSON ({error}); write one JSON object per line") from error
    if not isinstance(row, Mapping) or not (row.get("prompt") or row.get("messages")):
        raise BenchError(f'{where}: needs a non-empty "prompt" (text or token ids) or "messages"')
    max_tokens = row.get("max_tokens", row.get("output_tokens", output_len))
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise BenchError(f"{where}: max_tokens is {max_tokens!r}; it must be a whole number of at least 1")
    if messages := row.get("messages"):
        if not chat:
            raise BenchError(f'{where}: "messages" need --endpoint /v1/chat/completions')
        return Prompt(messages, max_tokens)
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return Prompt(prompt, max_tokens)
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        if chat:
            raise BenchError(f"{where}: token-id prompts need --endpoint /v1/completions")
        return Prompt(prompt, max_tokens, len(prompt))
    raise BenchError(f'{where}: "prompt" must be text or a list of token ids')
