"""Offline embeddings, classes and scores: what `LLM` adds for models that pool.

    llm = LLM("BAAI/bge-m3")
    for output in llm.embed(["A Pod is", "PagedAttention is"]):
        print(output.outputs.embedding[:4])

Names and shapes follow vLLM's LLM class. It knows prompts and what an engine makes of them; LLM runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Generic, TypeVar

import torch

from penstock.core.errors import BY_NAME, ContextLengthExceeded, InvalidRequest, RequestFailed
from penstock.core.plan import Event
from penstock.core.pooling import Pooling, PoolingInfo, Vectors, scores
from penstock.core.request_spec import Prompt as EnginePrompt
from penstock.core.request_spec import RequestSpec
from penstock.engine.messages import ModelInfo
from penstock.text.chat_template import ChatTemplate
from penstock.text.framing import Side, cut, framed, joined
from penstock.text.tokenizer import Tokenizer

_KWARGS = ("truncate_prompt_tokens", "truncation_side", "add_special_tokens")
"""Of tokenization_kwargs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How prompts are pooled."""

    use_activation: bool | None = None
    """Whether embeddings are normalised, and labels become probabilities; by default, what the model does."""
    dimensions: int | None = None
    """Of embeddings, where the model has been trained for it (matryoshka)."""


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """A number for each label."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How near two texts are."""

    score: float


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """What the model made of a prompt: float32 [width], or [tokens, width]."""

    data: torch.Tensor


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PooledRequestOutput(Generic[T]):
    """One prompt, or pair of texts."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    device_seconds: float = 0.0
    finished: bool = True


EmbeddingRequestOutput = PooledRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PooledRequestOutput[ClassificationOutput]
ScoringRequestOutput = PooledRequestOutput[ScoringOutput]
PoolingRequestOutput = PooledRequestOutput[PoolingOutput]


class PoolingMixin:
    """What LLM has for models that pool."""

    _tokenizer: Tokenizer
    _template: ChatTemplate
    _numbers: Iterator[int]

    @property
    def _info(self) -> ModelInfo:
        raise NotImplementedError

    def _run(self, specs: Iterable[RequestSpec]) -> Iterator[Event]:
        raise NotImplementedError

    def embed(
        self,
        prompts: Any,
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt, in their order.

        Args:
            prompts: one or several: text, token ids, or vLLM's dictionaries.
            use_tqdm: accepted; there is no bar.
            truncate_prompt_tokens: prompts are cut to so many tokens; -1 is the context length. By default,
                one that is longer is refused.
            tokenization_kwargs: truncate_prompt_tokens, truncation_side, add_special_tokens.

        Raises InvalidRequest: the model does not embed, or a prompt can never work.
        """
        made = self._pool(prompts, "embed", pooling_params, truncate_prompt_tokens, tokenization_kwargs)
        return [_output(each, EmbeddingOutput(each.vectors.row)) for each in made]

    def classify(
        self,
        prompts: Any,
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probabilities of the labels for each prompt; arguments and errors as those of `embed`."""
        made = self._pool(prompts, "classify", pooling_params, truncate_prompt_tokens, tokenization_kwargs)
        return [_output(each, ClassificationOutput(each.vectors.row)) for each in made]

    def encode(
        self,
        prompts: Any,
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: str | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """Whatever the model makes of each prompt; arguments and errors as those of `embed`.

        pooling_task: embed, token_embed, classify or token_classify; by default, the model's first one.
        """
        made = self._pool(prompts, pooling_task, pooling_params, truncate_prompt_tokens, tokenization_kwargs)
        return [_output(each, PoolingOutput(each.tensor())) for each in made]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How near one text is to each of others, or each to its counterpart.

        A cross-encoder reads both together; embeddings are compared by cosine, those of tokens by MaxSim.

        chat_template: writes the prompt of a cross-encoder, from messages of the roles query and document.
        """
        info = self._pooling_info()
        left = [data_1] if isinstance(data_1, str) else list(data_1)
        right = [data_2] if isinstance(data_2, str) else list(data_2)
        if not left or not right or (len(left) > 1 and len(left) != len(right)):
            raise InvalidRequest(
                f"The texts must be one and any number, or as many on both sides, got {len(left)} and "
                f"{len(right)}.",
                param="data_1",
            )
        task = info.scoring()
        asked = pooling_params or PoolingParams()
        cutting = self._cutting(truncate_prompt_tokens, tokenization_kwargs)
        pooling = info.pooling(task, activate=asked.use_activation, dimensions=asked.dimensions)
        if task != "classify":
            made = self._ask([self._prompt(text, cutting) for text in (*left, *right)], pooling)
            found = scores(task, [each.vectors for each in made], len(left))
            queries = made[:1] * len(right) if len(left) == 1 else made[: len(left)]
            pairs = zip(queries, made[len(left) :], found, strict=True)
            return [_pair(query, document, score) for query, document, score in pairs]
        both = zip(cycle(left) if len(left) == 1 else left, right, strict=len(left) > 1)
        prompts = [self._together(info, first, second, cutting, chat_template) for first, second in both]
        return [_output(each, ScoringOutput(each.vectors.row[0])) for each in self._ask(prompts, pooling)]

    # ------------------------------------------------------------------ prompts

    def _pooling_info(self) -> PoolingInfo:
        info = self._info.pooling
        if info is None:
            raise InvalidRequest(
                "The model generates text.", param="model", advice='Make the LLM with runner="pooling".'
            )
        return info

    def _pool(
        self,
        prompts: Any,
        task: str | None,
        params: PoolingParams | None,
        truncate: int | None,
        kwargs: Mapping[str, Any] | None,
    ) -> list[_Made]:
        info, asked = self._pooling_info(), params or PoolingParams()
        pooling = info.pooling(task, activate=asked.use_activation, dimensions=asked.dimensions)
        cutting = self._cutting(truncate, kwargs)
        one = isinstance(prompts, str | Mapping)
        every = [prompts] if one else list(prompts)
        if every and all(isinstance(token, int) for token in every):
            every = [every]
        return self._ask([self._prompt(prompt, cutting) for prompt in every], pooling)

    def _cutting(self, truncate: int | None, kwargs: Mapping[str, Any] | None) -> _Cutting:
        given = dict(kwargs or {})
        if unknown := sorted(given.keys() - set(_KWARGS)):
            raise InvalidRequest(
                f"tokenization_kwargs has {unknown[0]!r}, which is not supported.",
                param="tokenization_kwargs",
                advice=f"Supported: {', '.join(_KWARGS)}.",
            )
        keep = given.get("truncate_prompt_tokens") if truncate is None else truncate
        longest = self._info.max_model_len
        if keep is not None and not (keep == -1 or 1 <= keep <= longest):
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 or from 1 to {longest}, got {keep}.",
                param="truncate_prompt_tokens",
            )
        own = "left" if self._tokenizer.config.get("truncation_side") == "left" else "right"
        side = given.get("truncation_side", own)
        if side not in ("left", "right"):
            raise InvalidRequest(
                f"truncation_side must be left or right, got {side!r}.", param="truncation_side"
            )
        frame = given.get("add_special_tokens") is not False
        return _Cutting(longest if keep == -1 else keep, side, frame)

    def _prompt(self, prompt: Any, cutting: _Cutting) -> EnginePrompt:
        """A text, token ids, or one of vLLM's dictionaries."""
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(prompt, str):
            bare = self._tokenizer.encode(prompt, add_special_tokens=False)
            ids = framed(self._tokenizer.frame if cutting.frame else None, bare, cutting.keep, cutting.side)
        elif isinstance(prompt, Sequence):
            ids = cut([int(token) for token in prompt], cutting.keep, cutting.side)
        else:
            raise InvalidRequest(
                f"a prompt is a text, token ids, or a dictionary of these, got {type(prompt).__name__}.",
                param="prompts",
            )
        return self._checked(ids)

    def _together(
        self, info: PoolingInfo, first: str, second: str, cutting: _Cutting, template: str | None
    ) -> EnginePrompt:
        """Two texts as one prompt."""
        own = self._template
        if template is not None:
            own = ChatTemplate.from_tokenizer(self._tokenizer, template)
        elif info.pairs != "template" or not own.available or not {"query", "document"} <= set(own.words):
            if info.pairs == "plain":
                return self._prompt(first + second, cutting)
            left, right = (self._tokenizer.encode(text, add_special_tokens=False) for text in (first, second))
            ids, begin = joined(self._tokenizer.frame, left, right, cutting.keep, cutting.side)
            return self._checked(ids, begin)
        messages = [{"role": "query", "content": first}, {"role": "document", "content": second}]
        return self._prompt(own.render(messages), cutting)

    def _checked(self, ids: list[int], second: int | None = None) -> EnginePrompt:
        longest, size = self._info.max_model_len, self._info.vocab_size
        if not ids:
            raise InvalidRequest("the prompt is empty.", param="prompts")
        if len(ids) > longest:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens; the context is {longest}.",
                param="prompts",
                advice="Set truncate_prompt_tokens=-1 to cut it.",
            )
        outside = next((token for token in ids if not 0 <= token < size), None)
        if outside is not None:
            raise InvalidRequest(
                f"the prompt contains token id {outside}; the vocabulary has ids 0 to {size - 1}.",
                param="prompts",
            )
        return EnginePrompt(tuple(ids), 0, second=second)

    # ------------------------------------------------------------------ running

    def _ask(self, prompts: Sequence[EnginePrompt], pooling: Pooling) -> list[_Made]:
        specs = [
            RequestSpec(id=str(next(self._numbers)), prompts=(prompt,), pooling=pooling) for prompt in prompts
        ]
        done: dict[str, Event] = {}
        for event in self._run(specs):
            if event.failure is not None:
                failure = event.failure
                raise BY_NAME.get(failure.type, RequestFailed)(
                    f"request {event.request} failed: {failure.cause}",
                    param=failure.param,
                    advice=failure.advice,
                )
            done[event.request] = event
        return [_Made.of(spec, done[spec.id]) for spec in specs]


