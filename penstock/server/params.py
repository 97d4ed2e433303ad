"""From a decoded request to what the engine takes: sampling parameters, token budgets, truncated prompts.

Functions without effects. They know the ranges that depend on the model; they do not know the endpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, quote
from penstock.core.sampling_params import SamplingParams
from penstock.http.ids import acceptable

from .ignored import Ignored
from .lax import number
from .limits import LimitConfig, check_stop
from .protocol import GenerateRequest, Request
from .state import State
from .tokens import Usable

_CACHE_SALT = re.compile(r"[^@/\\\x00]{1,128}", re.DOTALL)
"""vLLM's rule: salts end up in keys and paths of external caches."""
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
    )
    _check_sampleable(params, info.eos_ids, info.vocab_size)
    params.verify(info.vocab_size, state.config.max_logprobs, limit="--max-logprobs")
    return params


def without_text(params: SamplingParams) -> SamplingParams:
    """The parameters as they may be logged: what the client wrote in words left out."""
    return params.with_(stop=tuple("…" for _ in params.stop))


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
        if ignored.strict:
            raise InvalidRequest(
                "stream_options is only allowed when stream is true.", param="stream_options"
            )
        ignored.add("stream_options")
    if request.stream_interval is not None and request.stream_interval < 1:
        raise InvalidRequest(
            f"stream_interval must be at least 1, got {request.stream_interval}.", param="stream_interval"
        )
    check_stop([request.stop] if isinstance(request.stop, str) else request.stop, config)
    if request.stream and request.prompt_logprobs:
        raise InvalidRequest(
            "prompt_logprobs are not available when stream is true.", param="prompt_logprobs"
        )


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
