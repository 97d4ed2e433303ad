"""POST /v1/embeddings, /pooling and /classify: the formats of OpenAI's embeddings and of vLLM's additions.

It knows their fields and answers; running is the `pipeline`'s business, prompts are that of `pooled`.
"""

from __future__ import annotations

import struct
import sys
from array import array
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec.json import encode

from penstock.core.errors import InvalidRequest
from penstock.core.pooling import Vectors

from .chat import read_messages, render
from .generation import Choice, Generation
from .ignored import Ignored
from .limits import check_messages
from .openai import OpenAIFormat
from .params import text_or_ids
from .pipeline import Ask
from .pooled import Input, Written
from .protocol import TokenizeChatRequest
from .protocol_pooling import ClassifyRequest, EmbeddingRequest, InputRequest, PoolingRequest
from .state import State
from .work import IN_THREAD


class VectorFormat(OpenAIFormat):
    """What the three have in common."""

    prompt = "input"
    marks: tuple[str, ...] = ("messages",)
    pools = True
    empty = "input must not be empty."

    async def inputs(self, state: State, request: InputRequest, ignored: Ignored) -> Sequence[Input]:
        """The prompts of a request: texts, token ids, or messages as the chat template writes them."""
        given = request.input
        if (given is None) == (request.messages is None):
            raise InvalidRequest(
                "Missing required parameter: input or messages."
                if given is None
                else "A request has input or messages, not both.",
                param=self.prompt,
            )
        conversations = _conversations(request)
        if conversations is not None:
            return [await written(state, request, each, ignored) for each in conversations]
        assert given is not None
        size = len(given) if isinstance(given, list) else 0
        if size <= IN_THREAD and isinstance(given, list):
            size += sum(len(each) for each in given if isinstance(each, list))
        return await state.work.do(size, _texts_or_ids, state, request)

    def head(self, state: State, id: str) -> dict[str, Any]:
        """The fields before `data`."""
        return {"id": id, "object": "list", "created": int(state.wall()), "model": state.model_name}


class EmbeddingFormat(VectorFormat):
    """See Format."""

    shape = EmbeddingRequest
    prefix = "embd"

    async def ask(self, state: State, request: EmbeddingRequest, ignored: Ignored) -> Ask:
        """See Format."""
        task = "embed" if "embed" in state.pooling.tasks else None
        if task is None:
            raise _unsupported(state, "embeddings")
        params = state.pooling.pooling(task, activate=request.use_activation, dimensions=request.dimensions)
        return Ask(inputs=await self.inputs(state, request, ignored), params=params)

    def writer(self, state: State, request: EmbeddingRequest, id: str, generation: Generation) -> WholeWriter:
        """See Format."""
        return vector_writer(self.head(state, id), "embedding", "embedding", request)


class PoolingFormat(VectorFormat):
    """See Format."""

    shape = PoolingRequest
    prefix = "pool"

    async def ask(self, state: State, request: PoolingRequest, ignored: Ignored) -> Ask:
        """See Format."""
        params = state.pooling.pooling(
            request.task, activate=request.use_activation, dimensions=request.dimensions
        )
        return Ask(inputs=await self.inputs(state, request, ignored), params=params)

    def writer(self, state: State, request: PoolingRequest, id: str, generation: Generation) -> WholeWriter:
        """See Format."""
        nested = (request.task or state.pooling.tasks[0]).startswith("token")
        return vector_writer(self.head(state, id), "pooling", "data", request, nested=nested)


class ClassifyFormat(VectorFormat):
    """See Format."""

    shape = ClassifyRequest
    prefix = "classify"

    async def ask(self, state: State, request: ClassifyRequest, ignored: Ignored) -> Ask:
        """See Format."""
        if "classify" not in state.pooling.tasks:
            raise _unsupported(state, "classification of prompts")
        params = state.pooling.pooling("classify", activate=request.use_activation)
        return Ask(inputs=await self.inputs(state, request, ignored), params=params)

    def writer(self, state: State, request: ClassifyRequest, id: str, generation: Generation) -> ClassWriter:
        """See Format."""
        return ClassWriter(self.head(state, id), state.pooling.labels)


class WholeWriter:
    """An answer that is sent at once: entries of `data`, and the usage."""

    stream = None

    def __init__(self, head: Mapping[str, Any]) -> None:
        self._head = head

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        yield encode(self._head)[:-1] + b',"data":['
        for number, choice in enumerate(generation.choices):
            yield b"," + self.entry(choice) if number else self.entry(choice)
        yield b'],"usage":' + encode(generation.usage()) + b"}"

    def entry(self, choice: Choice) -> bytes:
        """The JSON of one prompt's part."""
        raise NotImplementedError


class VectorWriter(WholeWriter):
    """Numbers, or base64 of them."""

    def __init__(
        self,
        head: Mapping[str, Any],
        kind: str,
        field: str,
        request: EmbeddingRequest,
        *,
        nested: bool = False,
    ) -> None:
        """kind, field: the entry's `object`, and where the numbers stand. nested: a list for each token."""
        super().__init__(head)
        self._before = b'"object":"%s","%s":' % (kind.encode(), field.encode())
        self._request = request
        self._nested = nested

    def entry(self, choice: Choice) -> bytes:
        """See WholeWriter."""
        vectors = vectors_of(choice)
        request = self._request
        if request.encoding_format == "base64":
            value = b'"' + b64encode(as_bytes(vectors, request.embed_dtype, request.endianness)) + b'"'
        else:
            value = encode(vectors.rows if self._nested else vectors.row)
        return b'{"index":%d,%s%s}' % (choice.index, self._before, value)


