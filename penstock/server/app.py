"""The ASGI application: path → endpoint(state, scope, receive, send).

It knows which endpoint serves which path, and makes the state that they share. It starts nothing and owns
nothing: `penstock.http.serve` runs it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import StartupError
from penstock.engine.client import EngineClient
from penstock.http.dialects import messages_error
from penstock.http.errors import ErrorMiddleware
from penstock.http.exchanges import Exchange
from penstock.http.layers import application
from penstock.observe.metrics import Metrics
from penstock.observe.names import parse_version
from penstock.text.chat_template import ChatTemplate
from penstock.text.grammar_check import GrammarCheck
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary

from . import behalf, health, models, tokenize
from .batches import routes as batches
from .batches.desk import Desk
from .batches.lines import URLS
from .batches.store import BatchStore
from .batches.worker import BatchWorker
from .bills import Bills
from .chat import ChatFormat
from .chat_batch import ChatBatchFormat
from .cohere import CohereEmbedFormat
from .completions import CompletionFormat
from .config import ServerConfig
from .docs import DOCS, Document
from .ignored import IgnoredLog
from .invocations import invoke
from .messages.format import MessagesFormat, count_tokens
from .messages.format import create as create_message
from .pipeline import generate
from .render import render
from .responses import format as responses
from .responses.store import ResponseStore
from .scores import RerankFormat, ScoreFormat
from .state import State
from .vectors import ClassifyFormat, EmbeddingFormat, PoolingFormat
from .work import Work

Handler = Callable[[State, Scope, Receive, Send], Awaitable[None]]

#: (path, method, handler): the public surface.
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("/v1/chat/completions", "POST", partial(generate, ChatFormat())),
    ("/v1/completions", "POST", partial(generate, CompletionFormat())),
    ("/v1/chat/completions/batch", "POST", partial(generate, ChatBatchFormat())),
    ("/v1/chat/completions/render", "POST", partial(render, ChatFormat())),
    ("/v1/completions/render", "POST", partial(render, CompletionFormat(), several=True)),
    ("/v1/responses", "POST", responses.create),
    ("/v1/responses/render", "POST", responses.render_response),
    ("/v1/responses/input_tokens", "POST", responses.count_tokens),
    ("/v1/responses/{name}", "GET", responses.retrieve),
    ("/v1/responses/{name}", "DELETE", responses.delete),
    ("/v1/responses/{name}/cancel", "POST", responses.cancel),
    ("/v1/responses/{name}/input_items", "GET", responses.input_items),
    ("/v1/files", "POST", batches.upload),
    ("/v1/files", "GET", batches.list_files),
    ("/v1/files/{name}", "GET", batches.get_file),
    ("/v1/files/{name}", "DELETE", batches.delete_file),
    ("/v1/files/{name}/content", "GET", batches.content),
    ("/v1/batches", "POST", batches.create),
    ("/v1/batches", "GET", batches.list_batches),
    ("/v1/batches/{name}", "GET", batches.get_batch),
    ("/v1/batches/{name}/cancel", "POST", batches.cancel),
    ("/v1/messages", "POST", create_message),
    ("/v1/messages/count_tokens", "POST", count_tokens),
    ("/v1/messages/render", "POST", partial(render, MessagesFormat())),
    ("/invocations", "POST", invoke),
    ("/v1/embeddings", "POST", partial(generate, EmbeddingFormat())),
    ("/pooling", "POST", partial(generate, PoolingFormat())),
    ("/classify", "POST", partial(generate, ClassifyFormat())),
    ("/score", "POST", partial(generate, ScoreFormat())),
    ("/v1/score", "POST", partial(generate, ScoreFormat())),
    ("/rerank", "POST", partial(generate, RerankFormat())),
    ("/v1/rerank", "POST", partial(generate, RerankFormat())),
    ("/v2/rerank", "POST", partial(generate, RerankFormat(cohere=True))),
    ("/v2/embed", "POST", partial(generate, CohereEmbedFormat())),
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

#: Of paths that have errors of their own shape.
ERROR_BODIES = {"/v1/messages": messages_error, "/v1/messages/count_tokens": messages_error}

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
    on_desk: Callable[[Desk], None] | None = None,
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
        on_desk: given what has the files and batches, where there are any: its worker is to be started when
            the server serves, and closed when it does not.
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
            block_bytes=info.block_bytes,
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
        grammars=GrammarCheck(lambda: vocabulary(tokenizer, info.vocab_size, info.eos_ids)),
        responses=_store(config),
        batches=None,
        detached=set(),
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

    if config.batch_dir is not None:
        desk = _desk(state, config.batch_dir, _routes(state, routes))
        state = replace(state, batches=desk)
        if on_desk is not None:
            on_desk(desk)
    return application(_routes(state, routes), config, [observe], config.gateway_key, ERROR_BODIES)


def inner(routes: Sequence[Route]) -> ASGIApp:
    """The application for callers of this process: no keys, no log, no metrics of connections."""
    return ErrorMiddleware(Router(routes, redirect_slashes=False))


def _desk(state: State, folder: str, routes: Sequence[Route]) -> Desk:
    config, engine = state.config, state.engine
    try:
        store = BatchStore(Path(folder))
    except (OSError, sqlite3.Error) as error:
        raise StartupError(
            f"--batch-dir {folder} cannot be used: {error}.",
            param="--batch-dir",
            advice="It must be a folder that this user can write, and no other server's.",
        ) from error
    worker = BatchWorker(
        store,
        inner(routes),
        urls=[url for url in URLS if url in {route.path for route in routes}],
        concurrency=config.batch_concurrency,
        most_lines=config.max_batch_requests,
        wall=state.wall,
        stopped=lambda: engine.draining or engine.failure is not None,
    )
    return Desk(store, worker, config.max_file_bytes)


def _store(config: ServerConfig) -> ResponseStore | None:
    """One for all requests: with several processes, the next one might not find what this one keeps."""
    if config.max_stored_responses == 0 or config.api_server_count > 1:
        return None
    return ResponseStore(config.max_stored_responses, config.max_stored_response_bytes)


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
