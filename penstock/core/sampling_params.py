"""What a request asks for: plain data; names, defaults and ranges are those of vLLM.

    SamplingParams = Sampling   what the engine needs for every token; travels to it
                   + n, max_tokens, stop strings and how text is made: what is settled before or after it

They know the ranges of their own fields; they do not know the model (vocabulary, context length), which
`verify` is told.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import InvalidRequest, quote
from .structured import StructuredOutputsParams

#: The ranges of all numbers that are not whole, ends included. No value in them makes NaN or infinity of a
#: model's logits in float32: a temperature under 1e-5 is greedy, and a penalty scales by a thousand at most.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),  # 0 excepted
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-3, 1e3),
}
_BIAS = (-100.0, 100.0)
_MOST_NAMED = 128
"""vLLM's MAX_LOGPROB_TOKEN_IDS."""

_MAY_BE_NONE = frozenset({"seed", "logprobs", "prompt_logprobs"})


@dataclass(frozen=True, slots=True)
class ThoughtLimit:
    """How long a reasoning model may think, in tokens of its vocabulary."""

    tokens: int
    """Most tokens of the thought, what the prompt has of it included."""
    end: int
    """The token that ends a thought."""
    forced: tuple[int, ...]
    """What is generated when they are used up; `end` is in it."""
    start: int | None = None
    """The token that begins a thought."""
    begun: bool = False
    """The output begins inside of a thought, whether `start` is in the prompt or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a request are chosen, and what is told of them.

    Raises InvalidRequest, naming the field, when a value is out of range.
    """

    temperature: float = 1.0
    """Divides the logits; [0, 100], 0 means greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability mass; (0, 1]."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the most probable token's probability; [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated; [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every time it was generated; [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in the prompt or the output; [0.001, 1000]."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, each value in [-100, 100]."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these token ids may be generated."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids that may not be generated: the last id of one is forbidden behind the others."""
    extra_args: dict[str, Any] = field(default_factory=dict)
    """For logits processors of the server's owner: vLLM's `vllm_xargs`."""
    seed: int | None = None
    """Makes the sampled tokens of this request repeatable, whatever else is in the batch; -1 means none."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output."""
    ignore_eos: bool = False
    """Do not stop at the end-of-sequence token."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens, also with ignore_eos."""
    logprobs: int | None = None
    """Return the logprob of each token and of this many most probable ones; -1 means the whole vocabulary.
    With logprob_token_ids it is their number."""
    logprob_token_ids: tuple[int, ...] | None = None
    """Return the logprobs of these tokens instead of the most probable ones; at most 128, as in vLLM."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    thought: ThoughtLimit | None = None
    """After how many tokens a thought is ended: SamplingParams.thinking_token_budget, for one model."""

    def __post_init__(self) -> None:
        self._normalise()
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidRequest(f"{name} must be a number, got {quote(value)}.", param=name)
            _in_range(name, value, low, high, over=name == "top_p")
            # equal parameters are equal in a log, too: 1 and 1.0, 0.0 and -0.0
            object.__setattr__(self, name, float(value) + 0.0)
        for name in ("top_k", "min_tokens", "seed", "logprobs", "prompt_logprobs"):
            _integer(name, getattr(self, name), name in _MAY_BE_NONE)
        if self.top_k < -1:
            raise InvalidRequest(
                f"top_k must be -1 or 0 (off) or at least 1, got {self.top_k}.", param="top_k"
            )
        low, high = _BIAS
        for token, bias in self.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not low <= bias <= high:
                raise InvalidRequest(
                    f"logit_bias values must be numbers in [{low:g}, {high:g}], got {quote(bias)} "
                    f"for token {quote(token)}.",
                    param="logit_bias",
                )
        if self.min_tokens < 0:
            raise InvalidRequest(f"min_tokens must be at least 0, got {self.min_tokens}.", param="min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count < -1:
                raise InvalidRequest(f"{name} must be -1 or at least 0, got {count}.", param=name)
        self._check_named()
        if any(not ids for ids in self.bad_words_ids):
            raise InvalidRequest("bad_words must not contain an empty text.", param="bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty.", param="allowed_token_ids")

    def _normalise(self) -> None:
        """What vLLM's users write: None for empty, any sequence, seed -1 for none."""
        bias: object = self.logit_bias
        if bias is None:
            object.__setattr__(self, "logit_bias", {})
        ids: object = self.stop_token_ids
        if ids is None:
            object.__setattr__(self, "stop_token_ids", ())
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                object.__setattr__(self, name, tuple(value))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    def _check_named(self) -> None:
        """logprob_token_ids: each once, and `logprobs` is their number."""
        named = tuple(dict.fromkeys(self.logprob_token_ids or ()))
        object.__setattr__(self, "logprob_token_ids", named or None)
        if not named:
            return
        if len(named) > _MOST_NAMED:
            raise InvalidRequest(
                f"logprob_token_ids must be at most {_MOST_NAMED} token ids, got {len(named)}.",
                param="logprob_token_ids",
            )
        if self.logprobs not in (None, len(named)):
            raise InvalidRequest(
                f"logprobs must be the number of logprob_token_ids ({len(named)}) where those are given, got "
                f"{self.logprobs}.",
                param="logprobs",
                advice="Leave it out.",
            )
        object.__setattr__(self, "logprobs", len(named))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken; as in vLLM, a temperature under 1e-5 counts as 0."""
        return self.temperature < 1e-5

    def verify(self, vocab_size: int, max_logprobs: int, limit: str = "") -> None:
        """Check what depends on the model and the server. Raises InvalidRequest naming the field.

        max_logprobs: -1 for any number. limit: what sets it, for the advice.
        """
        for name, tokens in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logprob_token_ids", self.logprob_token_ids or ()),
            ("bad_words", itertools.chain.from_iterable(self.bad_words_ids)),
        ):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(
                        f"{name} contains token id {quote(token)}; the vocabulary has ids 0 to "
                        f"{vocab_size - 1}.",
                        param=name,
                    )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is None or max_logprobs == -1 or (name == "logprobs" and self.logprob_token_ids):
                continue
            if (vocab_size if count == -1 else count) > max_logprobs:
                raise InvalidRequest(
                    f"{name} must be at most {max_logprobs}, got {count}.",
                    param=name,
                    advice=f"The server's limit is set by {limit}." if limit else "",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Sampling):
    """Everything that may be asked of one generation.

    Raises InvalidRequest, naming the field, when a value is out of range.
    """

    n: int = 1
    """Number of completions of the same prompt."""
    max_tokens: int | None = 16
    """Largest number of generated tokens; None means up to the context length."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not part of it unless include_stop_str_in_output."""
    include_stop_str_in_output: bool = False
    """Keep the stop string (or stop token's text) at the end of the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility: fast tokenizers put no spaces of their own there."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated; the tokenizer makes `bad_words_ids` of them."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the text must match: it becomes the `grammar` of the engine's request."""
    thinking_token_budget: int | None = None
    """Most tokens of a reasoning model's thought, whose end is generated then; -1 and None are no limit. The
    tokenizer makes `thought` of it."""

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        given: object = self.stop
        if isinstance(given, str) or given is None:
            object.__setattr__(self, "stop", () if given is None else (given,))
        elif not isinstance(given, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        words: object = self.bad_words
        if not isinstance(words, tuple):
            object.__setattr__(self, "bad_words", () if words is None else tuple(self.bad_words))
        if any(not isinstance(word, str) or not word.strip() for word in self.bad_words):
            raise InvalidRequest(
                f"bad_words must be texts that are not blank, got {quote(self.bad_words)}.", param="bad_words"
            )
        _integer("thinking_token_budget", self.thinking_token_budget, may_be_none=True)
        if self.thinking_token_budget == -1:
            object.__setattr__(self, "thinking_token_budget", None)
        if self.thinking_token_budget is not None and self.thinking_token_budget < 0:
            raise InvalidRequest(
                "thinking_token_budget must be at least 0, or -1 for no limit, got "
                f"{self.thinking_token_budget}.",
                param="thinking_token_budget",
            )
        _integer("n", self.n)
        _integer("max_tokens", self.max_tokens, may_be_none=True)
        _in_range("n", self.n, 1, 128)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}.", param="max_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must not be over max_tokens={self.max_tokens}, got {self.min_tokens}.",
                param="min_tokens",
            )
        if any(not text for text in self.stop):
            raise InvalidRequest("stop must not contain an empty string.", param="stop")

    @property
    def sampling(self) -> Sampling:
        """The engine's part. The values were checked when this was made, and are not again."""
        part = object.__new__(Sampling)
        for name in _ENGINE:
            object.__setattr__(part, name, getattr(self, name))
        return part

    def with_(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


_ENGINE = tuple(entry.name for entry in fields(Sampling))


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """What may be asked of a search, under vLLM's names. Raises InvalidRequest, naming the field."""

    beam_width: int
    """Beams that go on, and continuations in the end; [1, 128]."""
    max_tokens: int
    """Of a continuation."""
    ignore_eos: bool = False
    """Do not stop at the end-of-sequence token."""
    temperature: float = 0.0
    """vLLM's; nothing is drawn, and logprobs are those before it."""
    length_penalty: float = 1.0
    """Exponent of the length by which sums of logprobs are divided; [-10, 10]."""
    include_stop_str_in_output: bool = False
    """Keep the token that ended a continuation."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        for name, low, high in (("beam_width", 1, 128), ("max_tokens", 1, None), ("length_penalty", -10, 10)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
                raise InvalidRequest(f"{name} must be at least {low}, got {quote(value)}.", param=name)
            if high is not None and value > high:
                raise InvalidRequest(f"{name} must be at most {high}, got {quote(value)}.", param=name)


def _integer(name: str, value: object, may_be_none: bool = False) -> None:
    if may_be_none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {quote(value)}.", param=name)
    if not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name} must fit in 64 bits, got {quote(value)}.", param=name)


def _in_range(name: str, value: float, low: float, high: float, over: bool = False) -> None:
    """over: `low` itself is outside."""
    if not low <= value <= high or (over and value == low):  # NaN is in no range
        raise InvalidRequest(
            f"{name} must be in {'(' if over else '['}{low:g}, {high:g}], got {quote(value)}.",
            param=name,
        )