class BytesWriter(WholeWriter):
    """The numbers alone, one prompt's after the other's; what says where each begins is a header, as vLLM
    writes it (`bytes`), or is left out (`bytes_only`)."""

    def __init__(self, head: Mapping[str, Any], request: EmbeddingRequest, *, nested: bool) -> None:
        """nested: a row for each token."""
        super().__init__(head)
        self._request, self._nested = request, nested

    def headers(self, generation: Generation) -> list[tuple[bytes, bytes]]:
        """See Headed."""
        kind = [(b"content-type", b"application/octet-stream")]
        if self._request.encoding_format == "bytes_only":
            return kind
        data, at = [], 0
        for choice in generation.choices:
            vectors = vectors_of(choice)
            count = len(vectors.data) // 4
            end = at + count * (4 if self._request.embed_dtype == "float32" else 2)
            data.append(
                {
                    "index": choice.index,
                    "embed_dtype": self._request.embed_dtype,
                    "endianness": self._request.endianness,
                    "start": at,
                    "end": end,
                    "shape": [count // vectors.width, vectors.width] if self._nested else [count],
                }
            )
            at = end
        told = {name: self._head[name] for name in ("id", "created", "model")}
        return [*kind, (b"metadata", encode({**told, "data": data, "usage": generation.usage()}))]

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        for choice in generation.choices:
            yield as_bytes(vectors_of(choice), self._request.embed_dtype, self._request.endianness)


def vector_writer(
    head: Mapping[str, Any], kind: str, field: str, request: EmbeddingRequest, *, nested: bool = False
) -> WholeWriter:
    """For what the request wants: see VectorWriter for the arguments."""
    if request.encoding_format.startswith("bytes"):
        return BytesWriter(head, request, nested=nested)
    return VectorWriter(head, kind, field, request, nested=nested)


class ClassWriter(WholeWriter):
    """Labels and their probabilities."""

    def __init__(self, head: Mapping[str, Any], labels: Sequence[str]) -> None:
        super().__init__(head)
        self._labels = labels

    def entry(self, choice: Choice) -> bytes:
        """See WholeWriter."""
        probabilities = vectors_of(choice).row
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return encode(
            {
                "index": choice.index,
                "label": self._labels[best],
                "probs": probabilities,
                "num_classes": len(probabilities),
            }
        )


def vectors_of(choice: Choice) -> Vectors:
    """What the engine made of a prompt."""
    assert choice.vectors is not None  # a request that pools ends with vectors, or fails
    return choice.vectors


def as_bytes(vectors: Vectors, dtype: str, endianness: str) -> bytes:
    """The numbers as a client wants them: rounded to nearest, ties to even."""
    numbers = array("f", vectors.data)
    swap = endianness != "native" and endianness != sys.byteorder
    if dtype == "float32":
        if swap:
            numbers.byteswap()
        return numbers.tobytes()
    if dtype == "float16":
        halves = array("H", struct.pack(f"={len(numbers)}e", *numbers))
    else:
        words = array("I", vectors.data)
        halves = array("H", ((word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0xFFFF for word in words))
    if swap:
        halves.byteswap()
    return halves.tobytes()


def _unsupported(state: State, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model is not made for {what}.",
        param="model",
        advice=f"It is served for {', '.join(state.pooling.tasks)}.",
    )


def _conversations(request: InputRequest) -> list[list[dict[str, Any]]] | None:
    """Messages, of one conversation or several; None where the prompts are texts or ids."""
    given = request.messages if request.messages is not None else request.input
    if not isinstance(given, list) or not given:
        return None if request.messages is None else _no_messages(given)
    if all(isinstance(each, dict) for each in given):
        return [given]
    if all(isinstance(each, list) and each and all(isinstance(one, dict) for one in each) for each in given):
        return given
    return None if request.messages is None else _no_messages(given)


def _no_messages(given: object) -> list[list[dict[str, Any]]]:
    raise InvalidRequest("messages must be a list of messages, or of such lists.", param="messages")


async def written(
    state: State, request: InputRequest, messages: list[dict[str, Any]], ignored: Ignored
) -> Written:
    """The prompt of a conversation."""
    chat = TokenizeChatRequest(
        messages=messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template=request.chat_template,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    check_messages(messages, state.config)
    return Written(await render(state, chat, read_messages(state, chat, ignored)))


def _texts_or_ids(state: State, request: InputRequest) -> list[Input]:
    """Raises InvalidRequest, naming the entry at fault."""
    given, info = request.input, state.engine.info
    longest = info.max_model_len if request.truncate_prompt_tokens is None else None
    if not given:
        raise InvalidRequest("input must not be empty.", param="input")
    if isinstance(given, str) or not {int, float, bool}.isdisjoint(map(type, given)):
        return [text_or_ids(given, info.vocab_size, longest, "input")]
    return [text_or_ids(each, info.vocab_size, longest, f"input[{i}]") for i, each in enumerate(given)]
