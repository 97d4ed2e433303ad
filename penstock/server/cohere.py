"""POST /v2/embed: the format of Cohere's embeddings, as vLLM serves them.

    texts   ─▶ instruction of input_type + text                        ┐
    inputs  ─▶ chat template: the instruction as system, parts as user ┴▶ vectors ─▶ float · base64 · bits

It knows Cohere's fields and answers; how texts become vectors is the business of `vectors` and `pooled`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec.json import encode

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.core.pooling import Vectors

from .generation import Generation
from .ignored import Ignored
from .items import chosen, field, objects
from .limits import check_choices
from .openai import OpenAIFormat
from .pipeline import Ask
from .pooled import Input
from .protocol_pooling import CohereEmbedRequest, InputRequest
from .state import State
from .vectors import as_bytes, vectors_of, written

_TYPES = ("float", "base64", "binary", "ubinary")
_BITS = ("binary", "ubinary")
_SIGN = 128
"""What `binary` is below `ubinary`: bytes with a sign."""
_SAME = {"search_query": ("query",), "search_document": ("document", "passage")}
"""Cohere's words → those of models that were trained with sentence-transformers."""


class CohereEmbedFormat(OpenAIFormat):
    """See Format."""

    shape = CohereEmbedRequest
    prefix = "embd"
    prompt = "texts"
    pools = True
    empty = "texts must not be empty."

    async def ask(self, state: State, request: CohereEmbedRequest, ignored: Ignored) -> Ask:
        """See Format."""
        if "embed" not in state.pooling.tasks:
            raise InvalidRequest(
                "The model is not made for embeddings.",
                param="model",
                advice=f"It is served for {', '.join(state.pooling.tasks)}.",
            )
        params = state.pooling.pooling(
            "embed", activate=request.use_activation, dimensions=request.output_dimension
        )
        width = request.output_dimension or state.pooling.dimension
        if width % 8 and not {*_BITS}.isdisjoint(_types(request)):
            raise InvalidRequest(
                f"embedding_types: binary and ubinary are bytes of 8 numbers, and embeddings have {width}.",
                param="embedding_types",
            )
        longest = state.engine.info.max_model_len
        if request.max_tokens is not None and not 1 <= request.max_tokens <= longest:
            raise InvalidRequest(
                f"max_tokens must be 1 to {longest}, got {request.max_tokens}.", param="max_tokens"
            )
        return Ask(
            inputs=await _inputs(state, request, ignored),
            params=params,
            longest=request.max_tokens if request.truncate == "NONE" else None,
        )

    def writer(
        self, state: State, request: CohereEmbedRequest, id: str, generation: Generation
    ) -> CohereEmbedWriter:
        """See Format."""
        return CohereEmbedWriter(id, request)


class CohereEmbedWriter:
    """Embeddings by type; beside them what they cost, as everywhere."""

    stream = None

    def __init__(self, id: str, request: CohereEmbedRequest) -> None:
        self._id, self._request = id, request

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        yield b'{"id":' + encode(self._id) + b',"embeddings":{'
        for number, kind in enumerate(_types(self._request)):
            yield b'%s"%s":[' % (b"," if number else b"", kind.encode())
            for place, choice in enumerate(generation.choices):
                value = encode(_as_type(vectors_of(choice), kind))
                yield b"," + value if place else value
            yield b"]"
        usage = generation.usage()
        rest: dict[str, Any] = {} if self._request.texts is None else {"texts": self._request.texts}
        rest["meta"] = {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": usage["prompt_tokens"]},
        }
        yield b"}," + encode({**rest, "response_type": "embeddings_by_type", "usage": usage})[1:]


def _types(request: CohereEmbedRequest) -> Sequence[str]:
    """Each once. Raises InvalidRequest for one that there is not."""
    given = request.embedding_types or ["float"]
    for place, kind in enumerate(given):
        where = f"embedding_types[{place}]"
        if kind in ("int8", "uint8"):
            raise UnsupportedParameter(
                f"{where} {kind} is not supported: its scale is of a calibration, which models do not have.",
                param=where,
                advice=f"Types here are {', '.join(_TYPES)}.",
            )
        chosen(kind, _TYPES, where)
    return list(dict.fromkeys(given))


def _as_type(vectors: Vectors, kind: str) -> list[float] | list[int] | str:
    """A vector as one of _TYPES. Of bits, the first number's is the highest of the first byte; 1 is for what
    is not negative."""
    if kind == "float":
        return vectors.row
    if kind == "base64":
        return b64encode(as_bytes(vectors, "float32", "little")).decode()
    bits = "".join("1" if number >= 0 else "0" for number in vectors.row)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return list(packed) if kind == "ubinary" else [byte - _SIGN for byte in packed]


async def _inputs(state: State, request: CohereEmbedRequest, ignored: Ignored) -> Sequence[Input]:
    texts, inputs = request.texts, request.inputs
    if (texts is None) == (inputs is None):
        raise InvalidRequest(
            "Missing required parameter: texts or inputs."
            if texts is None
            else "A request has texts or inputs, not both.",
            param="texts",
        )
    name = "inputs" if texts is None else "texts"
    entries = texts or inputs
    if not entries:
        raise InvalidRequest(f"{name} must not be empty.", param=name)
    check_choices(len(entries), 1, None, state.config, prompt=name)  # before templates write each of them
    begin = _instruction(state.pooling.instructions, request.input_type, ignored)
    for place, text in enumerate(texts or ()):
        if not text:
            raise InvalidRequest(f"texts[{place}] must not be empty.", param=f"texts[{place}]")
    if texts is not None:
        return [begin + text for text in texts]
    users = [_user(each, where) for where, each in objects(inputs or [], "inputs")]
    system = [{"role": "system", "content": begin}] if begin else []
    like = InputRequest(messages=[])
    return [await written(state, like, [*system, user], ignored) for user in users]


def _user(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An input as a user's message."""
    parts = []
    for place, part in objects(field(given, "content", list, where), f"{where}.content"):
        if part.get("type") != "text":
            raise UnsupportedParameter(
                f"{place}.type {quote(part.get('type'))} is not supported: the model takes text only.",
                param=f"{place}.type",
            )
        parts.append({"type": "text", "text": field(part, "text", str, place)})
    if not parts:
        raise InvalidRequest(f"{where}.content must not be empty.", param=f"{where}.content")
    return {"role": "user", "content": parts}


def _instruction(known: Mapping[str, str] | None, wanted: str | None, ignored: Ignored) -> str:
    """What texts begin with that are for this. Cohere's clients always say what for: where the model makes no
    difference, it does nothing."""
    if wanted is None:
        return ""
    if known is None:
        ignored.add("input_type")
        return ""
    by_name = {name.lower(): words for name, words in known.items()}
    for name in (wanted, *_SAME.get(wanted, ())):
        if name in known:
            return known[name]
        if name.lower() in by_name:
            return by_name[name.lower()]
    raise InvalidRequest(
        f"input_type {quote(wanted)} is none that the model was trained for.",
        param="input_type",
        advice=f"It knows {', '.join(sorted(known))}.",
    )
