"""Which request fields exist, and what becomes of each: the tables, and the check against them.

    implemented    a field of the request's Struct in `protocol`
    ignored        served; nothing here depends on it (IGNORED)
    moved          known under another name at this endpoint: a 400 that says which (Moved)
    neutral only   known to OpenAI's or vLLM's API but not served here: accepted where the value changes
                   nothing, else a 400 `unsupported_parameter` that names the field (*_NEUTRAL), or served and
                   ignored as vLLM does (HARMLESS)
    unknown        a typing error for one of the above is a 400 that names both; anything else, and what is
                   known to be sent by other clients (OTHERS), is served and ignored

What is ignored is named each time (`ignored`). `null` means "not given" everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote

from .ignored import Ignored
from .lax import number, truth
from .near import Names

#: Accepted and without effect: bookkeeping of the caller, hints for infrastructure that is not here, and what
#: vLLM takes and has no use for on these endpoints.
IGNORED = frozenset(
    {
        "diagnostics",
        "metadata",
        "mm_payload",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
        "user_profile_id",
        "workspace_id",
    }
)

#: Fields of other servers and newer clients, which vLLM answers, too: no typing errors, however near they are
#: to the name of a known field.
OTHERS = frozenset(
    {
        "chat_id",
        "do_sample",
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
        "top_a",
        "transforms",
        "verbosity",
    }
)

#: Neutral fields whose other values do nothing in vLLM either, or do not change what an answer says: ignored
#: then, but for --strict-fields.
HARMLESS = frozenset(
    {
        "early_stopping",
        "max_tool_calls",
        "prediction",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "verbosity",
    }
)

#: Fields of older vLLMs → what they are now.
REPLACED = {
    "guided_json": 'structured_outputs: {"json": …}, or response_format',
    "guided_regex": 'structured_outputs: {"regex": …}',
    "guided_choice": 'structured_outputs: {"choice": […]}',
    "guided_grammar": 'structured_outputs: {"grammar": …}',
    "guided_json_object": 'structured_outputs: {"json_object": true}',
    "guided_decoding_backend": "--structured-outputs-config.backend when the server starts",
    "guided_whitespace_pattern": 'structured_outputs: {…, "whitespace_pattern": …}',
    "structural_tag": 'structured_outputs: {"structural_tag": …}',
    "normalize": "use_activation",
}

#: Fields of older OpenAI clients → what does it today.
INSTEAD = {
    "functions": "Send them as tools.",
    "function_call": "Send it as tool_choice.",
}

Rule = Callable[[Any, Mapping[str, Any]], bool]
"""(value, whole request) → whether the value changes nothing."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A rule: the field has another name at this endpoint, and changes nothing only beside that one."""

    to: str
    """With dots, within objects."""

    def __call__(self, _value: Any, request: Mapping[str, Any]) -> bool:
        given: Any = request
        for name in self.to.split("."):
            given = given.get(name) if isinstance(given, dict) else None
        return given is not None


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


#: Known to both API families, not implemented.
_NEUTRAL: dict[str, Rule] = {
    "early_stopping": _flag(False),
    "ec_transfer_params": _empty,
    "guided_choice": _never,
    "guided_decoding_backend": _never,
    "guided_grammar": _never,
    "guided_json": _never,
    "guided_json_object": _never,
    "guided_regex": _never,
    "guided_whitespace_pattern": _never,
    "kv_transfer_params": _empty,
    "logits_processors": _empty,
    "repetition_detection": _never,
    "return_mm_kwargs": _flag(True),
    "return_token_offsets": _flag(False),
    "routed_experts_prompt_start": _number(0),
    "watermarking": _flag(False),
}

