"""An upload as clients send it: multipart/form-data with a file and a few fields (RFC 7578).

The file goes to disk as it comes, into one that has no name: it is gone with the process. It knows forms, and
no upstream.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive, Scope

from penstock.core.errors import (
    InvalidRequest,
    PayloadTooLarge,
    PenstockError,
    UnsupportedParameter,
    brief,
    quote,
)
from penstock.http.body import UnsupportedMediaType
from penstock.http.exchange import ClientGone, header

_MOST_FIELD = 8 << 10
_MOST_PARTS = 16
_ROOM = 64 << 10
"""Bytes of a form besides its file, as far as its announced length is concerned."""
_PIECE = 256 << 10
"""Bytes that are written to disk at once."""
_LONGEST_NAME = 255
_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,64}/[A-Za-z0-9!#$&^_.+-]{1,64}")
FIELDS = frozenset(
    {"purpose", "expires_after[anchor]", "expires_after[seconds]", "model", "target_model_names"}
)
"""Fields that an upload may have besides its file."""


@dataclass(slots=True)
class Form:
    """What was uploaded. The file is at its beginning; who has the form closes it."""

    file: IO[bytes]
    size: int
    filename: str
    content_type: str
    fields: dict[str, str]


async def read_form(
    scope: Scope, receive: Receive, most: int, folder: Path, *, limit: str = "gateway.files.max_bytes"
) -> Form:
    """The whole form.

    limit: what sets `most`, for the advice. Raises InvalidRequest, UnsupportedMediaType, PayloadTooLarge over
    `most` bytes of file, ClientGone; and then nothing is left of it on disk.
    """
    boundary = _boundary(scope)
    announced = header(scope, b"content-length") or ""
    if announced.isdecimal() and int(announced) > most + _ROOM and header(scope, b"expect") is not None:
        raise _too_large(most, limit)  # the client waits for our word before it sends
    file = await asyncio.to_thread(nameless, folder)
    try:
        parts, more = _Parts(most, limit), True
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                more = message.get("more_body", False)
                if chunk := message.get("body", b""):
                    parser.write(chunk)
                if len(parts.pending) >= _PIECE:
                    await asyncio.to_thread(file.write, parts.take())
        except (FormParserError, PenstockError) as error:
            if more:
                await _discard(receive, 2 * most)
            if isinstance(error, PenstockError):
                raise
            raise InvalidRequest(f"The form cannot be read: {brief(str(error), 200)}.") from None
        await asyncio.to_thread(_finish, file, parts.take())
        return parts.form(file)
    except BaseException:
        file.close()
        raise


def nameless(folder: Path) -> IO[bytes]:
    """A file that has no name: it is gone when it is closed, or when the process ends."""
    return tempfile.TemporaryFile(dir=folder)


class _Parts:
    """Takes the parser's words, part by part."""

    def __init__(self, most: int, limit: str) -> None:
        self._most, self._limit = most, limit
        self.pending = bytearray()
        """Of the file, and not written yet."""
        self.size = 0
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.content_type = ""
        self._count = 0
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()
        self._field = ""
        self._text = bytearray()
        self._in_file = self._ended = False

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._part_begins,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._part_ends,
            "on_end": self._ends,
        }

    def take(self) -> bytes:
        """What is to be written now."""
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def form(self, file: IO[bytes]) -> Form:
        """All of it. Raises InvalidRequest where something is missing."""
        if not self._ended:
            raise InvalidRequest("The form cannot be read: it ends before its last boundary.")
        if self.filename is None:
            raise InvalidRequest(
                "The form has no file.", param="file", advice="Send one in the field `file`."
            )
        if not self.fields.get("purpose"):
            raise InvalidRequest("The field purpose is required.", param="purpose")
        return Form(file, self.size, self.filename, self.content_type, self.fields)

    def _part_begins(self) -> None:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise InvalidRequest(f"The form has more than {_MOST_PARTS} parts.")
        self._headers = {}
        self._text.clear()

    def _header_ends(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        kind, options = parse_options_header(_utf8(self._headers.get(b"content-disposition", b"")))
        name = _said(options.get(b"name", b""))
        if kind != b"form-data" or not name:
            raise InvalidRequest("A part of the form has no name.")
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (
            b"binary",
            b"8bit",
            b"7bit",
        ):
            raise InvalidRequest(f"The part {quote(name)} is encoded, which this server does not decode.")
        self._in_file = name == "file"
        if self._in_file:
            if self.filename is not None:
                raise InvalidRequest("The form has more than one file.", param="file")
            if b"filename" not in options:
                raise InvalidRequest("The field file is no file: it has no filename.", param="file")
            self.filename = _filename(_said(options[b"filename"]))
            given = self._headers.get(b"content-type", b"").decode("latin-1").strip()
            self.content_type = given if _TYPE.fullmatch(given) else "application/octet-stream"
            return
        if name not in FIELDS:
            raise UnsupportedParameter(f"The field {quote(name)} is not supported here.", param=name)
        if name in self.fields:
            raise InvalidRequest(f"The field {name} stands twice in the form.", param=name)
        self._field = name

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.size += end - start
            if self.size > self._most:
                raise _too_large(self._most, self._limit)
            self.pending += memoryview(data)[start:end]
            return
        self._text += memoryview(data)[start:end]
        if len(self._text) > _MOST_FIELD:
            raise InvalidRequest(f"The field {self._field} has over {_MOST_FIELD} bytes.", param=self._field)

    def _part_ends(self) -> None:
        if not self._in_file:
            text = _said(bytes(self._text))
            if not text.isprintable():
                raise InvalidRequest(f"The field {self._field} has control characters.", param=self._field)
            self.fields[self._field] = text

    def _ends(self) -> None:
        self._ended = True


def _boundary(scope: Scope) -> bytes:
    kind, options = parse_options_header(header(scope, b"content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType(
            f"The body is declared as {quote(kind.decode('latin-1'))}.",
            advice="A file is uploaded as multipart/form-data.",
        )
    encoding = (header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"The body is declared as encoded with {quote(encoding)}.")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise InvalidRequest("The Content-Type of the form names no boundary of 1 to 70 characters.")
    return boundary


def _filename(name: str) -> str:
    """A name that may stand in a header, and is no path. Raises InvalidRequest."""
    if (
        not 0 < len(name.encode()) <= _LONGEST_NAME
        or not name.isprintable()
        or any(each in name for each in '/\\"')
        or name in (".", "..")
    ):
        raise InvalidRequest(
            f"{quote(name)} is no name for a file.",
            param="file",
            advice=f"It has 1 to {_LONGEST_NAME} bytes, and no control characters, quotes or slashes.",
        )
    return name


def _utf8(value: bytes) -> str:
    """Bytes of a header as the parser of options wants them, which writes them back as Latin-1."""
    return value.decode("latin-1")


def _said(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("The form cannot be read: a name or a field in it is not UTF-8.") from None


def _finish(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.seek(0)


async def _discard(receive: Receive, most: int) -> None:
    """Read what still comes, so that the client gets to read the answer."""
    with suppress(ClientGone):
        while most > 0:
            message = await receive()
            most -= len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


def _too_large(most: int, limit: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The file is over the limit of {most} bytes.",
        param="file",
        advice=f"The limit is set by {limit}.",
    )
