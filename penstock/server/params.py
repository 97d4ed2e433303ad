"""From a decoded request to what the engine takes: sampling parameters, token budgets, truncated prompts.

Functions without effects. They know the ranges that depend on the model; they do not know the endpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import fields

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter, quote
from penstock.core.sampling_params import SamplingParams
from penstock.core.structured import StructuredOutputsParams
from penstock.http.ids import acceptable
from penstock.text.bad_words import bad_words_ids

from .beams import BeamParams
from .ignored import Ignored
from .lax import convert, number
from .limits import LimitConfig, check_stop
from .protocol import GenerateRequest, Request
from .state import State
from .structured import asked
from .tokens import Usable, check_ids

_CACHE_SALT = re.compile(r"[^@/\\\x00]{1,128}", re.DOTALL)
"""vLLM's rule: salts end up in keys and paths of external caches."""
_MOST_BAD_WORDS = 1024
_BAD_CHARACTERS = 16_384
"""What is tokenised at once, and looked for at every token."""
_TOKEN_ID = re.compile(r"0|-?[1-9][0-9]{0,17}")

#: Fields that generation_config.json may give a default for, and OpenAI's or vLLM's value where it does not.
_DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def sampling_params(
    state: State,
    request: GenerateRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The request's SamplingParams, `n` included, with the model's defaults where it leaves them open.

    Raises InvalidRequest for a value out of range, or token ids outside the vocabulary.
    """
    info = state.engine.info
    chosen: dict[str, Any] = {}
    for name, fallback in _DEFAULTS.items():
        value = getattr(request, name)
        chosen[name] = value if value is not None else state.default_sampling.get(name, fallback)
    named = _named_tokens(request, logprobs)
    params = SamplingParams(
        **chosen,
        n=request.n,
        logit_bias=_logit_bias(request.logit_bias, info.vocab_size),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        seed=None if request.seed == -1 else request.seed,  # vLLM's way to say "no seed"
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        max_tokens=max_tokens,
        logprobs=None if named else logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=named,
        skip_special_tokens=request.skip_special_tokens,
        spaces_between_special_tokens=request.spaces_between_special_tokens,
        structured_outputs=asked(request),
        bad_words=tuple(request.bad_words),
        bad_words_ids=_bad_words(state, request.bad_words),
        extra_args=_extra_args(request.vllm_xargs),
        thinking_token_budget=request.thinking_token_budget,
    )
    _check_sampleable(params, info.eos_ids, info.vocab_size)
    params.verify(info.vocab_size, state.config.max_logprobs, limit="--max-logprobs")
    return params


def without_text(params: SamplingParams) -> SamplingParams:
    """The parameters as they may be logged: what the client wrote in words left out."""
    outputs = params.structured_outputs
    shown = None if outputs is None else StructuredOutputsParams(regex="…", field=outputs.field)
    return params.with_(
        stop=tuple("…" for _ in params.stop),
        bad_words=tuple("…" for _ in params.bad_words),
        structured_outputs=shown,
    )


def truncate(ids: Sequence[int], request: Request, room: int) -> tuple[int, ...]:
    """The prompt cut to `truncate_prompt_tokens`: the last k tokens, or the first with truncation_side right.

    -1 means as many as fit: `room` tokens.
    """
    keep = request.truncate_prompt_tokens
    if keep is None:
        return tuple(ids)
    if keep < -1 or keep == 0:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or at least 1, got {keep}.", param="truncate_prompt_tokens"
        )
    keep = max(room, 1) if keep == -1 else keep
    return tuple(ids[-keep:] if request.truncation_side == "left" else ids[:keep])


def usable_tokens(request: Request, room: int, max_model_len: int, *, prompt: str) -> Usable:
    """How many tokens of a text can be used, for a request whose `truncate` gets the same `room`."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return Usable(max_model_len, None, prompt)
    return Usable(max(1, min(room if keep == -1 else keep, max_model_len)), request.truncation_side, prompt)


def text_or_ids(prompt: Any, vocab_size: int, longest: int | None, where: str) -> str | list[int]:
    """One prompt as a client sends it. Raises InvalidRequest, naming the field `where`.

    longest: most token ids, where they are not to be cut.
    """
    if not isinstance(prompt, str | list):
        raise InvalidRequest(
            f"{where} must be a string or a list of token ids, got {type(prompt).__name__}.", param=where
        )
    if not prompt:
        raise InvalidRequest(f"{where} must not be empty.", param=where)
    if isinstance(prompt, list):
        if longest is not None:  # before each of a million ids is looked at
            check_length(len(prompt), longest, prompt=where.partition("[")[0])
        return _checked_ids(prompt, vocab_size, where)
    return prompt


def _checked_ids(given: list[Any], vocab_size: int, where: str) -> list[int]:
    """Token ids; 1.0 and "1" are converted as in vLLM, where that is needed."""
    try:
        check_ids(given, vocab_size, where)
        return given
    except InvalidRequest:
        ids: list[int] = convert(given, list[int])
        check_ids(ids, vocab_size, where)
        return ids


def check_length(prompt_len: int, max_model_len: int, *, prompt: str, wanted: int = 0) -> None:
    """Raises ContextLengthExceeded unless a prompt and so many more tokens fit into the context.

    prompt: name of the prompt's field.
    """
    if prompt_len + wanted > max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, your request has "
            f"{prompt_len} prompt tokens.",
            param=prompt,
            advice=f"Shorten the {prompt} to at most {max_model_len - wanted} tokens.",
        )


