"""POST /v1/completions.

It knows OpenAI's completion fields and answers: prompts as text or token ids, one or many, echo, and logprobs
in the older shape. Running and streaming are `answer`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest
from penstock.http.body import parse_object, read_body
from penstock.http.ids import response_id
from penstock.text.output import DecodedLogprob, decode_logprob, decode_prompt_logprobs

from .answer import Pending, answer, decode_ids, encode_texts
from .generation import MAX_CHOICES, Choice, Generation, Prompt
from .logprobs import CompletionLogprobs
from .params import check_common, output_budget, sampling_params, truncate, without_text
from .protocol import CompletionRequest, decode
from .state import State
from .stream import ChunkFormat

logger = logging.getLogger("penstock.requests")

_DEFAULT_MAX_TOKENS = 16


async def completions(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one request."""
    body = await read_body(scope, receive, state.config.max_body_bytes)
    arrived_at = state.monotonic()
    state.check_accepting()
    request = decode(parse_object(body), CompletionRequest)
    state.check_model(request.model)
    check_common(request, state.scheduling_policy)
    asked, default = _max_tokens(request)
    prompt_only = request.echo and asked == 0
    params = sampling_params(
        request,
        state.default_sampling,
        state.engine.info,
        # the engine always samples once: for a prompt alone, that token is dropped
        max_tokens=1 if prompt_only else default if asked is None else asked,
        logprobs=request.logprobs,
        prompt_logprobs=_prompt_logprobs(request),
    )
    info = state.engine.info
    params.verify(info.vocab_size, state.config.max_logprobs)

    inputs = _inputs(request.prompt, info.vocab_size)
    if len(inputs) * params.n > MAX_CHOICES:
        raise InvalidRequest(
            f"A request may have at most {MAX_CHOICES} choices, got {len(inputs)} prompts with n={params.n}.",
            param="prompt",
        )
    texts = [given for given in inputs if isinstance(given, str)]
    encoded = iter(await encode_texts(state, texts, request.add_special_tokens))
    prompts = []
    for given in inputs:
        ids = next(encoded) if isinstance(given, str) else given
        kept = truncate(ids, request, room=info.max_model_len - (asked or 1))
        if not kept:
            raise InvalidRequest("prompt must not be empty.", param="prompt")
        budget = output_budget(
            len(kept),
            info.max_model_len,
            1 if prompt_only else asked,
            default,
            prompt="prompt",
            limit="max_tokens",
        )
        text = given if isinstance(given, str) and len(kept) == len(ids) else None
        if text is None and request.echo:
            text = await decode_ids(state, kept, request.skip_special_tokens)
        prompts.append(Prompt(ids=kept, text=text or "", max_tokens=budget))
    id = response_id("cmpl", scope, request.request_id)
    generation = Generation(
        state,
        prompts,
        params,
        id=id.engine,
        arrived_at=arrived_at,
        asked_max_tokens=max(each.max_tokens for each in prompts) if asked is None else asked,
        priority=request.priority,
        cache_salt=request.cache_salt,
        drop_output=prompt_only,
    )
    if state.config.enable_log_requests:
        logger.info(
            "%s completion: %d prompts, %d prompt tokens, stream=%s, %s",
            *(
                id.response,
                len(prompts),
                sum(len(prompt.ids) for prompt in prompts),
                request.stream,
                without_text(params),
            ),
        )
    writer = CompletionWriter(state, request, generation)
    await answer(
        state, scope, receive, send, request=request, id=id.response, generation=generation, writer=writer
    )


