"""The lines of a batch: one request each, and what is written of its answer.

    {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}
      ─▶ answered   {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}
      ─▶ not asked  {"id", "custom_id", "response": null, "error": {"code", "message", "line"}}

It knows the shape of lines, and neither files nor engines.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO, Any

import msgspec
from msgspec.json import encode

from penstock.core.errors import brief, quote

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
    "/v2/embed",
)
"""What a line may ask, where the server serves it."""
MOST_LINE = 16 << 20
"""Bytes of a line."""
_LONGEST_ID = 512
_WHOLE = {"stream": "answers are whole", "background": "a batch is background, and waits for its answers"}
_NO_JSON = (b'"bytes"', b'"bytes_only"')


class BadLine(Exception):
    """A line that is not asked: why, and its custom_id where it has one."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


def numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file; empty lines count, and are left out. What is too long is cut. A byte
    order mark is skipped, as in a body."""
    number = 0
    while text := file.readline(MOST_LINE + 2):
        number += 1
        whole = text
        while not whole.endswith(b"\n") and (whole := file.readline(MOST_LINE)):
            pass
        if number == 1:
            text = text.removeprefix(BOM_UTF8)
        if text.strip():
            yield number, text.rstrip(b"\r\n")


def checked(file: IO[bytes], urls: Collection[str]) -> Iterator[tuple[int, Line | BadLine]]:
    """(number, line) of what a file asks, or why that cannot be asked."""
    seen: set[str] = set()
    for number, text in numbered(file):
        try:
            line = read_line(text, urls)
            if line.custom_id in seen:
                raise BadLine("duplicate_custom_id", "an earlier line has this custom_id.", line.custom_id)
        except BadLine as error:
            yield number, error
            continue
        seen.add(line.custom_id)
        yield number, line


@dataclass(frozen=True, slots=True)
class Line:
    """One request."""

    custom_id: str
    url: str
    body: bytes


def read_line(text: bytes, urls: Collection[str]) -> Line:
    """One line, which asks one of `urls`. Raises BadLine."""
    if len(text) > MOST_LINE:
        raise BadLine("line_too_long", f"the line has more than {MOST_LINE} bytes.")
    try:
        line = msgspec.json.decode(text, type=_Line)
        fields = msgspec.json.decode(line.body, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid_json_line", f"{brief(str(error), 200)}.", _id(text)) from None
    if not 1 <= len(line.custom_id) <= _LONGEST_ID:
        raise BadLine("invalid_custom_id", f"custom_id must have 1 to {_LONGEST_ID} characters.")
    if line.method != "POST" or line.url not in urls:
        raise BadLine(
            "invalid_url",
            f"{quote(f'{line.method} {line.url}')} cannot be asked here: it is POST of {', '.join(urls)}.",
            line.custom_id,
        )
    for name, why in _WHOLE.items():
        if name in fields and bytes(fields[name]) not in (b"false", b"null"):
            raise BadLine("invalid_request", f"body.{name} must be false: {why}.", line.custom_id)
    if bytes(fields.get("encoding_format", b"")) in _NO_JSON:
        why = "body.encoding_format must be float or base64: answers are lines of JSON."
        raise BadLine("invalid_request", why, line.custom_id)
    return Line(line.custom_id, line.url, bytes(line.body))


def _id(text: bytes) -> str | None:
    """The custom_id of a line that is wrong elsewhere."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Any]).get("custom_id")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) <= _LONGEST_ID else None


def answered(id: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """What is written of an answer, whatever its status."""
    try:
        content: Any = msgspec.Raw(encode(msgspec.json.decode(body)))
    except (ValueError, RecursionError):
        content = body.decode("utf-8", "replace")
    response = {"status_code": status, "request_id": request_id, "body": content}
    return encode({"id": id, "custom_id": custom_id, "response": response, "error": None})


def unasked(id: str, number: int, error: BadLine) -> bytes:
    """What is written of a line that was not asked, or has no answer. number: from 1."""
    told = {"code": error.code, "message": str(error), "line": number}
    return encode({"id": id, "custom_id": error.custom_id, "response": None, "error": told})
