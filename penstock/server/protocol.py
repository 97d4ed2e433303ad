"""Requests as typed Structs, and decoding them from JSON with an error that names the field at fault.

It knows shapes and types. Ranges are the business of `SamplingParams`, meanings that of each API family.
Sampling fields have OpenAI's and vLLM's names; a value of None says that the client left it open.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

import msgspec

from penstock.core.errors import InvalidRequest, quote

from .fields import (
    CHAT_BATCH_NEUTRAL,
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    IGNORED,
    OTHERS,
    TOKENIZE_NEUTRAL,
    Rule,
    check,
    check_size,
)
from .ignored import Ignored
from .lax import convert
from .near import Names


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`. Unknown names in it are the business of `fields`."""

    include_usage: bool | None = False
    """Send one more chunk, with empty choices, that carries the usage."""
    continuous_usage_stats: bool | None = False
    """Send the usage so far in every chunk."""
    include_obfuscation: bool | None = False
    """OpenAI's padding against traffic analysis; accepted, not done."""


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""vLLM 0.32's."""


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Any body that `decode` takes."""

    neutral: ClassVar[Mapping[str, Rule]] = {}
    """Fields that the API has and this server does not, and what must be true of their values (`fields`)."""
    numbers_only: ClassVar[frozenset[str]] = frozenset()
    """Fields in which vLLM reads no text as a number."""
    foreign: ClassVar[bool] = False
    """Whether its names are of an API that nobody mixes with the others: there they are typing errors."""


class Request(Body, frozen=True, kw_only=True):
    """What the pipeline reads of any request."""

    model: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None


class GenerateRequest(Request, frozen=True, kw_only=True):
    """What endpoints share that generate text."""

    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None

    # ---- sampling: what is left open comes from the model's generation_config, then from OpenAI ----
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] = {}
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    """Of these tokens, beside the sampled one, instead of the most probable ones; with `logprobs`."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    bad_words: list[str] = []
    vllm_xargs: dict[str, Any] = {}
    """Handed to the server's own logits processors; without them it changes nothing."""
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    """vLLM's: JSON schema, regex, choice, grammar, structural tag."""
    thinking_token_budget: int | None = None
    """Most tokens of a thought, with --reasoning-parser; -1 is no limit."""

    use_beam_search: bool = False
    """Search for the n most probable continuations, instead of sampling."""
    length_penalty: float = 1.0
    """With use_beam_search: the exponent of the length by which sums of logprobs are divided."""

    # ---- answer ----
    echo: bool = False
    return_token_ids: bool = False
    generated_token_ids: list[int] = []
    """What another engine had generated: the answer goes on behind it."""
    return_tokens_as_token_ids: bool | None = None
    """By default, what the server is configured to do."""


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    neutral: ClassVar[Mapping[str, Rule]] = COMPLETION_NEUTRAL
    numbers_only: ClassVar[frozenset[str]] = frozenset({"prompt_logprobs", "logprobs"})

    prompt: str | list[Any] | None = None
    """Text, texts, token ids, or lists of token ids; required."""
    max_tokens: int | None = None
    """16 if not given, or null."""
    logprobs: int | None = None
    suffix: str = ""
    """What comes behind the gap, for models that were trained to fill one."""
    best_of: int | None = None
    """Sequences of each prompt, of which the n with the greatest mean logprob are told."""


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, Rule]] = CHAT_NEUTRAL
    numbers_only: ClassVar[frozenset[str]] = frozenset({"prompt_logprobs", "top_logprobs"})

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool | None = None
    """By default, unless the final message is to be continued."""
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[Any] = []
    tool_choice: str | dict[str, Any] | None = None
    """none, auto (with tools, the default), required, or the function that is to be called."""
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    """Whether the answer tells what the model thought, where the server can tell it from the rest."""
    reasoning_effort: ReasoningEffort | None = None
    """Handed to the chat template, which it also tells whether to think, as in vLLM."""
    return_prompt_text: bool = False