class CompletionWriter:
    """text_completion, whole and in chunks."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, state: State, request: CompletionRequest, generation: Generation) -> None:
        self._state = state
        self._request = request
        self._choices = generation.choices
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._unsent_prompt: set[int] = {choice.index for choice in generation.choices}

    def whole(self, generation: Generation) -> dict[str, Any]:
        """See Writer."""
        return {"choices": [self._choice(choice) for choice in generation.choices]}

    def opening(self, form: ChunkFormat, choice: Choice, usage: dict[str, Any] | None) -> bytes:
        """See Writer. The prompt's text (echo) goes with the first chunk."""
        return b""

    def chunks(
        self, form: ChunkFormat, choice: Choice, pending: Pending, usage: dict[str, Any] | None
    ) -> bytes:
        """See Writer."""
        request = self._request
        first = choice.index in self._unsent_prompt
        self._unsent_prompt.discard(choice.index)
        text = pending.text
        if first and request.echo:
            text = choice.prompt.text + text
        plain = pending.finish_reason is None and request.logprobs is None and not request.return_token_ids
        rest: dict[str, Any] | None = None
        if not plain:
            rest = {
                "logprobs": self._piece(choice, pending.logprobs, first),
                "finish_reason": pending.finish_reason,
                "stop_reason": pending.stop_reason,
            }
            if request.return_token_ids:
                rest["token_ids"] = pending.token_ids
                if first:
                    rest["prompt_token_ids"] = choice.prompt.ids
        return form.chunk(choice.index, b'"text":' + encode(text), rest=rest, usage=usage)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        request = self._request
        given = self._prompt_logprobs_of(choice) if request.prompt_logprobs is not None else None
        return {
            "index": choice.index,
            "text": (choice.prompt.text if request.echo else "") + "".join(choice.text),
            "logprobs": self._piece(choice, choice.logprobs, first=True),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "prompt_logprobs": None
            if given is None
            else decode_prompt_logprobs(self._state.tokenizer, given),
            "token_ids": choice.token_ids if request.return_token_ids else None,
            "prompt_token_ids": choice.prompt.ids if request.return_token_ids else None,
        }

    def _piece(self, choice: Choice, entries: Sequence[DecodedLogprob], first: bool) -> dict[str, Any] | None:
        request = self._request
        if request.logprobs is None:
            return None
        pieces = self._logprobs.get(choice.index)
        if pieces is None:
            pieces = CompletionLogprobs(request.logprobs, as_ids=self._state.tokens_as_ids(request))
            self._logprobs[choice.index] = pieces
        if not (first and request.echo):
            return pieces.piece(entries)
        tokenizer = self._state.tokenizer
        start = choice.prompt.ids[0]
        prompt = (decode_logprob(tokenizer, entry) for entry in self._prompt_logprobs_of(choice))
        return pieces.piece(chain([(start, tokenizer.token_text(start))], prompt, entries))

    def _prompt_logprobs_of(self, choice: Choice) -> Sequence[Any]:
        """The prompt's logprobs are computed once, by the first of its n choices."""
        leader = self._choices[choice.index - choice.index % self._request.n]
        return leader.prompt_logprobs or ()


def _max_tokens(request: CompletionRequest) -> tuple[int | None, int | None]:
    """(what the client asked for, what applies if it asked for nothing); None: up to the context length."""
    if request.max_tokens is msgspec.UNSET:
        return None, _DEFAULT_MAX_TOKENS
    return request.max_tokens, None


def _prompt_logprobs(request: CompletionRequest) -> int | None:
    if request.prompt_logprobs is None and request.echo:
        return request.logprobs
    return request.prompt_logprobs


def _inputs(prompt: str | list[Any] | None, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a request: texts or token ids. Raises InvalidRequest."""
    if not prompt:  # vLLM's words; prompt_embeds are refused by name before they get here
        raise InvalidRequest("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if isinstance(prompt, str) or type(prompt[0]) is int:
        return [_input(prompt, vocab_size, "prompt")]
    return [_input(each, vocab_size, f"prompt[{i}]") for i, each in enumerate(prompt)]


def _input(prompt: Any, vocab_size: int, where: str) -> str | list[int]:
    if not isinstance(prompt, str | list):
        raise InvalidRequest(
            f"{where} must be a string or a list of token ids, got {type(prompt).__name__}.", param=where
        )
    if not prompt:
        raise InvalidRequest(f"{where} must not be empty.", param=where)
    if isinstance(prompt, list):
        for token in prompt:
            if type(token) is not int:  # bool is an int to isinstance
                raise InvalidRequest(
                    f"{where} must hold token ids only, got {type(token).__name__}.", param=where
                )
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"{where} contains token id {token}, which is out of vocabulary: it has ids 0 to "
                    f"{vocab_size - 1}.",
                    param=where,
                )
    return prompt
