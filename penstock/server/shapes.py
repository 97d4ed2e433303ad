"""What answers look like, as types: for the API's description, and for tests that compare answers with it.

Answers are written as bytes, not as these objects (`openai`, `chat`, `completions`): a stream would pay for
them with every token.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0)]
Milliseconds = Annotated[float, Meta(ge=0, description="Milliseconds; null for a part that was not reached.")]


class ErrorDetail(Struct):
    """What happened, and what to do about it."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class Error(Struct):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class Health(Struct):
    """Of a server that is well."""

    status: Literal["ok"]


class Unhealthy(Struct):
    """Of a server that is not, with the cause."""

    status: Literal["unavailable"]
    error: ErrorDetail


class Version(Struct):
    """Of Penstock."""

    version: str


class Load(Struct):
    """Requests taken and not finished."""

    server_load: Count


class Model(Struct):
    """A name that the model is served under."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: Count
    permission: list[dict[str, Any]]


class ModelList(Struct):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Struct):
    """Of a text, or of messages."""

    count: Count
    max_model_len: Count
    tokens: list[int]
    token_strs: list[str] | None


class Text(Struct):
    """Of tokens."""

    prompt: str


class TokenizerInfo(Struct):
    """tokenizer_config.json, with the chat template in use; more fields as the model has them."""

    tokenizer_class: str
    chat_template: str | None = None


class Rendered(Struct):
    """What the engine would be asked for one prompt, in vLLM's shape."""

    request_id: str
    token_ids: list[int]
    sampling_params: dict[str, Any]
    model: str
    stream: bool
    cache_salt: str | None
    priority: int


class PromptTokensDetails(Struct):
    """Where the keys and values of prompt tokens came from."""

    cached_tokens: Count


class CompletionTokensDetails(Struct):
    """Of a server that tells thoughts from the rest."""

    reasoning_tokens: Count


class Usage(Struct):
    """Tokens, and the request's bill."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    device_seconds: Annotated[float, Meta(ge=0, description="The request's share of the device's time.")]
    queue_ms: Milliseconds | None
    prefill_ms: Milliseconds | None
    ttft_ms: Milliseconds | None
    decode_ms: Milliseconds | None


class Embedding(Struct):
    """Of one input; base64 of the numbers where that was asked for."""

    index: Count
    object: Literal["embedding"]
    embedding: list[float] | str


class _Vectors(Struct, kw_only=True):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class Embeddings(_Vectors, kw_only=True):
    """In the order of the inputs."""

    data: list[Embedding]


class Pooled(Struct):
    """Of one input: a vector, one for each of its tokens, or base64 of them."""

    index: Count
    object: Literal["pooling"]
    data: list[float | list[float]] | str


class PooledInputs(_Vectors, kw_only=True):
    """In the order of the inputs."""

    data: list[Pooled]


class EmbeddingsByType(Struct, rename={"floats": "float"}, omit_defaults=True):
    """In the order of the inputs; what was asked for."""

    floats: list[list[float]] | None = None
    base64: Annotated[list[str] | None, Meta(description="Of float32, little-endian.")] = None
    binary: Annotated[list[list[int]] | None, Meta(description="Bytes with a sign, of 8 numbers.")] = None
    ubinary: list[list[int]] | None = None


class CohereEmbeddings(Struct, kw_only=True, omit_defaults=True):
    """Cohere's, of /v2/embed."""

    id: str
    embeddings: EmbeddingsByType
    texts: list[str] | None = None
    meta: dict[str, Any]
    response_type: Literal["embeddings_by_type"]
    usage: Usage


class Classification(Struct):
    """Of one input: the most probable label, and the numbers of all."""

    index: Count
    label: str
    probs: list[float]
    num_classes: Count


class Classifications(_Vectors, kw_only=True):
    """In the order of the inputs."""

    data: list[Classification]


class Score(Struct):
    """Of one pair of texts."""

    index: Count
    object: Literal["score"]
    score: float


class Scores(_Vectors, kw_only=True):
    """In the order of the pairs."""

    data: list[Score]


class RankedText(Struct):
    """As it was sent."""

    text: str


class Ranked(Struct, omit_defaults=True):
    """A document, by its place in the request."""

    index: Count
    relevance_score: float
    document: RankedText | None = None


class Ranking(Struct, kw_only=True, omit_defaults=True):
    """The nearest document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: Usage
    meta: dict[str, Any] | None = None
    """Cohere's, of /v2/rerank."""
    completion_tokens_details: CompletionTokensDetails | None = None


class ChunkUsage(Struct):
    """At the end of a stream; of one choice so far (continuous_usage_stats), tokens only."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails | None = None
    device_seconds: float | None = None
    queue_ms: Milliseconds | None = None
    prefill_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    decode_ms: Milliseconds | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class TokenLogprob(Struct):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenLogprob):
    """The same, with the most probable tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    """Of a choice, or of a chunk."""

    content: list[TokenLogprobs] | None
    refusal: list[TokenLogprobs] | None = None


class CompletionLogprobs(Struct):
    """Of a choice, or of a chunk; lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(Struct):
    """What is to be called."""

    name: str
    arguments: Annotated[str, Meta(description="JSON of an object.")]


class ToolCall(Struct):
    """A call that the model wants."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Struct):
    """What the model has written."""

    role: str
    content: str | None
    refusal: str | None = None
    reasoning: Annotated[str | None, Meta(description="What it thought, with --reasoning-parser.")] = None
    reasoning_content: Annotated[str | None, Meta(description="The same.")] = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Struct):
    """One of n."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class _Answer(Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = None


class ChatCompletion(_Answer, kw_only=True):
    """A whole answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None


class FunctionDelta(Struct):
    """A part of a call; the name comes once."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct):
    """What a chunk adds to a call; id and type come once."""

    index: Count
    id: str | None = None
    type: str | None = None
    function: FunctionDelta | None = None


class ChatDelta(Struct):
    """What a chunk adds."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Struct):
    """One of n, in a chunk."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(_Answer, kw_only=True):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: ChunkUsage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None


class CompletionChoice(Struct):
    """One of prompts × n, whole or in a chunk."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(_Answer, kw_only=True):
    """A whole answer."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Answer, kw_only=True):
    """An event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: ChunkUsage | None = None
