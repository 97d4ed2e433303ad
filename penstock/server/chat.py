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
from penstock.text.output import Pending, decode_prompt_logprobs
from penstock.text.parsers.pieces import Arguments, CallBegin, CallEnd, Message, Piece, Text, Thought

from .conversation import normalise
from .generation import Choice, Generation
from .ignored import Ignored
from .limits import check_messages, told_logprobs
from .logprobs import array, chat_logprobs
from .openai import OpenAIFormat, OpenAIWriter
from .params import beams, check_generate, sampling_params
from .parsing import reading, with_budget
from .pipeline import Ask, Told
from .protocol import ChatRequest, TokenizeChatRequest
from .state import State
from .structured import skip
from .tools import ToolUse, read_tools


class ChatFormat(OpenAIFormat):
    """See Format."""

    shape = ChatRequest
    prefix = "chatcmpl"
    prompt = "messages"
    empty = "The chat template made an empty prompt of the messages."

    async def ask(self, state: State, request: ChatRequest, ignored: Ignored) -> Ask:
        """See Format."""
        return await ask_chats(
            state, request, {"messages": request.messages}, ignored, prompt_logprobs=_prompt_logprobs(request)
        )

    def writer(self, state: State, request: ChatRequest, id: str, generation: Generation) -> ChatWriter:
        """See Format."""
        return ChatWriter(state, request, id)


async def ask_chats(
    state: State,
    request: ChatRequest,
    conversations: Mapping[str, Sequence[Mapping[str, Any]]],
    ignored: Ignored,
    *,
    prompt_logprobs: int | None,
) -> Ask:
    """What a request asks for of each of these conversations. Raises InvalidRequest, naming the place.

    Args:
        conversations: place in the request → messages; one at least.
        prompt_logprobs: that are told; None for none.
    """
    check_generate(request, state.config, ignored)
    top = _logprobs(request, state.config.max_logprobs, state.engine.info.vocab_size)
    limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(request, limit)
    if asked is not None and asked < 1:
        raise InvalidRequest(f"{limit} must be at least 1, got {asked}.", param=limit)
    params = sampling_params(state, request, max_tokens=asked, logprobs=top, prompt_logprobs=prompt_logprobs)
    check_messages([message for messages in conversations.values() for message in messages], state.config)
    known = _words_of(state, request)
    read = {
        place: normalise(messages, ignored, as_parts=state.content_parts, words=known, where=place)
        for place, messages in conversations.items()
    }
    tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, state.config, ignored)
    variables = template_variables(state, request)
    texts, ways = [], []
    for messages in read.values():
        texts.append(await render(state, request, messages, variables, tools))
        ways.append(
            reading(
                state.config,
                state.tokenizer,
                tools,
                texts[-1],
                variables,
                params.structured_outputs,
                continued=request.continue_final_message,
            )
        )
    way = ways[0]
    if any(each.thinking != way.thinking for each in ways):
        raise InvalidRequest(
            "Some of the conversations end within a thought and others do not: their answers are not read "
            "alike.",
            param="messages",
            advice="Send them as requests of their own.",
        )
    params = params.with_(structured_outputs=way.outputs)
    skip(way.skipped, ignored)
    params = with_budget(params, state.config, state.tokenizer, begun=way.thinking)
    default = state.default_sampling.get("max_tokens")
    return Ask(
        beams=beams(request, params),
        inputs=texts,
        params=params,
        max_tokens=asked,
        limit=limit,
        default=None if default is None else int(default),
        parser=way.parser,
        told=Told(
            logprobs=told_logprobs(prompt_logprobs, state.engine.info.vocab_size),
            ids=int(request.return_token_ids),
            text=int(request.return_prompt_text),
        ),
    )


_LOOKED_AT = 1 << 18
"""Characters of a request's template in which names of fields are looked for."""


def read_messages(
    state: State, request: ChatRequest | TokenizeChatRequest, ignored: Ignored
) -> list[dict[str, Any]]:
    """The messages as the template reads them. Raises InvalidRequest, naming the place."""
    known = _words_of(state, request)
    return normalise(request.messages, ignored, as_parts=state.content_parts, words=known)


def _words_of(state: State, request: ChatRequest | TokenizeChatRequest) -> Collection[str]:
    """Those of the template that writes the prompt. Raises InvalidRequest for one that must not be."""
    own, template = request.chat_template, state.chat_template
    if own is None or own in template.sources:
        return template.words
    if state.config.trust_request_chat_template:
        return words(own[:_LOOKED_AT])
    raise InvalidRequest(
        "chat_template is not accepted from requests by this server.",
        param="chat_template",
        advice="Start it with --trust-request-chat-template to allow that.",
    )


def template_variables(state: State, request: ChatRequest | TokenizeChatRequest) -> dict[str, Any]:
    """What the template is told beside the messages. Raises InvalidRequest for what must not be."""
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
    return {**defaults, **options, **variables}