@dataclass(frozen=True, slots=True)
class _Cutting:
    """How prompts are cut."""

    keep: int | None
    side: Side
    frame: bool
    """Whether special tokens are put around texts."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A prompt, and what the engine made of it."""

    id: str
    ids: tuple[int, ...]
    vectors: Vectors
    nested: bool
    event: Event

    @classmethod
    def of(cls, spec: RequestSpec, event: Event) -> _Made:
        assert event.pooled is not None  # a request that pools ends with vectors, or fails
        nested = spec.pooling is not None and spec.pooling.type == "all"
        return cls(spec.id, spec.prompts[0].token_ids, event.pooled, nested, event)

    def tensor(self) -> torch.Tensor:
        """Float32 [width], or [tokens, width]."""
        width = self.vectors.width
        rows = torch.frombuffer(bytearray(self.vectors.data), dtype=torch.float32).view(-1, width)
        return rows if self.nested else rows[0]


def _output(made: _Made, outputs: T) -> PooledRequestOutput[T]:
    return PooledRequestOutput(made.id, outputs, list(made.ids), made.event.cached, made.event.device_seconds)


def _pair(query: _Made, document: _Made, score: float) -> ScoringRequestOutput:
    """The query's device time is in each of its pairs."""
    return PooledRequestOutput(
        f"{query.id}_{document.id}",
        ScoringOutput(score),
        [*query.ids, *document.ids],
        query.event.cached + document.event.cached,
        query.event.device_seconds + document.event.device_seconds,
    )
