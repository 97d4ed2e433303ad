"""Which request fields exist, and what becomes of each: the tables, and the check against them.

    implemented    a field of the request's Struct in `protocol`
    ignored        accepted without effect on the output, and documented so (IGNORED)
    neutral only   known to OpenAI's or vLLM's API but not served here: accepted where the value changes
                   nothing, else a 400 `unsupported_parameter` that names the field (*_NEUTRAL)
    unknown        a 400 that names the field and the nearest known one

A field is never dropped silently. `null` means "not given" everywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, brief, quote

#: Accepted and without effect: bookkeeping of the caller, hints for infrastructure that is not here.
IGNORED = frozenset(
    {
        "metadata",
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

_LONGEST_NAME = 64
"""Characters of a name that is compared with those of fields, and shown; all known ones are shorter."""

Rule = Callable[[Any, Mapping[str, Any]], bool]
"""(value, whole request) → whether the value changes nothing."""


def _one_of(*values: Any) -> Rule:
    # `is` on the type as well: 0 == False, and a wrong type is not neutral
    return lambda value, _: any(type(value) is type(known) and value == known for known in values)


def _number(wanted: float) -> Rule:
    return lambda value, _: isinstance(value, int | float) and value == wanted


def _empty(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, list | dict | str) and not value


def _never(_value: Any, _request: Mapping[str, Any]) -> bool:
    return False


def _as_many_as_n(value: Any, request: Mapping[str, Any]) -> bool:
    n = request.get("n", 1)
    return isinstance(value, int) and not isinstance(value, bool) and value == n


#: Known to both API families, not implemented.
_NEUTRAL: dict[str, Rule] = {
    "bad_words": _empty,
    "early_stopping": _one_of(False),
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
    "logprob_token_ids": _empty,
    "repetition_detection": _never,
    "response_format": _one_of({"type": "text"}),
    "return_mm_kwargs": _one_of(True),
    "return_token_offsets": _one_of(False),
    "routed_experts_prompt_start": _one_of(0),
    "structured_outputs": _empty,
    "thinking_token_budget": _one_of(-1),
    "use_beam_search": _one_of(False),
    "vllm_xargs": _empty,
    "watermarking": _one_of(False),
}

CHAT_NEUTRAL: dict[str, Rule] = {
    **_NEUTRAL,
    "audio": _never,
    "function_call": _one_of("none", "auto"),
    "functions": _empty,
    "include_reasoning": _one_of(True),
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
    "prompt_embeds": _empty,
    "suffix": _empty,
}

TOKENIZE_NEUTRAL: dict[str, Rule] = {
    "media_io_kwargs": _empty,
    "mm_processor_kwargs": _empty,
    "tools": _empty,
}


def check(
    request: Mapping[str, Any], implemented: Collection[str], neutral: Mapping[str, Rule]
) -> dict[str, Any]:
    """The implemented fields of `request` (which holds no nulls).

    Raises UnsupportedParameter or InvalidRequest, naming the field.
    """
    kept: dict[str, Any] = {}
    for name, value in request.items():
        if name in implemented:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise InvalidRequest(f"{name} must fit in 64 bits, got {quote(value)}.", param=name)
            kept[name] = value
        elif name in IGNORED:
            continue
        elif (rule := neutral.get(name)) is None:
            raise _unknown(name, [*implemented, *IGNORED, *neutral])
        elif not rule(value, request):
            raise UnsupportedParameter(
                f"{name} is not supported by this server (got {quote(value)}).",
                param=name,
                advice="Leave it out.",
            )
    return kept


def made_up(name: str) -> str:
    """The name of a field that a client made up, as a message may show it."""
    return brief(name, _LONGEST_NAME)


def _unknown(name: str, known: Collection[str]) -> InvalidRequest:
    # comparing costs the square of the length; what is much longer than every name is near none
    near = (
        difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6) if len(name) <= _LONGEST_NAME else []
    )
    error = InvalidRequest(
        f"Unrecognized request argument supplied: {made_up(name)}.",
        param=made_up(name),
        advice=f"Did you mean {near[0]}?" if near else "",
    )
    error.code = "unknown_parameter"
    return error
