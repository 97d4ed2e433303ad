"""One request on the wire, made of (seed, number): a valid one, or one that something was done to.

    valid    ≈ 38 %  as `requests` makes it, in any spelling: must be served
    mutated  ≈ 42 %  fields of another type, out of range, missing, unknown, nested, twice
    broken   ≈ 10 %  the bytes of the body: cut, flipped, in another encoding, of another type
    strange  ≈ 10 %  paths, methods, queries and headers, and GETs

Each of them may come in chunks, and some clients leave before they have sent all, or have read all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote

from msgspec import inspect

from penstock.server.app import ROUTES
from penstock.server.fields import IGNORED

from .requests import (
    CHAT,
    CHAT_BATCH,
    EMBEDDINGS,
    FILES,
    INVOCATIONS,
    MESSAGES,
    POOL,
    POOLING_SHAPES,
    POOLING_VALID,
    REFUSED,
    RESPONSES,
    SHAPES,
    TEXT,
    TOKENIZE,
    VALID,
    Bodies,
    upload,
)
from .values import STRINGS, Entries, anything, deep, key, of_type, text, write

GETS = tuple(path for path, method, _ in ROUTES if method == "GET" and "{" not in path)
PATHS = tuple(dict.fromkeys(path for path, _, _ in ROUTES))

#: A new request of these is served at its whole length: rarely, as one holds the engine for a while.
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")
_SHORT = (1, 2, 3, 4, 0, -1, 10**6, 2**63, 2**63 - 1, 10**400, 1.5)


@dataclass(frozen=True, slots=True)
class Case:
    """One request, and what is expected of it."""

    number: int
    kind: str
    method: str
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes | None
    chunks: tuple[int, ...] = ()
    """Sizes of the pieces of a chunked body; a body with a length if empty."""
    leaves: float | None = None
    """When the client leaves: having sent this share of its bytes; over 1, having read the answer's first."""
    must_serve: bool = False
    field: str | None = None
    """The one field that was changed, where the body is JSON otherwise."""

    @property
    def path(self) -> str:
        """Of the endpoint, for what is expected of its answer."""
        return self.target.split(b"?")[0].decode("latin-1")

    def wire(self) -> bytes:
        """The bytes that are sent."""
        head = [self.method.encode() + b" " + self.target + b" HTTP/1.1", b"Host: fuzz"]
        head += [name + b": " + value for name, value in self.headers]
        body = b""
        if self.body is not None and self.chunks:
            head.append(b"Transfer-Encoding: chunked")
            at = 0
            for size in self.chunks:
                piece = self.body[at : at + size]
                body += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
                at += size
            rest = self.body[at:]
            body += (b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"
        elif self.body is not None:
            head.append(b"Content-Length: %d" % len(self.body))
            body = self.body
        return b"\r\n".join(head) + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class World:
    """What a kind of server takes."""

    shapes: Mapping[str, tuple[type, ...]]
    valid: Bodies
    weights: Mapping[str, int]
    """Of endpoints that are asked more often, or not at all; the others have 1."""
    uploads: float = 0.0
    """Share of the cases that are files."""

    def endpoint(self, random: Random) -> str:
        """Any of them."""
        paths = tuple(self.shapes)
        return random.choices(paths, [self.weights.get(path, 1) for path in paths])[0]


_OFTEN = {CHAT: 4, CHAT_BATCH: 2, TEXT: 5, TOKENIZE: 2, INVOCATIONS: 2, RESPONSES: 3, MESSAGES: 3}
GENERATING = World(SHAPES, VALID, _OFTEN, uploads=0.05)
POOLING = World(POOLING_SHAPES, POOLING_VALID, {EMBEDDINGS: 4, POOL: 2})


def make(seed: int, number: int, world: World = GENERATING) -> Case:
    """The case of this number."""
    random = Random(seed * 1_000_003 + number)
    if random.random() < world.uploads:
        return _upload(random, number)
    kind = random.random()
    if kind < 0.38:
        return _valid(random, number, world)
    if kind < 0.80:
        return _mutated(random, number, world)
    if kind < 0.90:
        return _broken(random, number, world)
    return _strange(random, number)


make_pooling = functools.partial(make, world=POOLING)
"""The case of this number, for a model that pools."""


# ---- kinds ----


def _valid(random: Random, number: int, world: World) -> Case:
    path = world.endpoint(random)
    body = write(world.valid[path](random), ascii=random.random() < 0.7)
    if random.random() < 0.05:
        body = " " * random.choice((1, 100, 5000)) + body + "\n" * random.randrange(9)
    data = body.encode()
    if random.random() < 0.02:
        data = b"\xef\xbb\xbf" + data
    leaves = _leaves(random)
    return Case(
        number,
        "valid",
        "POST",
        path.encode(),
        _headers(random),
        data,
        _chunks(random, len(data)),
        leaves,
        must_serve=leaves is None and path not in REFUSED,
    )


def _mutated(random: Random, number: int, world: World) -> Case:
    path = world.endpoint(random)
    shape = random.choice(world.shapes[path])
    request = Entries(world.valid[path](random).items())
    times = random.choice((1, 1, 1, 1, 2, 3))
    field = None
    for _ in range(times):
        field = _mutate(random, request, shape)
    body = write(request, ascii=random.random() < 0.7)
    data = body.encode("utf-8", "surrogatepass")
    try:
        json.loads(body, parse_constant=lambda _: 1 / 0)
    except (ValueError, RecursionError, ZeroDivisionError):
        field = None
    return Case(
        number,
        "mutated",
        "POST",
        path.encode(),
        _headers(random),
        data,
        _chunks(random, len(data)),
        _leaves(random),
        field=field if times == 1 else None,
    )


def _upload(random: Random, number: int) -> Case:
    """A form, whole or with its bytes broken."""
    kind, data = upload(random)
    whole = random.random() < 0.5
    if not whole:
        data = _break(random, data)
    leaves = _leaves(random)
    headers = ((b"Content-Type", kind.encode()),)
    must = whole and leaves is None
    name = "valid" if whole else "broken"
    chunks = _chunks(random, len(data))
    return Case(number, name, "POST", FILES.encode(), headers, data, chunks, leaves, must_serve=must)


def _broken(random: Random, number: int, world: World) -> Case:
    path = world.endpoint(random)
    data = _break(random, write(world.valid[path](random), ascii=random.random() < 0.5).encode())
    return Case(
        number,
        "broken",
        "POST",
        path.encode(),
        _headers(random, strange=random.random() < 0.2),
        data,
        _chunks(random, len(data)),
        _leaves(random),
    )


def _strange(random: Random, number: int) -> Case:
    path = random.choice(PATHS).replace("{name:path}", "demo" if random.random() < 0.3 else _segment(random))
    path = path.replace("{name}", random.choice(("resp_1", "file-1", "batch_1", _segment(random))))
    kind = random.random()
    method = "GET" if kind < 0.5 else random.choice(_METHODS)
    if random.random() < 0.4:
        path = random.choice(_SPELLINGS)(path)
    elif random.random() < 0.1:
        path = "/" + _segment(random)
    if random.random() < 0.3:
        path += "?" + random.choice(
            ("a=b", "", "a=%zz&&&=", "%00", "x=" + "a" * 4000, "?" * 9, _segment(random))
        )
    body = None
    if method in ("POST", "PUT", "PATCH") or random.random() < 0.1:
        body = random.choice((b"", b"{}", b'{"prompt":"a","max_tokens":1}', b"\x00" * 99, b"x" * 70_000))
    return Case(
        number,
        "strange",
        method,
        path.encode(),
        _headers(random, strange=True),
        body,
        _chunks(random, len(body or b"")),
        _leaves(random),
    )


# ---- fields ----


@functools.cache
def _fields(shape: type) -> dict[str, inspect.Type]:
    kind = inspect.type_info(shape)
    assert isinstance(kind, inspect.StructType)
    return {field.name: field.type for field in kind.fields}


@functools.cache
def _known(shape: Any) -> tuple[str, ...]:
    return (*sorted(shape.neutral), *sorted(IGNORED))


def _mutate(random: Random, request: Entries, shape: type) -> str | None:
    """Do one thing to a request; returns the field, where it is one."""
    fields = _fields(shape)
    kind = random.random()
    if kind < 0.3:
        name = random.choice(list(fields))
        _set(request, name, _limited(random, name, of_type(random, fields[name])))
    elif kind < 0.55:
        name = random.choice(list(fields))
        _set(request, name, _limited(random, name, anything(random)))
    elif kind < 0.65 and request:
        at = random.randrange(len(request))
        name, value = request[at]
        request[at] = (name, _limited(random, name, _inside(random, value)))
    elif kind < 0.75:
        name = random.choice(_known(shape))
        _set(request, name, anything(random))
    elif kind < 0.82:
        name = random.choice((_typo(random, random.choice(list(fields))), key(random)))
        request.append((name, anything(random)))
    elif kind < 0.9:
        name = random.choice(list(fields))
        request.append((name, _limited(random, name, of_type(random, fields[name]))))
        return None  # which of two counts is nobody's promise
    elif kind < 0.94:
        name = random.choice([each for each, _ in request if each not in _LENGTHS] or ["prompt"])
        request[:] = [(each, value) for each, value in request if each != name]
    else:
        name = random.choice(list(fields))
        _set(request, name, deep(random))
    return name


def _set(request: Entries, name: str, value: Any) -> None:
    request[:] = [(each, old) for each, old in request if each != name]
    request.append((name, value))


def _limited(random: Random, name: str, value: Any) -> Any:
    return (
        random.choice(_SHORT)
        if name in _LENGTHS and (value is None or isinstance(value, int | float))
        else value
    )


def _inside(random: Random, value: Any) -> Any:
    """The value with something else somewhere in it."""
    if isinstance(value, dict | Entries) and value and random.random() < 0.85:
        entries = list(value.items() if isinstance(value, dict) else value)
        at = random.randrange(len(entries))
        changed = Entries((k, _inside(random, old) if i == at else old) for i, (k, old) in enumerate(entries))
        if random.random() < 0.2:
            changed.append((key(random), anything(random)))
        return changed
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        return [_inside(random, each) if i == at else each for i, each in enumerate(value)]
    return deep(random) if random.random() < 0.15 else anything(random)


def _typo(random: Random, name: str) -> str:
    at = random.randrange(len(name))
    return random.choice(
        (name[:at] + name[at + 1 :], name.upper(), name + "s", name[:at] + "é" + name[at:], " " + name)
    )


# ---- bytes ----


def _break(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data))
    match random.randrange(12):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + random.randbytes(random.randint(1, 8)) + data[at:]
        case 3:
            return data[:at] + data[random.randrange(len(data)) :]
        case 4:
            return data.decode().encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
        case 5:
            return data + random.choice((b"x", b"}", b"\x00", data, b",", b"//c", b"\xef\xbb\xbf"))
        case 6:
            return random.choice(
                (b"", b" ", b"null", b"[]", b"{}", b'"a"', b"0", b"\x00", b"{" * 9, b"[" * 70, data * 40)
            )
        case 7:
            name = random.choice((b'"', b":", b",", b"{", b"}"))
            return data.replace(name, random.choice((b"'", b"", name * 2, b";")), random.randint(1, 3))
        case 8:
            return (
                data[:at]
                + random.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"))
                + data[at:]
            )
        case 9:
            return data[:at] + random.choice(STRINGS).encode("utf-8", "surrogatepass") + data[at:]
        case 10:
            return random.randbytes(random.choice((1, 10, 100, 5000)))
    return data[:at] + b"[" * random.choice((1, 70, 5000)) + data[at:]


