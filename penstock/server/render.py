"""/v1/chat/completions/render and /v1/completions/render: the way of a request up to the engine.

Their answers have vLLM's shape: token ids and sampling parameters, of a chat one, of completions a list.
"""

from __future__ import annotations

from typing import Any

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.sampling_params import SamplingParams
from penstock.http.exchange import respond
from penstock.http.ids import response_id

from .params import check_common
from .pipeline import Format, decoded, prepared, whole_body
from .shapes import Rendered
from .state import State

_CHAT = "messages"


async def render(format: Format[Any], state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """What the engine would be asked."""
    body = await whole_body(state, scope, receive)
    request, ignored = await decoded(state, body, lambda _: format.shape)
    state.check_model(request.model)
    check_common(request, state.scheduling_policy)
    ask = await format.ask(state, request, ignored)
    ignored.tell(scope, state.ignored_log)
    prompts = await prepared(format, state, request, ask)
    assert isinstance(ask.params, SamplingParams)
    id = response_id(format.prefix, scope, request.request_id).response
    rendered = [
        Rendered(
            request_id=id,
            token_ids=list(prompt.ids),
            sampling_params=_told(ask.params.with_(max_tokens=prompt.max_tokens)),
            model=state.model_name,
            stream=request.stream,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        for prompt in prompts
    ]
    await respond(send, encode(rendered[0] if format.prompt == _CHAT else rendered))


def _told(params: SamplingParams) -> dict[str, Any]:
    told = {name: getattr(params, name) for name in params.__dataclass_fields__}
    return {
        **told,
        "stop": list(params.stop),
        "logit_bias": {str(k): v for k, v in params.logit_bias.items()},
    }