def output_budget(
    prompt_len: int, max_model_len: int, asked: int | None, default: int | None, *, prompt: str, limit: str
) -> int:
    """How many tokens may be generated, within the context of `max_model_len` tokens.

    Args:
        asked: what the client set; too much of it is an error, as in vLLM.
        default: used when the client set nothing, and cut to what fits; None means all that fits.
        prompt: name of the prompt's field, for the error.
        limit: name of the field that `asked` came from.

    Raises:
        ContextLengthExceeded: with both lengths.
    """
    check_length(prompt_len, max_model_len, prompt=prompt, wanted=1)
    room = max_model_len - prompt_len
    if asked is None:
        return room if default is None else max(1, min(default, room))
    if asked > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{prompt_len + asked} tokens ({prompt_len} in the {prompt}, {asked} in the completion).",
            param=limit,
            advice=f"Shorten the {prompt}, or set {limit} to at most {room}.",
        )
    return asked


def check_common(request: Request, scheduling_policy: str) -> None:
    """What all endpoints refuse alike. Raises InvalidRequest, naming the field."""
    if request.priority != 0 and scheduling_policy != "priority":
        raise InvalidRequest(
            f"priority must be 0, got {request.priority}: the server schedules by {scheduling_policy}.",
            param="priority",
            advice="Start it with --scheduling-policy priority.",
        )
    if request.cache_salt is not None and not _CACHE_SALT.fullmatch(request.cache_salt):
        raise InvalidRequest(
            "cache_salt must have 1 to 128 characters, none of them @, /, \\ or NUL, got "
            f"{quote(request.cache_salt)} ({len(request.cache_salt)} characters).",
            param="cache_salt",
        )
    if request.request_id is not None and not acceptable(request.request_id):
        raise InvalidRequest(
            f"request_id must have 1 to 256 printable characters, got {quote(request.request_id)}"
            f" ({len(request.request_id)} characters).",
            param="request_id",
        )


def check_generate(request: GenerateRequest, config: LimitConfig, ignored: Ignored) -> None:
    """What all endpoints refuse, or ignore, that generate text. Raises InvalidRequest, naming the field."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
    if request.stream_interval is not None and request.stream_interval < 1:
        raise InvalidRequest(
            f"stream_interval must be at least 1, got {request.stream_interval}.", param="stream_interval"
        )
    if request.use_beam_search:
        for name in ("temperature", "seed"):  # nothing is drawn
            if getattr(request, name) is not None:
                ignored.add(name)
        if not -10 <= request.length_penalty <= 10:
            raise InvalidRequest(
                f"length_penalty must be in [-10, 10], got {request.length_penalty:g}.",
                param="length_penalty",
            )
    elif request.length_penalty != 1:
        if ignored.strict:
            raise UnsupportedParameter(
                "length_penalty is not supported without use_beam_search.", param="length_penalty"
            )
        ignored.add("length_penalty")
    check_stop([request.stop] if isinstance(request.stop, str) else request.stop, config)
    if request.stream and request.prompt_logprobs:
        raise InvalidRequest(
            "prompt_logprobs are not available when stream is true.", param="prompt_logprobs"
        )


_NOT_SEARCHED = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "generated_token_ids",
    "suffix",
    "bad_words",
    "response_format",
    "structured_outputs",
    "thinking_token_budget",
    "tools",
    "vllm_xargs",
)
"""Fields that a search does not know: vLLM drops them without a word."""


def beams(request: GenerateRequest, params: SamplingParams) -> BeamParams | None:
    """How to search, for a request that asks for it. Raises UnsupportedParameter for what cannot be searched
    with, naming the field."""
    if not request.use_beam_search:
        return None
    for field in fields(request):
        if field.name in _NOT_SEARCHED:
            given = getattr(request, field.name)
            neutral = given == field.default or not given
            if not neutral and given != _NEUTRAL_IN_SEARCH.get(field.name):
                raise UnsupportedParameter(
                    f"{field.name} is not supported with use_beam_search.", param=field.name
                )
    return BeamParams(
        length_penalty=request.length_penalty,
        ignore_eos=request.ignore_eos,
        include_stop=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
    )


_NEUTRAL_IN_SEARCH = {
    "top_p": 1.0,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "response_format": {"type": "text"},
}


def check_extra_args(state: State, ignored: Ignored) -> None:
    """vllm_xargs are for logits processors of the owner. Where there are none, they are ignored, or refused
    by --strict-fields."""
    if state.engine.info.logits_processors:
        return
    if ignored.strict:
        raise UnsupportedParameter(
            "vllm_xargs is for logits processors, of which this server has none.",
            param="vllm_xargs",
            advice="Leave it out, or start the server with --logits-processors.",
        )
    ignored.add("vllm_xargs")


def _named_tokens(request: GenerateRequest, logprobs: int | None) -> tuple[int, ...] | None:
    """logprob_token_ids, with vLLM's conditions."""
    ids = request.logprob_token_ids
    if not ids:
        return None
    if logprobs is None:
        raise InvalidRequest(
            "logprob_token_ids is only allowed with logprobs.",
            param="logprob_token_ids",
            advice="Set logprobs.",
        )
    return tuple(ids)