async def render(
    state: State,
    request: ChatRequest | TokenizeChatRequest,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None = None,
    tools: ToolUse | None = None,
) -> str:
    """The prompt's text.

    Args:
        variables: those of `template_variables`, if they are known.
        tools: that the model is told of.

    Raises InvalidRequest where the template or the request makes that impossible.
    """
    variables = template_variables(state, request) if variables is None else variables
    offered = {} if tools is None else {"tools": list(tools.offered)}
    return await state.chat_template.render_async(
        messages, **{**offered, **variables}, chat_template=request.chat_template
    )


class ChatWriter(OpenAIWriter):
    """chat.completion and chat.completion.chunk."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        state: State,
        request: ChatRequest,
        id: str,
        conversations: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """conversations: that are answered, each with n choices; by default, the request's one."""
        super().__init__(state, request, id)
        self._state = state
        self._request = request
        self._role = state.config.response_role
        self._tells_thoughts = request.include_reasoning or state.config.reasoning_parser is None
        choice = request.tool_choice
        self._named = isinstance(choice, dict) and choice.get("type") == "function"
        conversations = [request.messages] if conversations is None else conversations
        self._echoes = [_echoed(request, messages, self._role) for messages in conversations]

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
        if echo := self._echo(choice):
            opened += self._form.chunk(choice.index, _content(echo), usage=usage)
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
                "finish_reason": self._finish_reason(pending),
            }
            if pending.finish_reason is not None:
                rest["stop_reason"] = pending.stop_reason
            if self._wants_ids:
                rest["token_ids"] = pending.token_ids
        *before, last = self._deltas(pending)
        usage = self._usage(choice, choice.generated)
        events = [self._form.chunk(choice.index, delta, usage=usage) for delta in before]
        events.append(self._form.chunk(choice.index, last, rest=rest, usage=usage))
        return b"".join(events)

    def _deltas(self, pending: Pending) -> list[bytes]:
        """What is pending, a delta for each kind of it; at least one."""
        if pending.parsed is None:
            return [_content(pending.text)]
        deltas: list[dict[str, Any]] = []
        for piece in pending.parsed:
            if isinstance(piece, CallEnd) or (isinstance(piece, Thought) and not self._tells_thoughts):
                continue
            delta = _delta(piece)
            if not (deltas and _join(deltas[-1], delta)):
                deltas.append(delta)
        return [b'"delta":' + encode(delta) for delta in deltas] or [_content("")]

    @property
    def _wants_tokens(self) -> bool:
        return (self._request.logprobs and self._tells_thoughts) or self._wants_ids

    @property
    def _wants_ids(self) -> bool:
        return self._request.return_token_ids and self._tells_thoughts

    def _choice(self, choice: Choice) -> dict[str, Any]:
        output = choice.pending
        written = Message.of(output.parts)
        message: dict[str, Any] = {"role": self._role, "refusal": None}
        content = self._echo(choice) + written.content
        message["content"] = content if content or not (written.calls or written.reasoning) else None
        if written.reasoning and self._tells_thoughts:
            message |= _reasoning(written.reasoning)
        if written.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in written.calls
            ]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": self._finish_reason(output),
            "stop_reason": output.stop_reason,
            "token_ids": output.token_ids if self._wants_ids else None,
        }

    def _echo(self, choice: Choice) -> str:
        """What the answer repeats before its own text."""
        return self._echoes[choice.index // self._request.n]

    def _finish_reason(self, pending: Pending) -> str | None:
        """As in OpenAI's API, a function that the request has named is no reason of its own. Nor is a call
        that a stop string cuts off: it is not to be run."""
        if pending.finish_reason == "stop" and pending.calls and not (self._named or pending.cut):
            return "tool_calls"
        return pending.finish_reason

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any] | None:
        request = self._request
        if not request.logprobs or not self._tells_thoughts:  # tokens would tell them
            return None
        top = -1 if request.logprob_token_ids else request.top_logprobs
        return chat_logprobs(entries, top, as_ids=self._state.tokens_as_ids(request))


def _content(text: str) -> bytes:
    return b'"delta":{"content":' + encode(text) + b"}"


def _reasoning(text: str) -> dict[str, str]:
    """vLLM's name, and the one that DeepSeek's clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Text):
        return {"content": piece.text}
    if isinstance(piece, Thought):
        return _reasoning(piece.text)
    call: dict[str, Any] = {"index": piece.index}
    if isinstance(piece, CallBegin):
        call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
    elif isinstance(piece, Arguments):
        call["function"] = {"arguments": piece.text}
    return {"tool_calls": [call]}


def _join(delta: dict[str, Any], more: dict[str, Any]) -> bool:
    """Add to a delta what is of its kind; False where it is not. Calls are told one by one, so that no client
    has to read a list of several: the first part of a call brings its id and name, the others arguments."""
    if delta.keys() != more.keys() or "tool_calls" in delta:
        return False
    for name, text in more.items():
        delta[name] += text
    return True


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


def _echoed(request: ChatRequest, messages: Sequence[Mapping[str, Any]], role: str) -> str:
    """Text of the last message, if the answer goes on with it and echo asks for it."""
    last = messages[-1] if messages else {}
    if not request.echo or last.get("role") != role:
        return ""
    content = normalise([last])[0]["content"]
    return content if isinstance(content, str) else ""
