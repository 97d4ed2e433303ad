"""POST /invocations, SageMaker's one door: a body is known by its fields, as vLLM does it.

a model that generates   messages ─▶ chat · prompt ─▶ completion
a model that pools       input, messages ─▶ its first of embeddings, classes, /pooling
                         text_1, queries, data_1 ─▶ scores · query, documents ─▶ ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from .chat import ChatFormat
from .completions import CompletionFormat
from .pipeline import Format, generate_any
from .scores import RerankFormat, ScoreFormat
from .state import State
from .vectors import ClassifyFormat, EmbeddingFormat, PoolingFormat

_GENERATING: Sequence[Format[Any]] = (ChatFormat(), CompletionFormat())
_PAIRS: Sequence[Format[Any]] = (ScoreFormat(), RerankFormat())


async def invoke(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as the endpoint would whose fields the body has."""
    await generate_any(_formats(state), state, scope, receive, send)


def _formats(state: State) -> Sequence[Format[Any]]:
    """What bodies may be, in the order in which they are tried."""
    if state.engine.info.pooling is None:
        return _GENERATING
    tasks = state.pooling.tasks
    if "embed" in tasks:
        vectors: Format[Any] = EmbeddingFormat()
    else:
        vectors = ClassifyFormat() if "classify" in tasks else PoolingFormat()
    return (vectors, *_PAIRS, *_GENERATING)  # the last ones are told that the model does not generate
