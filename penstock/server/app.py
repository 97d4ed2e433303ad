"""The ASGI application: path → endpoint(state, scope, receive, send).

It knows which endpoint serves which path, and makes the state that they share. It starts nothing and owns
nothing: `penstock.http.serve` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.engine.client import EngineClient
from penstock.http.exchanges import Exchange
from penstock.http.layers import application
from penstock.observe.metrics import Metrics
from penstock.observe.names import parse_version
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from . import behalf, health, models, tokenize
from .bills import Bills
from .chat import ChatFormat
from .completions import CompletionFormat
from .config import ServerConfig
from .docs import DOCS, Document
from .ignored import IgnoredLog
from .pipeline import generate, generate_any
from .state import State
from .work import Work

Handler = Callable[[State, Scope, Receive, Send], Awaitable[None]]

#: (path, method, handler): the public surface.
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("/v1/chat/completions", "POST", partial(generate, ChatFormat())),
    ("/v1/completions", "POST", partial(generate, CompletionFormat())),
    ("/invocations", "POST", partial(generate_any, (ChatFormat(), CompletionFormat()))),
    ("/v1/models", "GET", models.list_models),
    ("/v1/models/{name:path}", "GET", models.get_model),
    ("/v1/bills", "GET", behalf.list_bills),
    ("/tokenize", "POST", tokenize.tokenize),
    ("/detokenize", "POST", tokenize.detokenize),
    ("/health", "GET", health.health),
    ("/ping", "GET", health.health),
    ("/ping", "POST", health.health),
    ("/livez", "GET", health.livez),
    ("/readyz", "GET", health.readyz),
    ("/metrics", "GET", health.metrics),
    ("/version", "GET", health.version),
    ("/load", "GET", health.load),
)

#: Served where --enable-tokenizer-info-endpoint asks for it.
TOKENIZER_INFO: tuple[str, str, Handler] = ("/tokenizer_info", "GET", tokenize.tokenizer_info)


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    config: ServerConfig,
    *,
    default_sampling: Mapping[str, float | int] | None = None,
    scheduling_policy: str = "fcfs",
    enable_prefix_caching: bool = True,
    metrics: Metrics | None = None,
    version: str | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
) -> ASGIApp:
    """The application that serves `engine`.

    Args:
        default_sampling: from the model's generation_config.json, under the names of SamplingParams.
        scheduling_policy: the engine's; requests may carry a priority only under "priority".
        enable_prefix_caching: as the engine is configured, for the metrics.
        metrics: made here for the engine's model if not given; fed with the engine's steps either way.
        version: of Penstock; the installed one if not given.
        monotonic: the engine's clock (CLOCK_MONOTONIC), seconds.
        wall: Unix time, seconds.
    """
    info = engine.info
    names = config.served_model_name or (info.path,)
    version = version or _version()
    if metrics is None:
        version_asked = config.show_hidden_metrics_for_version
        metrics = Metrics(
            names[0],
            info.max_model_len,
            old_names_of=None if version_asked is None else parse_version(version_asked),
        )
        metrics.describe_cache(
            block_size=info.block_size,
            num_blocks=info.num_blocks,
            dtype=info.dtype,
            prefix_caching=enable_prefix_caching,
        )
        metrics.describe_engine(
            device=info.device,
            dtype=info.dtype,
            quantization=info.quantization,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
        )
    engine.on_stats(metrics.observe_step)
    same = "\0".join((version, names[0], info.architecture, info.dtype, info.device))
    state = State(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=chat_template,
        content_parts=chat_template.available and chat_template.content_format == "openai",
        config=config,
        metrics=metrics,
        default_sampling=dict(default_sampling or {}),
        scheduling_policy=scheduling_policy,
        model_names=names,
        version=version,
        fingerprint=f"fp_{sha256(same.encode()).hexdigest()[:10]}",
        created=int(wall()),
        monotonic=monotonic,
        wall=wall,
        ignored_log=IgnoredLog(monotonic),
        bills=Bills(),
        work=Work(),
    )
    routes = [*ROUTES]
    if config.enable_tokenizer_info_endpoint:
        routes.append(TOKENIZER_INFO)
    if not config.disable_fastapi_docs:
        document = Document((*routes, *DOCS), version, config)
        routes += [(path, method, partial(handler, document)) for path, method, handler in DOCS]
    http = metrics.http

    def observe(exchange: Exchange) -> None:
        http.observe(
            exchange.template,
            exchange.method,
            exchange.status,
            exchange.seconds,
            exchange.request_bytes,
            exchange.response_bytes,
        )

    return application(_routes(state, routes), config, [observe], config.gateway_key)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """A handler with the state it works on, as an ASGI application."""

    state: State
    handlers: Mapping[str, Handler]
    """By method."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self.handlers[method](self.state, scope, receive, send)


def _routes(state: State, routes: Sequence[tuple[str, str, Handler]]) -> list[Route]:
    by_path: dict[str, dict[str, Handler]] = {}
    for path, method, handler in routes:
        by_path.setdefault(path, {})[method] = handler
    return [
        Route(path, _Endpoint(state, handlers), methods=list(handlers), name=path)
        for path, handlers in by_path.items()
    ]


def _version() -> str:
    try:
        return installed_version("penstock")
    except PackageNotFoundError:  # run from a source tree
        return "0+unknown"