class ChatBatchRequest(ChatRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions/batch."""

    neutral: ClassVar[Mapping[str, Rule]] = CHAT_BATCH_NEUTRAL

    messages: list[list[dict[str, Any]]]  # type: ignore[assignment]
    """Conversations."""


class TokenizeCompletionRequest(Body, frozen=True, kw_only=True):
    """POST /tokenize with a text."""

    neutral: ClassVar[Mapping[str, Rule]] = TOKENIZE_NEUTRAL

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Body, frozen=True, kw_only=True):
    """POST /tokenize with messages."""

    neutral: ClassVar[Mapping[str, Rule]] = TOKENIZE_NEUTRAL

    messages: list[dict[str, Any]]
    model: str | None = None
    add_generation_prompt: bool | None = None
    """By default, unless the final message is to be continued."""
    continue_final_message: bool = False
    add_special_tokens: bool = False
    return_token_strs: bool = False
    tools: list[Any] = []
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


@functools.cache
def _names(shape: type[Body]) -> Names:
    """What may be meant by a name that is none of the shape's; the names of other shapes are not."""
    shapes = _shapes(Body)
    known = [each for each in shapes if not each.foreign]
    elsewhere = {name for each in known for name in (*each.__struct_fields__, *each.neutral)}
    own = {*shape.__struct_fields__, *IGNORED, *shape.neutral}
    return Names(own, OTHERS | elsewhere - own)


def _shapes(shape: type[Body]) -> list[type[Body]]:
    return [shape, *(each for below in shape.__subclasses__() for each in _shapes(below))]


@functools.cache
def _kinds(shape: type[Body]) -> dict[str, Any]:
    """The annotations of the fields."""
    hints = get_type_hints(shape)
    return {name: hints[name] for name in shape.__struct_fields__}


R = TypeVar("R", bound=Body)


def decode(raw: Mapping[str, Any], shape: type[R], ignored: Ignored) -> R:
    """A typed request of the fields in `raw`; the names of those that do nothing here go into `ignored`.

    Values of other types are converted as vLLM converts them (`lax`). Raises InvalidRequest, naming the
    field.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    implemented = check(given, shape.__struct_fields__, shape.neutral, _names(shape), ignored)
    try:
        return msgspec.convert(implemented, shape)
    except msgspec.ValidationError:
        pass
    try:
        return msgspec.convert(_converted(implemented, shape), shape)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), implemented, shape) from None


def _converted(given: Mapping[str, Any], shape: type[Body]) -> dict[str, Any]:
    kinds = _kinds(shape)
    converted = {
        name: value if name in shape.numbers_only and isinstance(value, str) else convert(value, kinds[name])
        for name, value in given.items()
    }
    for name, value in converted.items():
        check_size(name, value)
    return converted


_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")


def _invalid(message: str, given: Mapping[str, Any], shape: type[Body]) -> InvalidRequest:
    """msgspec's "Expected `int`, got `str` - at `$.n`" as an error of the field."""
    what, found, path = message.rpartition(" - at `$")  # the value may be 10 MB, and hold anything
    what, path = (what, path.removeprefix(".").removesuffix("`")) if found else (message, "")
    if missing := _MISSING.match(what):
        field = ".".join(part for part in (path, missing["field"]) if part)
        return InvalidRequest(f"Missing required parameter: {field}.", param=field)
    if what.startswith("Invalid enum value"):
        choices = [each for kind in get_args(_kinds(shape)[path]) for each in get_args(kind)]
        choices = choices or list(get_args(_kinds(shape)[path]))
        return InvalidRequest(
            f"{path} must be one of {', '.join(choices)}, got {quote(given[path])}.", param=path
        )
    what = what.replace("`", "")
    error = InvalidRequest(f"Invalid type for {path}: {what[:1].lower()}{what[1:]}.", param=path or None)
    error.code = "invalid_type"
    return error
