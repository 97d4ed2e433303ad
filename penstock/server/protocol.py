"""Requests as typed Structs, and decoding them from JSON with an error that names the field at fault.

It knows shapes and types. Ranges are the business of `SamplingParams`, meanings that of each API family.
Sampling fields have OpenAI's and vLLM's names; a value of None says that the client left it open.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_type_hints

import msgspec

from penstock.core.errors import InvalidRequest

from .fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, TOKENIZE_NEUTRAL, Rule, check, made_up


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = False
    """Send one more chunk, with empty choices, that carries the usage."""
    continuous_usage_stats: bool | None = False
    """Send the usage so far in every chunk."""
    include_obfuscation: bool | None = False
    """OpenAI's padding against traffic analysis; accepted, not done."""


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Any body that `decode` takes."""

    neutral: ClassVar[Mapping[str, Rule]] = {}
    """Fields that the API has and this server does not, and what must be true of their values (`fields`)."""
    null_has_meaning: ClassVar[frozenset[str]] = frozenset()
    """Fields in which null is not the same as nothing."""


class Request(Body, frozen=True, kw_only=True):
    """What the pipeline reads of any request."""

    model: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, Any] = {}
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    # ---- answer ----
    echo: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None
    """By default, what the server is configured to do."""


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    neutral: ClassVar[Mapping[str, Rule]] = COMPLETION_NEUTRAL
    null_has_meaning: ClassVar[frozenset[str]] = frozenset({"max_tokens"})

    prompt: str | list[Any] | None = None
    """Text, texts, token ids, or lists of token ids; required."""
    max_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    """16 if not given; null means up to the context length, as in vLLM."""
    logprobs: int | None = None


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, Rule]] = CHAT_NEUTRAL

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
    reasoning_effort: str | None = None
    """Handed to the chat template, as in vLLM."""
    return_prompt_text: bool = False


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
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


@functools.cache
def _integer_fields(shape: type[Body]) -> frozenset[str]:
    """Fields that take integers, or lists of them, but no other numbers."""
    hints = {name: str(hint) for name, hint in get_type_hints(shape).items()}
    return frozenset(
        name
        for name, hint in hints.items()
        if name in shape.__struct_fields__ and re.search(r"\bint\b", hint) and "float" not in hint
    )


R = TypeVar("R", bound=Body)


def decode(raw: Mapping[str, Any], shape: type[R]) -> R:
    """A typed request of the fields in `raw`. Raises InvalidRequest, naming the field."""
    integers = _integer_fields(shape)
    given = {
        name: _integral(value) if name in integers else value
        for name, value in raw.items()
        if value is not None or name in shape.null_has_meaning
    }
    implemented = check(given, shape.__struct_fields__, shape.neutral)
    try:
        return msgspec.convert(implemented, shape)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def _integral(value: Any) -> Any:
    """5 for 5.0, as in JSON Schema; also in a list."""
    if isinstance(value, list):
        return [_integral(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")


def _invalid(message: str) -> InvalidRequest:
    """msgspec's "Expected `int`, got `str` - at `$.n`" as an error of the field."""
    found = _WHERE.match(message)
    what, path = (found["what"], found["path"] or "") if found else (message, "")
    if missing := _MISSING.match(what):
        field = ".".join(part for part in (path, missing["field"]) if part)
        return InvalidRequest(f"Missing required parameter: {field}.", param=field)
    if unknown := _UNKNOWN.match(what):
        field = ".".join(part for part in (path, made_up(unknown["field"])) if part)
        return InvalidRequest(f"Unrecognized request argument supplied: {field}.", param=field)
    what = what.replace("`", "")
    error = InvalidRequest(f"Invalid type for {path}: {what[:1].lower()}{what[1:]}.", param=path or None)
    error.code = "invalid_type"
    return error
