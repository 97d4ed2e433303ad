"""POST /v1/chat/completions: the format of OpenAI's chat.

It knows OpenAI's chat fields and answers. Running and streaming are the `pipeline`'s business, messages those
of `conversation`, and the prompt's text is made by the chat template.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from msgspec.json import encode

from penstock.core.errors import InvalidRequest
from penstock.text.chat_template import words
from penstock.text.output import decode_prompt_logprobs

from .conversation import normalise
from .generation import Choice, Generation
from .ignored import Ignored
from .limits import check_messages, told_logprobs
from .logprobs import array, chat_logprobs
from .openai import OpenAIFormat, OpenAIWriter
from .params import check_generate, sampling_params
from .pipeline import Ask, Told
from .protocol import ChatRequest, TokenizeChatRequest
from .state import State


class ChatFormat(OpenAIFormat):
    """See Format."""

    shape = ChatRequest
    prefix = "chatcmpl"
    prompt = "messages"
    empty = "The chat template made an empty prompt of the messages."

    async def ask(self, state: State, request: ChatRequest, ignored: Ignored) -> Ask:
        """See Format."""
        check_generate(request, state.config, ignored)
        top = _logprobs(request, state.config.max_logprobs, state.engine.info.vocab_size)
        limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(request, limit)
        if asked is not None and asked < 1:
            raise InvalidRequest(f"{limit} must be at least 1, got {asked}.", param=limit)
        params = sampling_params(
            state, request, max_tokens=asked, logprobs=top, prompt_logprobs=_prompt_logprobs(request)
        )
        check_messages(request.messages, state.config)
        messages = read_messages(state, request, ignored)
        default = state.default_sampling.get("max_tokens")
        return Ask(
            inputs=[await render(state, request, messages)],
            params=params,
            max_tokens=asked,
            limit=limit,
            default=None if default is None else int(default),
            told=Told(
                logprobs=told_logprobs(_prompt_logprobs(request), state.engine.info.vocab_size),
                ids=int(request.return_token_ids),
                text=int(request.return_prompt_text),
            ),
        )

    def writer(self, state: State, request: ChatRequest, id: str, generation: Generation) -> ChatWriter:
        """See Format."""
        return ChatWriter(state, request, id)


_LOOKED_AT = 1 << 18
"""Characters of a request's template in which names of fields are looked for."""


def read_messages(
    state: State, request: ChatRequest | TokenizeChatRequest, ignored: Ignored
) -> list[dict[str, Any]]:
    """The messages as the template reads them. Raises InvalidRequest, naming the place."""
    own, template = request.chat_template, state.chat_template
    if own is None or own in template.sources:
        known: Collection[str] = template.words
    elif state.config.trust_request_chat_template:
        known = words(own[:_LOOKED_AT])
    else:
        raise InvalidRequest(
            "chat_template is not accepted from requests by this server.",
            param="chat_template",
            advice="Start it with --trust-request-chat-template to allow that.",
        )
    return normalise(request.messages, ignored, as_parts=state.content_parts, words=known)


async def render(
    state: State, request: ChatRequest | TokenizeChatRequest, messages: Sequence[Mapping[str, Any]]
) -> str:
    """The prompt's text. Raises InvalidRequest where the template or the request makes that impossible."""
    variables = dict(request.chat_template_kwargs)
    if "chat_template" in variables:  # it would pass the check above by
        raise InvalidRequest(
            "chat_template_kwargs must not contain 'chat_template'.",
            param="chat_template_kwargs",
            advice="Send it as the field chat_template.",
        )
    header = request.add_generation_prompt
    options: dict[str, Any] = {
        "add_generation_prompt": not request.continue_final_message if header is None else header,
        "continue_final_message": request.continue_final_message,
    }
    if isinstance(request, ChatRequest):
        options["documents"] = request.documents
        if request.reasoning_effort is not None:
            options["reasoning_effort"] = request.reasoning_effort
            options["enable_thinking"] = request.reasoning_effort != "none"
    # as in vLLM, the request's own arguments of the template have the last word, the server's the first
    defaults = state.config.default_chat_template_kwargs or {}
    arguments = {**defaults, **options, **variables}
    return await state.chat_template.render_async(messages, **arguments, chat_template=request.chat_template)


