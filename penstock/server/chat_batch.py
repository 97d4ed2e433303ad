"""POST /v1/chat/completions/batch: the format of vLLM's request with many conversations.

    messages: [[…], […], …] ─▶ one request of the engine with as many prompts ─▶ choices, in their order

The fields are those of a chat, and hold for all of them; what only one answer can have is refused, as in
vLLM. It knows what is not alike; everything else is the business of `chat`.
"""

from __future__ import annotations

from collections.abc import Iterator

from penstock.core.errors import InvalidRequest, UnsupportedParameter

from .chat import ChatFormat, ChatWriter, ask_chats
from .generation import Generation
from .ignored import Ignored
from .limits import check_choices
from .openai import OpenAIFormat
from .pipeline import Ask
from .protocol import ChatBatchRequest
from .state import State

ALONE = {
    "stream": False,
    "n": 1,
    "use_beam_search": False,
    "tools": [],
    "prompt_logprobs": None,
    "return_prompt_text": False,
    "generated_token_ids": [],
}
"""Fields that one conversation has in a request of its own → what they must be here."""


class ChatBatchFormat(OpenAIFormat):
    """See Format."""

    shape = ChatBatchRequest
    prefix = ChatFormat.prefix
    prompt = ChatFormat.prompt
    empty = ChatFormat.empty

    async def ask(self, state: State, request: ChatBatchRequest, ignored: Ignored) -> Ask:
        """See Format."""
        for name, value in ALONE.items():
            if getattr(request, name) != value:
                raise UnsupportedParameter(
                    f"{name} is not supported for many conversations in one request.",
                    param=name,
                    advice="Send them to /v1/chat/completions, beside each other.",
                )
        if not request.messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        check_choices(len(request.messages), 1, None, state.config, prompt="messages")
        conversations = {f"messages[{place}]": each for place, each in enumerate(request.messages)}
        return await ask_chats(state, request, conversations, ignored, prompt_logprobs=None)

    def writer(
        self, state: State, request: ChatBatchRequest, id: str, generation: Generation
    ) -> ChatBatchWriter:
        """See Format."""
        return ChatBatchWriter(state, request, id, request.messages)


class ChatBatchWriter(ChatWriter):
    """A chat.completion with a choice for each conversation."""

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        return self._answer(generation, map(self._choice, generation.choices), {})
