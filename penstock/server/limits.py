"""How much work one request may be: the flags, and the checks that come before the work does.

    check_body ─▶ JSON ─▶ check_lists ─▶ typed ─▶ check_messages · check_choices ─▶ prompts ─▶ check_answer

Each check is of a number that is known without a loop over what the client sent, or with one over what an
earlier check has bounded. It knows counts and flags, not what the counted things mean.

Limits are for what no honest client sends, and keep a body of --max-body-bytes to a few hundred megabytes of
memory and a fraction of a second of the event loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import InvalidRequest
from penstock.core.sampling_params import SamplingParams
from penstock.http.body import outside_strings, without_escapes
from penstock.http.config import HttpConfig, at_least, option

LOGPROB_BYTES = 128
"""Of a logprob in an answer: `"1234":{"logprob":-1.2345678901234567,"rank":12,"decoded_token":" water"},`."""
TOKEN_BYTES = 8
"""Of a token id in an answer, or of its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitConfig(HttpConfig):
    """Limits of one request. Raises StartupError, naming the flag, for values that cannot work."""

    max_choices: int = option(4096, "Most choices of a request: its prompts times `n`.")
    max_stop_strings: int = option(1024, "Most `stop` strings of a request.")
    max_stop_chars: int = option(16_384, "Most characters of all `stop` strings of a request together.")
    max_listed_tokens: int = option(
        65_536, "Most token ids in each of `logit_bias`, `allowed_token_ids` and `stop_token_ids`."
    )
    max_choice_tokens: int = option(
        1_048_576, "Most token ids in these three lists together, times the choices of the request."
    )
    max_messages: int = option(
        8192, "Most messages of a chat, with their content parts and tool calls counted as well."
    )
    max_body_values: int = option(
        131_072, "Most values in the JSON of a body, names of fields included and token ids of prompts not."
    )
    max_tokenize_length: int = option(
        524_288, "Most characters that /tokenize takes, and token ids that /detokenize takes."
    )
    max_response_bytes: int = option(
        64 * 1024 * 1024,
        "Largest answer that is not streamed, in bytes, as estimated.",
    )

    def __post_init__(self) -> None:
        HttpConfig.__post_init__(self)
        for name in LIMITS:
            at_least(_flag(name), getattr(self, name), 1)


LIMITS = tuple(name for name in LimitConfig.__annotations__)
"""Fields of LimitConfig that are its own."""

_LISTS = {
    "stop": "max_stop_strings",
    "logit_bias": "max_listed_tokens",
    "allowed_token_ids": "max_listed_tokens",
    "stop_token_ids": "max_listed_tokens",
    "logprob_token_ids": "max_listed_tokens",
    "messages": "max_messages",
    "tokens": "max_tokenize_length",
}
"""Field of any body → the limit of its length."""
NUMBER_BYTES = 24
"""Of a number of a vector, as JSON."""
_MARKS = (b"[", b"{", b",", b":")
"""One of them stands before every value and name."""
_HAS_IDS = re.compile(rb'"(?:prompt|tokens|input)"\s*:\s*\[')


def too_much(what: str, got: int, config: LimitConfig, limit: str, param: str | None) -> InvalidRequest:
    """The refusal of `got` `what`, naming the flag of the field `limit`."""
    return InvalidRequest(
        f"{what} must be at most {getattr(config, limit)}, got {got}.",
        param=param,
        advice=f"The server's limit is set by {_flag(limit)}.",
    )


def check_body(body: bytes, config: LimitConfig) -> int:
    """Refuse JSON whose values would take many times its own size: a string, list or object takes 50 to 300
    bytes as a Python object however few it takes in JSON.

    Returns how many values and names the body has, or 0 where those are few, for `check_lists`. What is no
    JSON is counted somehow, and refused later.
    """
    limit = config.max_body_values
    # each comes with one of these marks, so in two bytes; texts may have many of them, but mostly they do not
    if len(body) <= 2 * limit or sum(map(body.count, _MARKS)) + body.count(b'"') <= limit:
        return 0
    bare = without_escapes(body)
    strings = bare.count(b'"') // 2
    if strings > limit:
        raise _too_many_values(strings, config)
    outside = outside_strings(bare)
    if (opened := outside.count(b"[") + outside.count(b"{")) > limit:
        raise _too_many_values(opened, config)
    count = sum(map(outside.count, _MARKS))
    if count > limit and not _HAS_IDS.search(body):
        raise _too_many_values(count, config)
    return count