class ChatWriter(OpenAIWriter):
    """chat.completion and chat.completion.chunk."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, state: State, request: ChatRequest, id: str) -> None:
        super().__init__(state, request, id)
        self._state = state
        self._request = request
        self._role = state.config.response_role
        self._echoed = _echoed(request, self._role)

    @property
    def stream(self) -> ChatWriter | None:
        """See Writer."""
        return self if self._streams else None

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        request = self._request
        leader = generation.choices[0]
        given = leader.prompt_logprobs
        body: dict[str, Any] = {
            "prompt_logprobs": None
            if given is None
            else array(decode_prompt_logprobs(self._state.tokenizer, leader.prompt.ids[0], given)),
            "prompt_token_ids": leader.prompt.ids if request.return_token_ids else None,
        }
        if request.return_prompt_text:
            body["prompt_text"] = leader.prompt.text
        return self._answer(generation, map(self._choice, generation.choices), body)

    def opening(self, choice: Choice) -> bytes:
        """See Writer."""
        usage = self._usage(choice, 0)
        top: dict[str, Any] = {}
        if self._request.return_token_ids:
            top["prompt_token_ids"] = choice.prompt.ids
        if self._request.return_prompt_text:
            top["prompt_text"] = choice.prompt.text
        body = b'"delta":' + encode({"role": self._role, "content": ""})
        opened = self._form.chunk(choice.index, body, usage=usage, top=top)
        if self._echoed:
            opened += self._form.chunk(choice.index, _content(self._echoed), usage=usage)
        return opened

    def chunks(self, choice: Choice) -> bytes:
        """See Writer. The last chunk carries the finish reason, with the text that came in the same step; its
        content is empty where there is none, as in vLLM."""
        pending = choice.pending
        has_tokens = bool(pending.token_ids) and self._wants_tokens
        rest: dict[str, Any] | None = None
        if has_tokens or pending.finish_reason is not None:
            rest = {
                "logprobs": self._logprobs(pending.logprobs) if pending.logprobs else None,
                "finish_reason": pending.finish_reason,
            }
            if pending.finish_reason is not None:
                rest["stop_reason"] = pending.stop_reason
            if self._request.return_token_ids:
                rest["token_ids"] = pending.token_ids
        body = _content(pending.text)
        return self._form.chunk(choice.index, body, rest=rest, usage=self._usage(choice, choice.generated))

    @property
    def _wants_tokens(self) -> bool:
        return self._request.logprobs or self._request.return_token_ids

    def _choice(self, choice: Choice) -> dict[str, Any]:
        output = choice.pending
        return {
            "index": choice.index,
            "message": {
                "role": self._role,
                "content": self._echoed + output.text,
                "refusal": None,
            },
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "token_ids": output.token_ids if self._request.return_token_ids else None,
        }

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any] | None:
        request = self._request
        if not request.logprobs:
            return None
        top = -1 if request.logprob_token_ids else request.top_logprobs
        return chat_logprobs(entries, top, as_ids=self._state.tokens_as_ids(request))


def _content(text: str) -> bytes:
    return b'"delta":{"content":' + encode(text) + b"}"


def _prompt_logprobs(request: ChatRequest) -> int | None:
    """With echo and logprobs, those of the prompt as well, as in vLLM."""
    if request.prompt_logprobs is None and request.echo and request.logprobs and not request.stream:
        return request.top_logprobs
    return request.prompt_logprobs


def _logprobs(request: ChatRequest, most: int, vocab_size: int) -> int | None:
    """SamplingParams.logprobs for the chat API's fields."""
    top = request.top_logprobs
    if top != 0 and not request.logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
    limited = most != -1 and not request.logprob_token_ids
    if top < -1 or (limited and (vocab_size if top == -1 else top) > most):
        raise InvalidRequest(
            f"top_logprobs must be between 0 and {most}, got {top}.",
            param="top_logprobs",
            advice="The server's limit is set by --max-logprobs.",
        )
    return top if request.logprobs else None


def _echoed(request: ChatRequest, role: str) -> str:
    """Text of the last message, if the answer goes on with it and echo asks for it."""
    last = request.messages[-1] if request.messages else {}
    if not request.echo or last.get("role") != role:
        return ""
    content = normalise([last])[0]["content"]
    return content if isinstance(content, str) else ""