CHAT_NEUTRAL: dict[str, Rule] = {
    **_NEUTRAL,
    "audio": _never,
    "function_call": _one_of("none", "auto"),
    "functions": _empty,
    "max_output_tokens": Moved("max_completion_tokens"),
    "media_io_kwargs": _empty,
    "mm_processor_kwargs": _empty,
    "modalities": _one_of(["text"]),
    "prediction": _never,
    "verbosity": _one_of("medium"),
    "web_search_options": _never,
}

#: Of many conversations in one request.
CHAT_BATCH_NEUTRAL: dict[str, Rule] = {**CHAT_NEUTRAL, "best_of": _number(1)}

COMPLETION_NEUTRAL: dict[str, Rule] = {
    **_NEUTRAL,
    "functions": _empty,
    "prompt_embeds": _empty,
    "tools": _empty,
}

MESSAGES_NEUTRAL: dict[str, Rule] = {
    "container": _never,
    "context_management": _empty,
    "ec_transfer_params": _empty,
    "inference_geo": _one_of("global"),
    "kv_transfer_params": _empty,
    "max_completion_tokens": Moved("max_tokens"),
    "max_output_tokens": Moved("max_tokens"),
    "mcp_servers": _empty,
    "return_mm_kwargs": _flag(True),
    "speed": _one_of("standard"),
    "stop": Moved("stop_sequences"),
    "vllm_xargs": _empty,
    "watermarking": _flag(False),
}

RESPONSES_NEUTRAL: dict[str, Rule] = {
    "context_management": _empty,
    "conversation": _never,
    "ec_transfer_params": _empty,
    "enable_response_messages": _flag(False),
    "kv_transfer_params": _empty,
    "max_completion_tokens": Moved("max_output_tokens"),
    "max_tokens": Moved("max_output_tokens"),
    "max_tool_calls": _never,
    "media_io_kwargs": _empty,
    "messages": Moved("input"),
    "mm_processor_kwargs": _empty,
    "previous_input_messages": _empty,
    "prompt": _never,
    "reasoning_effort": Moved("reasoning.effort"),
    "response_format": Moved("text.format"),
    "return_mm_kwargs": _flag(True),
    "vllm_xargs": _empty,
    "watermarking": _flag(False),
}

TOKENIZE_NEUTRAL: dict[str, Rule] = {
    "media_io_kwargs": _empty,
    "mm_processor_kwargs": _empty,
}


#: Of requests for vectors, scores and classes.
POOLING_NEUTRAL: dict[str, Rule] = {
    "max_chunks_per_doc": _number(1),
    "media_io_kwargs": _empty,
    "mm_processor_kwargs": _empty,
    "normalize": _never,
    "padding": _one_of("do_not_pad"),
    "rank_fields": _one_of(["text"]),
}


COHERE_NEUTRAL: dict[str, Rule] = {**POOLING_NEUTRAL, "images": _empty}


#: Fields that are objects → the names in them.
_INSIDE = {
    "stream_options": Names({"include_usage", "continuous_usage_stats", "include_obfuscation"}),
    "response_format": Names({"type", "json_schema", "structures", "triggers", "format"}),
    "structured_outputs": Names(
        {
            *("json", "regex", "choice", "grammar", "json_object", "structural_tag", "strict"),
            *("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"),
        },
        # vLLM's, of old and of its own
        {"disable_fallback", "backend", "_backend", "_backend_was_auto"},
    ),
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
        elif (new := REPLACED.get(name)) is not None:
            raise UnsupportedParameter(
                f"{name} was removed from vLLM, and is not supported by this server.",
                param=name,
                advice=f"Use {new}.",
            )
        elif isinstance(rule, Moved) and not rule(value, request):
            raise UnsupportedParameter(
                f"{name} is not a field of this endpoint.", param=name, advice=f"It is {rule.to} here."
            )
        elif not rule(value, request):
            if name not in HARMLESS or ignored.strict:
                raise UnsupportedParameter(
                    f"{name} is not supported by this server (got {quote(value)}).",
                    param=name,
                    advice=INSTEAD.get(name, "Leave it out."),
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
