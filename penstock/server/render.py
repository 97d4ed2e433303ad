"""…/render of chats, completions, Messages and Responses: the way of a request up to the engine.

Their answers have vLLM's shape, whatever the dialect: token ids and sampling parameters, of completions a
list with an entry for each prompt. Errors have the dialect's own.
"""

from __future__ import annotations

from typing import Any

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import UnsupportedParameter
from penstock.core.sampling_params import SamplingParams
from penstock.http.exchange import respond
from penstock.http.ids import response_id

from .params import check_common
from .pipeline import Format, decoded, prepared, whole_body
from .shapes import Rendered
from .state import State


async def render(
    format: Format[Any],
    state: State,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    several: bool = False,
) -> None:
    """What the engine would be asked.

    several: whether the answer is a list, as requests have any number of prompts.
    """
    scope["error_body"] = format.error
    body = await whole_body(state, scope, receive)
    request, ignored = await decoded(state, body, lambda _: format.shape)
    state.check_model(request.model)
    state.check_runner(format.pools)
    check_common(request, state.scheduling_policy)
    ask = await format.ask(state, request, ignored)
    if ask.beams is not None:
        raise UnsupportedParameter(
            "use_beam_search is not supported here: a search asks the engine for each token anew.",
            param="use_beam_search",
        )
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
    await respond(send, encode(rendered if several else rendered[0]))


def _told(params: SamplingParams) -> dict[str, Any]:
    told = {name: getattr(params, name) for name in params.__dataclass_fields__}
    return {
        **told,
        "stop": list(params.stop),
        "logit_bias": {str(k): v for k, v in params.logit_bias.items()},
    }
