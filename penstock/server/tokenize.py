"""POST /tokenize and POST /detokenize, in vLLM's shapes. They know the tokenizer and the chat template."""

from __future__ import annotations

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.http.body import parse_object, read_body
from penstock.http.exchange import respond

from .chat import render
from .conversation import normalise
from .protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest, decode
from .state import State
from .tokens import check_ids, decode_ids, encode_texts


async def tokenize(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """`{"prompt"}` or `{"messages"}` → `{"count", "max_model_len", "tokens", "token_strs"}`."""
    raw = parse_object(await read_body(scope, receive, state.config.max_body_bytes))
    request: TokenizeChatRequest | TokenizeCompletionRequest
    if raw.get("messages") is not None:
        request = decode(raw, TokenizeChatRequest)
        state.check_model(request.model)
        text = await render(state, request, normalise(request.messages, as_parts=state.content_parts))
    else:
        request = decode(raw, TokenizeCompletionRequest)
        state.check_model(request.model)
        text = request.prompt
    (ids,) = await encode_texts(state, [text], request.add_special_tokens)
    strings = [state.tokenizer.token(id) for id in ids] if request.return_token_strs else None
    answer = {
        "count": len(ids),
        "max_model_len": state.engine.info.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }
    await respond(send, encode(answer))


async def detokenize(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """`{"tokens"}` → `{"prompt"}`, special tokens included."""
    raw = parse_object(await read_body(scope, receive, state.config.max_body_bytes))
    request = decode(raw, DetokenizeRequest)
    state.check_model(request.model)
    check_ids(request.tokens, state.engine.info.vocab_size, "tokens")
    text = await decode_ids(state, request.tokens, skip_special_tokens=False)
    await respond(send, encode({"prompt": text}))
