"""The one way of a request that generates, whatever API it speaks.

    body ─▶ decode ─▶ check ─▶ ask ─▶ encode ─▶ truncate ─▶ budget ─▶ Generation ─▶ answer
            shape              params,                                              writer
                               prompts

The lower line is a Format: what an API family adds. A new family is a Struct in `protocol`, a module with its
Format and its Writer, and a line in `app.ROUTES`; whether it wants tokens or a vector of each prompt is what
its params are. This module knows what all families do, and in which order; it knows no field that only one of
them has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, PenstockError
from penstock.core.request_spec import Pooling
from penstock.core.sampling_params import SamplingParams
from penstock.http.body import parse_object, read_body
from penstock.http.exchange import ClientGone, until_disconnect
from penstock.http.ids import response_id
from penstock.text.parsers.message import MessageParser

from .answer import Detached, Writer, answer
from .beams import BeamGeneration, BeamParams
from .behalf import Behalf, resumed
from .config import ServerConfig
from .generation import Generation, Prompt
from .ignored import Ignored
from .limits import (
    LOGPROB_BYTES,
    NUMBER_BYTES,
    TOKEN_BYTES,
    check_answer,
    check_body,
    check_choices,
    check_lists,
)
from .orca import with_load
from .params import (
    check_common,
    check_extra_args,
    output_budget,
    truncate,
    usable_tokens,
    without_text,
)
from .pooled import Input, Pair, pooled_prompts
from .protocol import Body, Request, decode
from .state import State
from .structured import grammar_of
from .tokens import decode_ids, encode_texts

logger = logging.getLogger("penstock.requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What an answer tells of a prompt, in all of its choices together."""

    logprobs: int = 0
    """For each token."""
    ids: int = 0
    """How many times each token id."""
    text: int = 0
    """How many times the text."""

    def size(self, prompt: Prompt) -> int:
        """Bytes, as estimated."""
        per_token = self.logprobs * LOGPROB_BYTES + self.ids * TOKEN_BYTES
        return len(prompt.ids) * per_token + len(prompt.text) * self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request asks for, in terms that all API families share."""

    inputs: Sequence[Input]
    """Its prompts: texts, or token ids of the vocabulary; pairs of texts where they are pooled together."""
    params: SamplingParams | Pooling
    """Checked; `n` included where tokens are wanted."""
    max_tokens: int | None = None
    """Most tokens to generate, as the client gave it."""
    limit: str = "max_tokens"
    """Name of the field that `max_tokens` came from."""
    default: int | None = None
    """Applies where the client gave nothing, cut to what fits; None: all that fits."""
    shows_prompt: bool = False
    """Whether the answer repeats the text of the tokens that the model read."""
    prompt_only: bool = False
    """Nothing is to be generated: the one token that the engine always samples is dropped."""
    parser: Callable[[], MessageParser] | None = None
    """Makes what reads the text of a choice; None where all of it is text."""
    told: Told = Told()
    """What the answer repeats of each prompt."""
    longest: int | None = None
    """Most tokens of a prompt that is pooled, where the client would rather have a longer one refused."""
    beams: BeamParams | None = None
    """Its n sequences are searched for, not sampled."""

    @property
    def n(self) -> int:
        """Sequences of each prompt."""
        return self.params.n if isinstance(self.params, SamplingParams) else 1


R = TypeVar("R", bound=Request)
S = TypeVar("S", bound=Body)

_LONG_BODY = 1 << 18
"""Bytes; what is longer is decoded in a thread."""
_BODY_SHARE = 8
"""Bytes of a body whose decoding takes as much memory as one unit of work does."""


class Format(Protocol[R]):
    """One API family."""

    shape: type[R]
    prefix: str
    """Of response ids."""
    prompt: str
    """Name of the field that prompts come from."""
    marks: tuple[str, ...]
    """Fields besides it by which /invocations knows a body of this family."""
    pools: bool
    """Whether it is for models that pool, not for those that generate."""
    empty: str
    """What to say of a prompt without tokens."""

    async def ask(self, state: State, request: R, ignored: Ignored) -> Ask:
        """What the request asks for. What it asks for in vain goes into `ignored`. Raises InvalidRequest,
        naming the field at fault."""
        ...

    def error(self, error: PenstockError) -> bytes:
        """The body of an error, sent before anything else is."""
        ...

    def writer(self, state: State, request: R, id: str, generation: Generation) -> Writer:
        """Who writes the answer, under the response's id."""
        ...