# ---- the rest of HTTP ----

_METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "QUERY", "PROPFIND", "TRACE")
_SPELLINGS = (
    lambda path: path + "/",
    lambda path: path + "///",
    lambda path: "/" + path,
    lambda path: path.upper(),
    lambda path: path.replace("/", "/./"),
    lambda path: path.replace("o", "%6f"),
    lambda path: path + "%00",
    lambda path: path + "%ff%fe",
    lambda path: path + "%0d%0aX:y",
    lambda path: "/.." + path,
    lambda path: path + ";a=b",
    lambda path: path[:-1],
    lambda path: path + "/" + "a" * 3000,
    lambda path: "http://fuzz" + path,
)
_TYPES = (
    *(
        b"application/json; charset=utf-8",
        b"application/vnd.api+json",
        b"APPLICATION/JSON",
        b"text/plain",
        b"*/*",
    ),
    *(
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"",
        b";",
        b"json",
        b"\xe9/\xff",
    ),
)
_ENCODINGS = (b"gzip", b"identity", b"br, gzip", b"", b"IDENTITY", b"\xff")
_STRANGE_HEADERS = (
    (b"X-Request-Id", b"\xff\xfe"),
    (b"X-Request-Id", b"a" * 300),
    (b"X-Request-Id", b"\xe9 \xa0"),
    (b"X-Request-Id", b""),
    (b"Authorization", b"Bearer \xff"),
    (b"Authorization", b"Basic"),
    (b"Origin", b"null"),
    (b"Accept", b"text/event-stream"),
    (b"Accept-Encoding", b"gzip, br;q=0"),
    (b"Cookie", b"a=b; " * 200),
    (b"Range", b"bytes=0-1"),
    (b"If-None-Match", b"*"),
    (b"X-Forwarded-For", b"\xff, ::1"),
    (b"Access-Control-Request-Method", b"POST"),
    (b"Expect", b"100-continue"),
)


def _headers(random: Random, strange: bool = False) -> tuple[tuple[bytes, bytes], ...]:
    headers = [(b"Content-Type", b"application/json")] if random.random() < 0.9 else []
    if random.random() < 0.05:
        headers.append((b"X-Request-Id", b"fuzz-%d" % random.randrange(10)))
    if random.random() < 0.02:
        headers.append((b"Expect", b"100-continue"))
    if strange:
        if random.random() < 0.4:
            headers = [(b"Content-Type", random.choice(_TYPES))]
        if random.random() < 0.2:
            headers.append((b"Content-Encoding", random.choice(_ENCODINGS)))
        headers += random.sample(_STRANGE_HEADERS, random.choice((0, 1, 2, 5)))
    return tuple(headers)


def _segment(random: Random) -> str:
    return quote(text(random)[:200] or "-", safe=random.choice(("", "/")))


def _chunks(random: Random, length: int) -> tuple[int, ...]:
    if random.random() < 0.92 or not length:
        return ()
    return tuple(random.choice((1, 7, 100, 4096)) for _ in range(random.randint(1, 6)))


def _leaves(random: Random) -> float | None:
    if random.random() < 0.96:
        return None
    return random.choice((random.random(), 1.0, 1.0, 2.0))
