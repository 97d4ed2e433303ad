"""What every endpoint works with: the engine, the tokenizer, the configuration, and what is kept.

It knows which model names are served and whether new work is taken; it does not know any endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.core.errors import (
    Draining,
    EngineDead,
    ModelNotFound,
    PenstockError,
    Unavailable,
    UnsupportedParameter,
    quote,
)
from penstock.core.pooling import PoolingInfo
from penstock.engine.client import EngineClient
from penstock.observe.metrics import Metrics
from penstock.text.chat_template import ChatTemplate
from penstock.text.grammar_check import GrammarCheck
from penstock.text.tokenizer import Tokenizer

from .batches.desk import Desk
from .bills import Bills
from .config import ServerConfig
from .ignored import IgnoredLog
from .protocol import GenerateRequest
from .responses.store import ResponseStore
from .work import Work

_RETRY_AFTER = 5
"""Seconds after which a server that loads or restarts is worth another try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Made once by `create_app`."""

    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    content_parts: bool
    """Whether the template wants a message's content as a list of parts instead of a string."""
    config: ServerConfig
    metrics: Metrics
    default_sampling: Mapping[str, float | int]
    """Sampling defaults of the model's generation_config.json, under the names of SamplingParams."""
    scheduling_policy: str
    model_names: tuple[str, ...]
    """The first is the one that stands in responses."""
    version: str
    fingerprint: str
    """OpenAI's `system_fingerprint`: the same for servers of the same version, model, dtype and device."""
    created: int
    """Unix time of the start."""
    monotonic: Callable[[], float]
    """The engine's clock, seconds."""
    wall: Callable[[], float]
    """Unix time, seconds."""
    ignored_log: IgnoredLog
    bills: Bills
    """Final bills of requests, for a gateway."""
    grammars: GrammarCheck
    """Says whether a structure of an output can be compiled."""
    responses: ResponseStore | None
    """Responses that can be asked for again; None where none are kept."""
    batches: Desk | None
    """Files and batches; None without --batch-dir."""
    detached: set[asyncio.Task[None]]
    """Work that goes on without a connection."""
    work: Work
    """Where everything goes that would hold up the event loop."""

    @property
    def model_name(self) -> str:
        """The name in responses and metrics."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFound unless `name` is served here; None stands for the only model there is."""
        if name is not None and name not in self.model_names:
            served = ", ".join(self.model_names)
            raise ModelNotFound(
                f"The model {quote(name)} does not exist.",
                param="model",
                advice=f"This server has: {served}.",
            )

    def check_runner(self, pools: bool) -> None:
        """Raise UnsupportedParameter for a request of the other kind than the model is."""
        if pools == (self.engine.info.pooling is not None):
            return
        if pools:
            raise UnsupportedParameter(
                "The model generates text: it is not served for embeddings, scores or classes.",
                param="model",
                advice="Ask /v1/chat/completions or /v1/completions, or serve it with --runner pooling.",
            )
        raise UnsupportedParameter(
            f"The model does not generate text: it is served for {', '.join(self.pooling.tasks)}.",
            param="model",
            advice="Ask /v1/embeddings, /classify, /score, /rerank or /pooling.",
        )

    @property
    def pooling(self) -> PoolingInfo:
        """Of a model that pools; see check_runner."""
        info = self.engine.info.pooling
        assert info is not None
        return info

    def tokens_as_ids(self, request: GenerateRequest) -> bool:
        """Whether logprobs write tokens as `token_id:N`: the request's word, else the server's."""
        asked = request.return_tokens_as_token_ids
        return self.config.return_tokens_as_token_ids if asked is None else asked

    def check_accepting(self) -> None:
        """Raise Unavailable, with the reason, unless the engine takes new requests now."""
        reason = self.unavailable()
        if reason is not None:
            raise reason

    def unavailable(self) -> PenstockError | None:
        """Why no new request is taken; None when the server is ready."""
        engine = self.engine
        if engine.failure is not None:
            failure = engine.failure
            return failure if isinstance(failure, EngineDead) else EngineDead(str(failure))
        if engine.draining:
            return Draining(
                "The server is shutting down and takes no new requests.", retry_after=_RETRY_AFTER
            )
        if not engine.ready:
            return Unavailable("The engine is still loading the model.", retry_after=_RETRY_AFTER)
        return None
