"""Which request fields exist, and what becomes of each: the tables, and the check against them.

    implemented    a field of the request's Struct in `protocol`
    ignored        served; nothing here depends on it (IGNORED)
    neutral only   known to OpenAI's or vLLM's API but not served here: accepted where the value changes
                   nothing, else a 400 `unsupported_parameter` that names the field (*_NEUTRAL), or served and
                   ignored as vLLM does (HARMLESS)
    unknown        a typing error for one of the above is a 400 that names both; anything else, and what is
                   known to be sent by other clients (OTHERS), is served and ignored

What is ignored is named each time (`ignored`). `null` means "not given" everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote

from .ignored import Ignored
from .lax import integer, number, truth
from .near import Names

#: Accepted and without effect: bookkeeping of the caller, hints for infrastructure that is not here, and what
#: vLLM takes and has no use for on these endpoints.
IGNORED = frozenset(
    {
        "metadata",
        "mm_payload",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
    }
)

#: Fields of other servers and newer clients, which vLLM answers, too: no typing errors, however near they are
#: to the name of a known field.
OTHERS = frozenset(
    {
        "best_of",
        "chat_id",
        "do_sample",
        "include_reasoning",
        "keep_alive",
        "max_new_tokens",
        "models",
        "moderation",
        "num_ctx",
        "options",
        "prompt_cache_options",
        "provider",
        "reasoning",
        "repeat_penalty",
        "safe_prompt",
        "stream_options",
        "thinking",
        "tool_choice",
        "top_a",
        "transforms",
        "verbosity",
    }
)

#: Neutral fields whose other values do nothing in vLLM either, or do not change what an answer says: ignored
#: then, but for --strict-fields.
HARMLESS = frozenset(
    {
        "best_of",
        "early_stopping",
        "include_reasoning",
        "length_penalty",
        "prediction",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "verbosity",
        "vllm_xargs",
    }
)

Rule = Callable[[Any, Mapping[str, Any]], bool]
"""(value, whole request) → whether the value changes nothing."""


def _one_of(*values: Any) -> Rule:
    # `is` on the type as well: 0 == False, and a wrong type is not neutral
    return lambda value, _: any(type(value) is type(known) and value == known for known in values)


def _number(wanted: float) -> Rule:
    return lambda value, _: number(value) == wanted


def _flag(wanted: bool) -> Rule:
    return lambda value, _: truth(value) is wanted


def _empty(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, list | dict | str) and not value


def _never(_value: Any, _request: Mapping[str, Any]) -> bool:
    return False


def _text(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


def _as_many_as_n(value: Any, request: Mapping[str, Any]) -> bool:
    return bool(integer(value) == integer(request.get("n", 1)))


#: Known to both API families, not implemented.
_NEUTRAL: dict[str, Rule] = {
    "bad_words": _empty,
    "early_stopping": _flag(False),
    "ec_transfer_params": _empty,
    "guided_choice": _never,
    "guided_decoding_backend": _never,
    "guided_grammar": _never,
    "guided_json": _never,
    "guided_regex": _never,
    "guided_whitespace_pattern": _never,
    "kv_transfer_params": _empty,
    "length_penalty": _number(1.0),
    "logits_processors": _empty,
    "repetition_detection": _never,
    "response_format": _text,
    "return_mm_kwargs": _flag(True),
    "return_token_offsets": _flag(False),
    "routed_experts_prompt_start": _number(0),
    "structured_outputs": _empty,
    "thinking_token_budget": _number(-1),
    "use_beam_search": _flag(False),
    "vllm_xargs": _empty,
    "watermarking": _flag(False),
}

CHAT_NEUTRAL: dict[str, Rule] = {
    **_NEUTRAL,
    "audio": _never,
    "function_call": _one_of("none", "auto"),
    "functions": _empty,
    "include_reasoning": _flag(True),
    "media_io_kwargs": _empty,
    "mm_processor_kwargs": _empty,
    "modalities": _one_of(["text"]),
    "prediction": _never,
    "tool_choice": _one_of("none", "auto"),
    "tools": _empty,
    "verbosity": _one_of("medium"),
    "web_search_options": _never,
}

COMPLETION_NEUTRAL: dict[str, Rule] = {
    **_NEUTRAL,
    "best_of": _as_many_as_n,
    "functions": _empty,
    "prompt_embeds": _empty,
    "suffix": _empty,
    "tools": _empty,
}

TOKENIZE_NEUTRAL: dict[str, Rule] = {
    "media_io_kwargs": _empty,
    "mm_processor_kwargs": _empty,
    "tools": _empty,
}


#: Fields that are objects → the names in them. `type: text` of a response_format is all that is served.
_INSIDE = {
    "stream_options": Names({"include_usage", "continuous_usage_stats", "include_obfuscation"}),
    "response_format": Names({"type"}),
}


def check(
    request: Mapping[str, Any],
    implemented: Collection[str],
    neutral: Mapping[str, Rule],
    names: Names,
    ignored: Ignored,
) -> dict[str, Any]:
    """The implemented fields of `request` (which holds no nulls); what is served and ignored goes into
    `ignored`.

    Args:
        names: of all fields that the endpoint knows.

    Raises UnsupportedParameter or InvalidRequest, naming the field.
    """
    kept: dict[str, Any] = {}
    for name, value in request.items():
        if name in implemented:
            check_size(name, value)
            kept[name] = value
        elif name in IGNORED:
            ignored.add(name)
        elif (rule := neutral.get(name)) is None:
            ignored.unknown(name, names)
        elif not rule(value, request):
            if name not in HARMLESS or ignored.strict:
                raise UnsupportedParameter(
                    f"{name} is not supported by this server (got {quote(value)}).",
                    param=name,
                    advice="Leave it out.",
                )
            ignored.add(name)
        if name in _INSIDE and isinstance(value, dict):
            _check_inside(name, value, ignored)
    return kept


def check_size(name: str, value: Any) -> None:
    """Whole numbers have 64 bits, as on their way to the engine. Raises InvalidRequest, naming the field."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name} must fit in 64 bits, got {quote(value)}.", param=name)


def _check_inside(name: str, value: Mapping[str, Any], ignored: Ignored) -> None:
    """The same for the fields of an object in a request."""
    names = _INSIDE[name]
    for inner, content in value.items():
        if content is not None and inner not in names.known:
            ignored.unknown(inner, names, name)
