"""POST /score and /rerank: how near two texts are, and documents in the order of that.

    cross-encoder   (query, document) ─▶ one prompt ─▶ the number of its one label
    bi-encoder      query, documents ─▶ embeddings ─▶ cosines
    multi-vector    query, documents ─▶ an embedding for each token ─▶ Σ over the query's, largest product

It knows vLLM's fields and answers, with what Cohere and Jina write otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Literal

from msgspec.json import encode

from penstock.core.errors import InvalidRequest
from penstock.core.pooling import Task, scores

from .generation import Choice, Generation
from .ignored import Ignored
from .openai import OpenAIFormat
from .pipeline import Ask
from .pooled import Input, Pair
from .protocol_pooling import PairRequest, RerankRequest, ScoreRequest
from .state import State
from .vectors import vectors_of

_LEFT = ("text_1", "queries", "data_1")
_RIGHT = ("text_2", "documents", "items", "data_2")


class PairFormat(OpenAIFormat):
    """What both have in common."""

    pools = True

    empty = "The texts must not be empty."

    async def pairs(
        self, state: State, request: PairRequest, left: Sequence[str], right: Sequence[str], field: str
    ) -> Ask:
        """What the engine is asked for each left text with its right one. Raises InvalidRequest."""
        if len(left) > 1 and len(left) != len(right):
            raise InvalidRequest(
                f"The texts must be one and any number, or as many on both sides, got {len(left)} and "
                f"{len(right)}.",
                param=field,
            )
        self._check_limits(state, request)
        task = scoring(state)
        params = state.pooling.pooling(task, activate=request.use_activation)
        if task != "classify":
            return Ask(
                inputs=[*_most(state, left, request, 0), *_most(state, right, request, 1)], params=params
            )
        inputs: list[Input] = []
        for first, second in zip(cycle(left) if len(left) == 1 else left, right, strict=len(left) > 1):
            inputs.append(await self._together(state, request, first, second))
        return Ask(inputs=inputs, params=params)

    async def _together(self, state: State, request: PairRequest, first: str, second: str) -> Input:
        template = state.chat_template
        own = state.config.chat_template is not None
        wanted = own or (state.pooling.pairs == "template" and {"query", "document"} <= set(template.words))
        most = (request.max_tokens_per_query, request.max_tokens_per_doc)
        if not (wanted and template.available):
            if state.pooling.pairs == "plain" and not any(most):
                return first + second
            return Pair(first, second, *most)
        if any(most):
            raise InvalidRequest(
                "max_tokens_per_query and max_tokens_per_doc are not supported where the chat template "
                "writes the prompt.",
                param="max_tokens_per_query" if most[0] else "max_tokens_per_doc",
                advice="Use truncate_prompt_tokens.",
            )
        variables = dict(request.chat_template_kwargs)
        if request.instruction is not None:
            variables.setdefault("instruction", request.instruction)
        messages = [{"role": "query", "content": first}, {"role": "document", "content": second}]
        arguments = {**(state.config.default_chat_template_kwargs or {}), **variables}
        return await template.render_async(messages, **arguments)

    def _check_limits(self, state: State, request: PairRequest) -> None:
        longest = state.engine.info.max_model_len
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            value = getattr(request, name)
            if not 0 <= value < longest:
                raise InvalidRequest(f"{name} must be 0 to {longest - 1}, got {value}.", param=name)
        templated = state.config.chat_template is not None or state.pooling.pairs == "template"
        if request.instruction is not None and not templated:
            raise InvalidRequest(
                "instruction is a variable of the chat template, which does not write this prompt.",
                param="instruction",
            )
        if "chat_template" in request.chat_template_kwargs:
            raise InvalidRequest(
                "chat_template_kwargs must not contain 'chat_template'.", param="chat_template_kwargs"
            )


class ScoreFormat(PairFormat):
    """See Format."""

    shape = ScoreRequest
    prefix = "score"
    prompt = "text_1"
    marks: tuple[str, ...] = _LEFT[1:]

    async def ask(self, state: State, request: ScoreRequest, ignored: Ignored) -> Ask:
        """See Format."""
        left, right = _one_of(request, _LEFT), _one_of(request, _RIGHT)
        return await self.pairs(state, request, _texts(request, left), _texts(request, right), left)

    def writer(self, state: State, request: ScoreRequest, id: str, generation: Generation) -> ScoreWriter:
        """See Format."""
        count = len(_texts(request, _one_of(request, _LEFT)))
        head = {"id": id, "object": "list", "created": int(state.wall()), "model": state.model_name}
        return ScoreWriter(head, scoring(state), count)


class RerankFormat(PairFormat):
    """See Format."""

    shape = RerankRequest
    prefix = "rerank"
    prompt = "documents"
    marks: tuple[str, ...] = ("query",)

    def __init__(self, *, cohere: bool = False) -> None:
        """cohere: of /v2/rerank, whose answers have a `meta`."""
        self._cohere = cohere

    async def ask(self, state: State, request: RerankRequest, ignored: Ignored) -> Ask:
        """See Format."""
        if request.top_n is not None and request.top_n < 0:
            raise InvalidRequest(f"top_n must be at least 0, got {request.top_n}.", param="top_n")
        if not request.query:
            raise InvalidRequest("query must not be empty.", param="query")
        return await self.pairs(state, request, [request.query], _texts(request, "documents"), "documents")

    def writer(self, state: State, request: RerankRequest, id: str, generation: Generation) -> RankWriter:
        """See Format."""
        head: dict[str, Any] = {"id": id, "model": state.model_name}
        return RankWriter(head, scoring(state), request, cohere=self._cohere)


class ScoreWriter:
    """Scores in the order of the texts."""

    stream = None

    def __init__(self, head: Mapping[str, Any], task: Task, queries: int) -> None:
        """queries: texts on the left."""
        self._head, self._task, self._queries = head, task, queries

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        found = _scores(self._task, generation.choices, self._queries)
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(found)]
        yield encode({**self._head, "data": data, "usage": generation.usage()})


class RankWriter:
    """Documents, the nearest first."""

    stream = None

    def __init__(self, head: Mapping[str, Any], task: Task, request: RerankRequest, *, cohere: bool) -> None:
        self._head, self._task, self._request, self._cohere = head, task, request, cohere

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        found = _scores(self._task, generation.choices, 1)
        order = sorted(range(len(found)), key=lambda index: (-found[index], index))
        request = self._request
        texts = _texts(request, "documents")
        results: list[dict[str, Any]] = []
        for index in order[: request.top_n or None]:
            result: dict[str, Any] = {"index": index, "relevance_score": found[index]}
            if request.return_documents:
                result["document"] = {"text": texts[index]}
            results.append(result)
        answer = {**self._head, "results": results, "usage": generation.usage()}
        if self._cohere:
            units = -(-len(texts) // _PER_UNIT)
            answer["meta"] = {"api_version": {"version": "2"}, "billed_units": {"search_units": units}}
        yield encode(answer)


_PER_UNIT = 100
"""Documents of one search unit, as Cohere counts."""


def scoring(state: State) -> Task:
    """How the model scores. Raises InvalidRequest where it does not."""
    return state.pooling.scoring()


def _one_of(request: ScoreRequest, names: Sequence[str]) -> str:
    """The one of these fields that is given."""
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) != 1:
        listed = " or ".join(names)
        raise InvalidRequest(
            f"Missing required parameter: {listed}." if not given else f"Only one of {listed} may be given.",
            param=given[1] if given else names[0],
        )
    return given[0]


def _texts(request: PairRequest, field: str) -> list[str]:
    """The texts of a field: one or several; Cohere's and Jina's documents may be objects with a `text`."""
    given = getattr(request, field)
    texts: list[str] = []
    for index, each in enumerate(given if isinstance(given, list) else [given]):
        where = f"{field}[{index}]" if isinstance(given, list) else field
        text = each.get("text") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise InvalidRequest(f"{where} must be a text, or an object with a text.", param=where)
        if not text:
            raise InvalidRequest(f"{where} must not be empty.", param=where)
        texts.append(text)
    if not texts:
        raise InvalidRequest(f"{field} must not be empty.", param=field)
    return texts


def _most(state: State, texts: Sequence[str], request: PairRequest, side: Literal[0, 1]) -> Iterator[Input]:
    """Texts that are embedded by themselves, cut to their own limit."""
    most = (request.max_tokens_per_query, request.max_tokens_per_doc)[side]
    for text in texts:
        if not most:
            yield text
            continue
        ids = state.tokenizer.encode(text, add_special_tokens=False)
        yield state.tokenizer.decode(ids[:most]) if len(ids) > most else text


def _scores(task: Task, choices: Sequence[Choice], queries: int) -> list[float]:
    return scores(task, [vectors_of(choice) for choice in choices], queries)
