"""POST /v1/messages, as a format on the one pipeline, and POST /v1/messages/count_tokens.

Both make a chat of the request, in OpenAI's words, and have `chat` do the work.
"""

from __future__ import annotations

import re

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, PenstockError, UnsupportedParameter, quote
from penstock.core.sampling_params import SamplingParams
from penstock.http.dialects import messages_error
from penstock.http.exchange import header, respond
from penstock.server import tokens
from penstock.server.chat import ChatFormat, read_messages, render, template_variables
from penstock.server.generation import Generation
from penstock.server.ignored import Ignored
from penstock.server.limits import check_messages
from penstock.server.parsing import with_budget
from penstock.server.pipeline import Ask, decoded, generate, whole_body
from penstock.server.protocol import ChatRequest, decode
from penstock.server.renamed import Renamed
from penstock.server.state import State
from penstock.server.tools import read_tools

from .answer import MessagesWriter
from .request import chat_fields
from .shapes import CountTokensRequest, MessagesRequest, TokenCount

_OLDEST = "2023-06-01"
"""Version of the dialect; the one before it had other events. Later ones have more fields."""
_NAMES = Renamed(
    (
        (r"\btools\[(\d*)\]\.function\.parameters\b", r"tools[\1].input_schema"),
        (r"\btools\[(\d*)\]\.function\b", r"tools[\1]"),
        (r"\bresponse_format\.json_schema\.schema\b", "output_config.format.schema"),
    )
)
_DATE = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]", re.ASCII)


class MessagesFormat:
    """See Format."""

    shape = MessagesRequest
    prefix = "msg_"
    prompt = "messages"
    marks: tuple[str, ...] = ()
    pools = False
    empty = ChatFormat.empty

    def __init__(self) -> None:
        self._chat = ChatFormat()

    async def ask(self, state: State, request: MessagesRequest, ignored: Ignored) -> Ask:
        """See Format."""
        ignored.renamed = _NAMES.text
        fields = chat_fields(request, ignored)
        if "thinking_token_budget" in fields and not _holds_budgets(state):
            if ignored.strict:
                raise UnsupportedParameter(
                    "thinking.budget_tokens is not enforced by this server.",
                    param="thinking.budget_tokens",
                    advice="It needs a --reasoning-parser, and a model that ends thoughts with one token.",
                )
            del fields["thinking_token_budget"]  # max_tokens bounds thought and answer together
            ignored.add("thinking.budget_tokens")
        return await self._chat.ask(state, decode(_given(fields), ChatRequest, ignored), ignored)

    def error(self, error: PenstockError) -> bytes:
        """See Format."""
        return messages_error(_NAMES.error(error))

    def writer(
        self, state: State, request: MessagesRequest, id: str, generation: Generation
    ) -> MessagesWriter:
        """See Format."""
        return MessagesWriter(state, request, id)


_FORMAT = MessagesFormat()


async def create(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The next message of a conversation, in Anthropic's dialect."""
    _check_version(scope)
    await generate(_FORMAT, state, scope, receive, send)


async def count_tokens(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """`{"input_tokens"}` of what POST /v1/messages would have the model read."""
    _check_version(scope)
    body = await whole_body(state, scope, receive)
    scope["error_body"] = _FORMAT.error
    request, ignored = await decoded(state, body, lambda _: CountTokensRequest)
    ignored.renamed = _NAMES.text
    state.check_model(request.model)
    chat = decode(_given(chat_fields(request, ignored)), ChatRequest, ignored)
    check_messages(chat.messages, state.config)
    tools = read_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls, state.config, ignored)
    messages = read_messages(state, chat, ignored)
    text = await render(state, chat, messages, template_variables(state, chat), tools)
    ignored.tell(scope, state.ignored_log)
    count = await tokens.count_tokens(state, text, chat.add_special_tokens, "messages")
    await respond(send, encode(TokenCount(count)))


def _holds_budgets(state: State) -> bool:
    """Whether the thoughts of this model can be ended."""
    try:
        with_budget(SamplingParams(thinking_token_budget=1), state.config, state.tokenizer)
    except InvalidRequest:
        return False
    return True


def _given(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_version(scope: Scope) -> None:
    """vLLM's clients send none."""
    version = header(scope, b"anthropic-version")
    if version is not None and not (_DATE.fullmatch(version) and version >= _OLDEST):
        raise InvalidRequest(
            f"anthropic-version must be a date from {_OLDEST} on, got {quote(version)}.",
            param="anthropic-version",
        )