def check_lists(raw: Mapping[str, Any], values: int, config: LimitConfig) -> None:
    """Refuse long lists before anybody looks at their entries.

    values: from `check_body`. Only token ids of prompts may be many.
    """
    for name, limit in _LISTS.items():
        value = raw.get(name)
        if isinstance(value, list | dict) and len(value) > getattr(config, limit):
            raise too_much(f"The number of entries in {name}", len(value), config, limit, name)
    field = "input" if raw.get("prompt") is None else "prompt"
    prompt = raw.get(field)
    ids = 0
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int | float):
            ids = len(prompt)
        elif len(prompt) > config.max_choices:
            raise too_much("The number of prompts", len(prompt), config, "max_choices", field)
        elif values:
            ids = sum(len(each) for each in prompt if isinstance(each, list))
    elif values and isinstance(tokens := raw.get("tokens"), list):
        ids = len(tokens)
    if values - ids > config.max_body_values:
        raise _too_many_values(values - ids, config)


def check_stop(stops: Sequence[str], config: LimitConfig) -> None:
    """Refuse stop strings that are too long together."""
    if (size := sum(map(len, stops))) > config.max_stop_chars:
        raise too_much("The number of characters in stop", size, config, "max_stop_chars", "stop")


def check_messages(messages: Sequence[Mapping[str, Any]], config: LimitConfig) -> None:
    """Refuse more messages, content parts and tool calls than templates get through in a moment."""
    count = len(messages)
    for message in messages:
        for part in ("content", "tool_calls"):
            value = message.get(part)
            if isinstance(value, list):
                count += len(value)
    if count > config.max_messages:
        what = "The number of messages with their parts and tool calls"
        raise too_much(what, count, config, "max_messages", "messages")
    arguments = "".join(text for message in messages for text in _arguments(message))
    if (values := check_body(arguments.encode(), config)) > config.max_body_values:
        raise _too_many_values(values, config)


def _arguments(message: Mapping[str, Any]) -> Iterator[str]:
    """The JSON in a message's strings."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            yield arguments


def check_choices(prompts: int, n: int, params: object, config: LimitConfig, *, prompt: str) -> None:
    """Refuse too many sequences, and too many token ids for so many.

    params: of the request; only SamplingParams have token ids. prompt: name of the prompts' field.
    """
    choices = prompts * n
    if choices > config.max_choices:
        what = f"The number of choices ({prompts} prompts with n={n})"
        raise too_much(what, choices, config, "max_choices", prompt)
    if not isinstance(params, SamplingParams):
        return
    lists = {
        "logit_bias": len(params.logit_bias),
        "allowed_token_ids": len(params.allowed_token_ids or ()),
        "stop_token_ids": len(params.stop_token_ids),
    }
    if (product := choices * sum(lists.values())) > config.max_choice_tokens:
        longest = max(lists, key=lists.__getitem__)
        what = (
            f"The number of token ids in {', '.join(name for name in lists if lists[name])}, times choices,"
        )
        raise too_much(what, product, config, "max_choice_tokens", longest)


def told_logprobs(asked: int | None, vocab_size: int) -> int:
    """Logprobs that are told for a token: its own, and the alternatives that were asked for (-1: all)."""
    return 0 if asked is None else 1 + (vocab_size if asked == -1 else asked)


def check_answer(estimate: int, config: LimitConfig, param: str | None) -> None:
    """Refuse an answer of so many bytes."""
    if estimate > config.max_response_bytes:
        error = too_much(
            "The estimated size of the answer in bytes", estimate, config, "max_response_bytes", param
        )
        error.advice += " Ask for fewer prompts, choices or logprobs, or for a stream."
        raise error


def _too_many_values(got: int, config: LimitConfig) -> InvalidRequest:
    return too_much("The number of values in the body", got, config, "max_body_values", None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
