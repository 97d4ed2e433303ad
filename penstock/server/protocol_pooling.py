"""Requests for vectors, scores and classes as typed Structs; names are OpenAI's, vLLM's, Cohere's and Jina's.

It knows shapes and types, as `protocol` does; what a model can do of it is the business of each format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from msgspec import field
from msgspec.structs import force_setattr

from penstock.core.pooling import Task

from .fields import COHERE_NEUTRAL, POOLING_NEUTRAL, Rule
from .protocol import Request


class PooledRequest(Request, frozen=True, kw_only=True):
    """What all of them share."""

    neutral: ClassVar[Mapping[str, Rule]] = POOLING_NEUTRAL

    add_special_tokens: bool | None = None  # type: ignore[assignment]
    """By default, unless the prompt is made of messages."""
    truncation_side: Literal["left", "right"] | None = None  # type: ignore[assignment]
    """By default, the tokenizer's."""
    use_activation: bool | None = None
    """Whether embeddings are normalised, and labels become probabilities; by default, what the model does."""


class InputRequest(PooledRequest, frozen=True, kw_only=True):
    """Texts, token ids, or messages."""

    input: str | list[Any] | None = None
    """A text, texts, token ids, or lists of them; or messages."""
    messages: list[Any] | None = None
    """A conversation, or several, as prompts by the chat template."""
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


class EmbeddingRequest(InputRequest, frozen=True, kw_only=True):
    """POST /v1/embeddings."""

    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] = "float"
    dimensions: int | None = None
    embed_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of base64 and bytes."""
    endianness: Literal["native", "little", "big"] = "native"
    """Of base64 and bytes."""


class PoolingRequest(EmbeddingRequest, frozen=True, kw_only=True):
    """POST /pooling."""

    task: Task | None = None
    """By default, the first of those that the model can do."""


class ClassifyRequest(InputRequest, frozen=True, kw_only=True):
    """POST /classify."""


class CohereEmbedRequest(PooledRequest, frozen=True, kw_only=True):
    """POST /v2/embed. Either texts or inputs."""

    neutral: ClassVar[Mapping[str, Rule]] = COHERE_NEUTRAL
    foreign: ClassVar[bool] = True

    texts: list[str] | None = None
    inputs: list[dict[str, Any]] | None = None
    """Each with a `content`: a list of parts, as a user's message has them."""
    input_type: str | None = None
    """What the texts are for, which says what they begin with."""
    embedding_types: list[str] | None = None
    """By default, float."""
    output_dimension: int | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
    """Which end is cut off of a text that is too long."""
    max_tokens: int | None = None
    """Of a text; by default, as many as fit."""

    def __post_init__(self) -> None:
        if self.truncate == "NONE":
            return
        if self.truncate_prompt_tokens is None:  # what the pipeline knows it as
            force_setattr(self, "truncate_prompt_tokens", -1 if self.max_tokens is None else self.max_tokens)
        if self.truncation_side is None:
            force_setattr(self, "truncation_side", "left" if self.truncate == "START" else "right")


class PairRequest(PooledRequest, frozen=True, kw_only=True):
    """What scores and ranks share."""

    max_tokens_per_query: int = 0
    """0 is no limit of its own."""
    max_tokens_per_doc: int = 0
    instruction: str | None = None
    """For the chat template, as its variable of this name."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


class ScoreRequest(PairRequest, frozen=True, kw_only=True):
    """POST /score. One on the left with each on the right, or each with its counterpart."""

    text_1: str | list[Any] | None = None
    text_2: str | list[Any] | None = None
    queries: str | list[Any] | None = None
    """Another name of text_1."""
    documents: str | list[Any] | None = None
    """Another name of text_2, as is `items`."""
    items: str | list[Any] | None = None
    data_1: str | list[Any] | None = None
    data_2: str | list[Any] | None = None


class RerankRequest(PairRequest, frozen=True, kw_only=True):
    """POST /rerank."""

    query: str
    documents: str | list[Any]
    """Texts, or objects with a `text`."""
    top_n: int | None = None
    """Most results; 0 and null are all."""
    return_documents: bool = True