def _extra_args(given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's types: numbers, texts, and lists of them; whole numbers as the engine can be told them."""
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, int) and not -(2**63) <= each < 2**63 for each in values):
            raise InvalidRequest(
                f"vllm_xargs: whole numbers must fit in 64 bits, got {quote(value)} for {quote(name)}.",
                param="vllm_xargs",
            )
        if not all(isinstance(each, str | int | float) for each in values):
            raise InvalidRequest(
                f"vllm_xargs must map names to numbers, texts or lists of them, got {quote(value)} for "
                f"{quote(name)}.",
                param="vllm_xargs",
            )
    return given


def _bad_words(state: State, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    if len(words) > _MOST_BAD_WORDS or sum(map(len, words)) > _BAD_CHARACTERS:
        raise InvalidRequest(
            f"bad_words must be at most {_MOST_BAD_WORDS} texts of {_BAD_CHARACTERS} characters, got "
            f"{len(words)} of {sum(map(len, words))}.",
            param="bad_words",
        )
    return bad_words_ids(state.tokenizer, words)


def _check_sampleable(params: SamplingParams, eos_ids: Sequence[int], vocab_size: int) -> None:
    """min_tokens forbids the ids that end the output: others must be left to sample."""
    allowed = params.allowed_token_ids
    if params.min_tokens == 0:
        return
    ends = {*params.stop_token_ids, *eos_ids}
    if allowed is None and ends.issuperset(range(vocab_size)):
        raise InvalidRequest(
            f"stop_token_ids are all ids of the vocabulary, which min_tokens={params.min_tokens} forbids: "
            "nothing is left to sample.",
            param="stop_token_ids",
            advice="Leave one out, or set min_tokens to 0.",
        )
    if allowed is not None and ends.issuperset(allowed):
        raise InvalidRequest(
            f"allowed_token_ids {_listed(allowed)} all end the output, which min_tokens={params.min_tokens} "
            "forbids: nothing is left to sample.",
            param="allowed_token_ids",
            advice="Allow another id, or set min_tokens to 0.",
        )


def _logit_bias(raw: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    """Biases by token id; an error names every key at fault."""
    if malformed := [key for key in raw if not _TOKEN_ID.fullmatch(key)]:
        raise InvalidRequest(
            f"logit_bias maps token ids to numbers, got the keys {_listed(malformed)}.", param="logit_bias"
        )
    values = {key: number(value) for key, value in raw.items()}
    for key, value in values.items():
        if not isinstance(value, float):
            error = InvalidRequest(
                f"logit_bias must map token ids to numbers, got {type(value).__name__} for the key "
                f"{quote(key)}.",
                param="logit_bias",
            )
            error.code = "invalid_type"
            raise error
    biases = {int(key): value for key, value in values.items()}
    if outside := [token for token in biases if not 0 <= token < vocab_size]:
        raise InvalidRequest(
            f"logit_bias contains out-of-vocab token ids {_listed(outside)}; the vocabulary has ids 0 to "
            f"{vocab_size - 1}.",
            param="logit_bias",
        )
    return biases


def _listed(values: Sequence[object]) -> str:
    """The first values, short enough for a message."""
    shown = ", ".join(map(quote, values[:20]))
    return shown if len(values) <= 20 else f"{shown} and {len(values) - 20} more"