async def generate(format: Format[Any], state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one request: for text, or for vectors, scores or classes."""
    await generate_any((format,), state, scope, receive, send)


async def generate_any(
    formats: Sequence[Format[Any]], state: State, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve one request, in the first of `formats` whose prompt it has."""
    scope["error_body"] = formats[0].error
    id = scope["request_id"]
    state.bills.arrived(id)
    try:
        await _generate_any(formats, state, scope, receive, send)
    finally:
        state.bills.left(id)


async def _generate_any(
    formats: Sequence[Format[Any]], state: State, scope: Scope, receive: Receive, send: Send
) -> None:
    body = await whole_body(state, scope, receive)
    arrived_at = state.monotonic()
    state.check_accepting()
    request, ignored = await decoded(state, body, lambda fields: _chosen(formats, fields).shape)
    format = next(each for each in formats if each.shape is type(request))
    scope["error_body"] = format.error
    state.check_model(request.model)
    state.check_runner(format.pools)
    check_common(request, state.scheduling_policy)
    # who leaves while templates or tokens are worked on is not waited for either
    send = with_load(state, scope, send)
    await until_disconnect(receive, _serve(format, state, scope, request, ignored, arrived_at, send))


def _chosen(formats: Sequence[Format[Any]], fields: Mapping[str, Any]) -> Format[Any]:
    if len(formats) == 1:
        return formats[0]
    for format in formats:
        if any(fields.get(name) is not None for name in (format.prompt, *format.marks)):
            return format
    names = " or ".join(format.prompt for format in formats)
    raise InvalidRequest(f"Missing required parameter: {names}.", param=formats[0].prompt)


async def _serve(
    format: Format[R],
    state: State,
    scope: Scope,
    request: R,
    ignored: Ignored,
    arrived_at: float,
    send: Send,
) -> None:
    behalf = Behalf.of(scope)
    ask = await format.ask(state, request, ignored)
    grammar = None
    if isinstance(ask.params, Pooling):
        ignored.tell(scope, state.ignored_log)
        prompts = await pooled_prompts(state, request, ask.inputs, format.prompt, format.empty, ask.longest)
        check_answer(_vector_bytes(state, ask.params, prompts), state.config, format.prompt)
        asked_max_tokens = None
    else:
        grammar = await grammar_of(state, ask.params.structured_outputs, ignored)
        if ask.params.extra_args:
            check_extra_args(state, ignored)
        ignored.tell(scope, state.ignored_log)
        prompts = await prepared(format, state, request, ask)
        longest = max(prompt.max_tokens for prompt in prompts)
        asked_max_tokens = longest if ask.max_tokens is None else ask.max_tokens
    id = response_id(format.prefix, scope, request.request_id)
    generation = (Generation if ask.beams is None else BeamGeneration)(
        state,
        prompts,
        ask.params,
        id=id.engine,
        arrived_at=arrived_at,
        request_id=scope["request_id"],
        tenant=behalf.tenant,
        service_class=behalf.service_class,
        asked_max_tokens=asked_max_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        drop_output=ask.prompt_only,
        parser=ask.parser,
        grammar=grammar,
    )
    if isinstance(generation, BeamGeneration) and ask.beams is not None:
        generation.beams = ask.beams
    writer = format.writer(state, request, id.response, generation)
    if state.config.enable_log_requests:
        logger.info(
            "%s: %d prompts, %d prompt tokens, at most %d, stream=%s, %s",
            id.response,
            len(prompts),
            sum(len(prompt.ids) for prompt in prompts),
            max(prompt.max_tokens for prompt in prompts),
            writer.stream is not None,
            without_text(ask.params) if isinstance(ask.params, SamplingParams) else ask.params,
        )
    if isinstance(writer, Detached):
        await writer.detach(send, generation)
        return
    await answer(state.work, send, id.response, generation, writer, tells_tokens=behalf.tells_tokens)


def _vector_bytes(state: State, params: Pooling, prompts: Sequence[Prompt]) -> int:
    """Of an answer with vectors, as estimated."""
    whole = params.type == "all"
    rows = sum(len(prompt.ids) for prompt in prompts) if whole else len(prompts)
    width = len(state.pooling.labels) or params.dimensions or state.pooling.dimension
    return rows * width * NUMBER_BYTES


async def whole_body(state: State, scope: Scope, receive: Receive) -> bytes:
    """The body, within --max-body-bytes. What a client sent before it left is given back to the system."""
    try:
        return await read_body(scope, receive, state.config.max_body_bytes)
    except ClientGone:
        state.work.spent(state.config.max_body_bytes)
        raise


async def decoded(
    state: State, body: bytes, choose: Callable[[Mapping[str, Any]], type[S]]
) -> tuple[S, Ignored]:
    """The typed request in a body that is within `limits`, and what is ignored in it.

    choose: its shape, by its fields.
    """
    if len(body) <= _LONG_BODY:
        return _decoded(body, state.config, choose)
    state.work.spent(len(body))
    return await state.work.run(len(body) // _BODY_SHARE, _decoded, body, state.config, choose)


def _decoded(
    body: bytes, config: ServerConfig, choose: Callable[[Mapping[str, Any]], type[S]]
) -> tuple[S, Ignored]:
    values = check_body(body, config)
    raw = parse_object(body)
    check_lists(raw, values, config)
    ignored = Ignored(strict=config.strict_fields)
    return decode(raw, choose(raw), ignored), ignored


async def prepared(format: Format[R], state: State, request: R, ask: Ask) -> list[Prompt]:
    """The prompts as token ids, each with its budget. Raises InvalidRequest where one cannot be served."""
    check_choices(len(ask.inputs), ask.n, ask.params, state.config, prompt=format.prompt)
    max_model_len = state.engine.info.max_model_len
    room = max_model_len - (ask.max_tokens or 1)
    texts = [given for given in ask.inputs if isinstance(given, str)]
    usable = usable_tokens(request, room, max_model_len, prompt=format.prompt)
    encoded = iter(await encode_texts(state, texts, request.add_special_tokens, usable))
    generated = resumed(request, len(ask.inputs), state.engine.info.vocab_size)
    prompts = []
    size = 0
    for given in ask.inputs:
        assert not isinstance(given, Pair)  # only what is pooled is of two texts
        text, ids = (given, next(encoded)) if isinstance(given, str) else (None, given)
        kept = truncate(ids, request, room)
        if not kept:
            raise InvalidRequest(format.empty, param=format.prompt)
        budget = output_budget(
            len(kept),
            max_model_len,
            1 if ask.prompt_only else ask.max_tokens,
            ask.default,
            prompt=format.prompt,
            limit=ask.limit,
        )
        if ask.shows_prompt and (text is None or len(kept) < len(ids)):
            text = await decode_ids(state, kept, skip_special_tokens=False)
        if len(generated) >= budget:
            raise InvalidRequest(
                f"{len(generated)} tokens were generated, of at most {budget}: nothing is left to do.",
                param=ask.limit,
            )
        prompts.append(Prompt(ids=kept, text=text or "", max_tokens=budget, generated=generated))
        size += ask.told.size(prompts[-1])
    check_answer(size, state.config, "prompt_logprobs" if ask.told.logprobs else format.prompt)
    return prompts
