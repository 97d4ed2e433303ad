"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes.

They know the tokenizer and the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.http.exchange import respond

from .chat import read_messages, render, template_variables
from .limits import check_messages, too_much
from .pipeline import decoded, whole_body
from .protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from .state import State
from .tokens import check_ids, decode_ids
from .tools import read_tools


async def tokenize(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """`{"prompt"}` or `{"messages"}` → `{"count", "max_model_len", "tokens", "token_strs"}`."""
    body = await whole_body(state, scope, receive)
    request, ignored = await decoded(state, body, _shape)
    state.check_model(request.model)
    if isinstance(request, TokenizeChatRequest):
        check_messages(request.messages, state.config)
        messages = read_messages(state, request, ignored)
        # tokens are counted, and nothing is called: no parser is needed
        tools = read_tools(request.tools, "none", None, state.config, ignored)
        text = await render(state, request, messages, template_variables(state, request), tools)
    else:
        text = request.prompt
    ignored.tell(scope, state.ignored_log)
    if len(text) > state.config.max_tokenize_length:
        what = "The number of characters to tokenize"
        field = "messages" if isinstance(request, TokenizeChatRequest) else "prompt"
        raise too_much(what, len(text), state.config, "max_tokenize_length", field)
    await respond(send, await state.work.do(len(text), _tokenized, state, text, request))


def _shape(fields: Mapping[str, Any]) -> type[TokenizeChatRequest] | type[TokenizeCompletionRequest]:
    return TokenizeChatRequest if fields.get("messages") is not None else TokenizeCompletionRequest


def _tokenized(state: State, text: str, request: TokenizeChatRequest | TokenizeCompletionRequest) -> bytes:
    tokenizer = state.tokenizer
    (ids,) = tokenizer.encode_batch([text], request.add_special_tokens)
    answer = {
        "count": len(ids),
        "max_model_len": state.engine.info.max_model_len,
        "tokens": ids,
        "token_strs": [tokenizer.token(id) for id in ids] if request.return_token_strs else None,
    }
    return encode(answer)


async def detokenize(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """`{"tokens"}` → `{"prompt"}`, special tokens included."""
    body = await whole_body(state, scope, receive)
    request, ignored = await decoded(state, body, lambda _: DetokenizeRequest)
    state.check_model(request.model)
    ignored.tell(scope, state.ignored_log)
    check_ids(request.tokens, state.engine.info.vocab_size, "tokens")
    text = await decode_ids(state, request.tokens, skip_special_tokens=False)
    await respond(send, encode({"prompt": text}))


async def tokenizer_info(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The tokenizer's configuration, without files, with the chat template in use.

    Behind a flag, as in vLLM: a template may be somebody's secret.
    """
    skipped = ("vocab_file", "merges_file")
    config = {name: _plain(value) for name, value in state.tokenizer.config.items() if name not in skipped}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if templates := state.chat_template.sources:
        config["chat_template"] = templates.get("default") or next(iter(templates.values()))
    await respond(send, encode(config))


def _plain(value: Any) -> Any:
    """Tokens, written as objects with their flags, as their texts."""
    if isinstance(value, dict):
        if isinstance(value.get("content"), str):
            return value["content"]
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
