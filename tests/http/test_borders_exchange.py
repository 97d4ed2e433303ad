"""One exchange in plain ASGI, without a socket: keys, errors, ids, bodies, streams, clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import EngineDead, InvalidRequest, PayloadTooLarge, QueueFull, Unavailable
from penstock.http.auth import OPEN_PATHS, AuthMiddleware, is_trusted
from penstock.http.body import NotJson, UnsupportedMediaType, parse_json, parse_object, read_body
from penstock.http.config import HttpConfig
from penstock.http.errors import ErrorMiddleware
from penstock.http.exchange import ClientGone, header, respond, until_disconnect
from penstock.http.ids import acceptable, response_id
from penstock.http.layers import application, restricted
from penstock.http.paths import Paths, normalised
from penstock.http.sse import DONE, EventDecoder, EventStream, event

Headers = dict[str, str]


class Answer:
    """What an application has sent."""

    def __init__(self, sent: list[Message]) -> None:
        self.sent = sent
        self.begun = bool(sent) and sent[0]["type"] == "http.response.start"
        self.status: int = sent[0]["status"] if self.begun else 0
        pairs = sent[0]["headers"] if self.begun else []
        self.headers: Headers = {name.decode(): value.decode("latin-1") for name, value in pairs}
        assert len(self.headers) == len(pairs)
        self.body: bytes = b"".join(message.get("body", b"") for message in sent)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) - {"reason"} == {"message", "type", "param", "code"}
        # OpenAI's word, or the status; what we call it is the reason then
        assert error["code"] == self.status or (isinstance(error["code"], str) and "reason" not in error)
        return error


def scope_of(path: str = "/", headers: Headers | None = None, **more: Any) -> Scope:
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    plain = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "headers": pairs}
    return {**plain, **more}


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def called(app: ASGIApp, scope: Scope, receive: Receive = never) -> Answer:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))  # type: ignore[arg-type]
    return Answer(sent)


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    await respond(send, b"{}")


# ---- keys ----

LOCKED = ErrorMiddleware(AuthMiddleware(fine, ("first", "sécond")))


@pytest.mark.parametrize(
    "given",
    ["Bearer first", "bearer first", "BEARER  first ", "Bearer " + "sécond".encode().decode("latin-1")],
)
def test_every_key_opens_however_its_scheme_is_written(given: str) -> None:
    assert called(LOCKED, scope_of("/v1/models", {"Authorization": given})).status == 200


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "No API key was provided."),
        ("first", "not a bearer token"),
        ("Basic first", "not a bearer token"),
        ("Bearer", "The API key is wrong."),
        ("Bearer ", "The API key is wrong."),
        ("Bearer firs", "The API key is wrong."),
        ("Bearer firstt", "The API key is wrong."),
        ("Bearer first,sécond", "The API key is wrong."),
        ("Bearer FIRST", "The API key is wrong."),
        ("Bearer sécond", "The API key is wrong."),  # in Latin-1: other bytes
    ],
)
def test_everything_else_is_refused_without_a_word_of_it(given: str | None, words: str) -> None:
    answer = called(LOCKED, scope_of("/v1/models", {} if given is None else {"Authorization": given}))
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert words in answer.error["message"]
    assert "first" not in answer.error["message"].lower()
    if words != "The API key is wrong.":
        assert answer.error["message"].endswith("Send the header `Authorization: Bearer KEY`.")


def test_probes_and_scrapes_need_no_key() -> None:
    """Nor does the API's description, which says nothing of this server."""
    open_paths = ["/docs", "/health", "/livez", "/metrics", "/openapi.json", "/ping", "/readyz"]
    assert sorted(OPEN_PATHS) == open_paths

    def status(path: str, root: str = "") -> int:
        return called(normalised(LOCKED, Paths((), root)), scope_of(path)).status

    for path in open_paths:
        for open_to_all, root in ((path, ""), (f"{path}/", ""), (path, "/llm"), (f"/llm{path}", "/llm")):
            assert status(open_to_all, root) == 200, (open_to_all, root)
        for closed, root in (
            (f"{path}/x", ""),
            (f"/x{path}", ""),
            (f"/{path}", ""),
            (f"/llm{path}", ""),
            (f"/llm{path}", "/l"),
            (f"/llm{path}", "/lln"),
            (f"/llmx{path}", "/llm"),
            (f"/llm/x{path}", "/llm"),
            (f"/llm/llm{path}", "/llm"),
            (path.upper(), ""),
        ):
            assert status(closed, root) == 401, (closed, root)


def test_who_may_speak_for_others_has_one_of_the_trusted_keys() -> None:
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(is_trusted(scope))
        await respond(send, b"{}")

    for keys, trusted, key, believed in (
        (("a", "b"), ("t", "u"), "t", True),
        (("a", "b"), ("t", "u"), "u", True),
        (("a", "b"), ("t", "u"), "a", False),
        (("a", "b"), ("t", "u"), "b", False),
        (("a", "b"), (), "b", False),
        ((), ("t",), "t", True),
        (("both",), ("both",), "both", True),
    ):
        scope = scope_of("/v1/models", {"Authorization": f"Bearer {key}"})
        assert called(ErrorMiddleware(AuthMiddleware(app, keys, trusted)), scope).status == 200
        assert seen.pop() is believed, (keys, trusted, key)
    only_trusted = ErrorMiddleware(AuthMiddleware(app, (), ("t",)))
    assert called(only_trusted, scope_of("/v1/models", {"Authorization": "Bearer a"})).status == 401
    assert called(only_trusted, scope_of("/health")).status == 200
    assert seen == [False], "a probe without a key is nobody's"


def test_what_is_no_http_has_no_keys() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    called(AuthMiddleware(app, ("k",)), {"type": "lifespan"})
    called(ErrorMiddleware(app), {"type": "lifespan"})
    assert seen == ["lifespan"] * 2


# ---- errors ----


def raising(error: BaseException, before: Callable[[Send], Awaitable[None]] | None = None) -> ErrorMiddleware:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if before is not None:
            await before(send)
        raise error

    return ErrorMiddleware(app)


async def begin_json(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})


async def begin_events(send: Send) -> None:
    await EventStream(send).send(event(b"1"))


async def end_events(send: Send) -> None:
    stream = EventStream(send)
    await stream.send(event(b"1"))
    await stream.close(event(DONE.encode()))


async def end_by_default(send: Send) -> None:
    """A message that does not say whether more follows is the last one."""
    await EventStream(send).send(event(b"1"))
    await send({"type": "http.response.body", "body": event(DONE.encode())})


def test_an_error_is_openais_with_its_status_and_headers() -> None:
    answer = called(raising(QueueFull("full.", retry_after=7)), scope_of())
    assert (answer.status, answer.headers["retry-after"]) == (503, "7")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert "www-authenticate" not in answer.headers
    plain = called(raising(InvalidRequest("no.", param="n", advice="Try.")), scope_of())
    assert plain.error == {
        "message": "no. Try.",
        "type": "invalid_request_error",
        "param": "n",
        "code": 400,
    }
    assert plain.status == 400
    assert "retry-after" not in plain.headers


def test_an_application_may_have_errors_of_its_own_shape() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["error_body"] = lambda error: b"own: " + str(error).encode()
        raise InvalidRequest("no.")

    assert called(ErrorMiddleware(app), scope_of()).body == b"own: no."


def test_of_a_bug_the_client_gets_an_id_and_the_log_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "penstock.http"):
        answer = called(raising(KeyError("secret")), scope_of("/where"))
    assert (answer.status, answer.error["reason"]) == (500, "internal_error")
    assert "secret" not in answer.error["message"]
    [record] = caplog.records
    error_id = record.getMessage().split()[1]
    assert len(error_id) == 12
    assert record.getMessage() == f"error {error_id} in GET /where"
    assert f"(id {error_id})" in answer.error["message"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


def test_an_answer_that_cannot_be_ended_is_cut() -> None:
    """Nothing may look like a whole one."""
    for begun in (begin_json, begin_events):
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        app = raising(EngineDead("gone"), begun)
        with pytest.raises(ConnectionAbortedError, match="gone"):
            asyncio.run(app(scope_of(), never, send))
        assert all(message.get("more_body", True) for message in sent)


def test_nobody_is_told_anything_who_has_left() -> None:
    assert called(raising(ClientGone()), scope_of()).sent == []


def test_who_is_cut_off_by_the_end_of_the_server_is_told_in_the_shape_of_the_answer() -> None:
    fresh = called(raising(asyncio.CancelledError()), scope_of())
    assert (fresh.status, fresh.error["message"]) == (503, "The server is shutting down.")
    begun = called(raising(asyncio.CancelledError(), begin_events), scope_of())
    first, last = EventDecoder().feed(begun.body)
    assert first == "1"
    assert json.loads(last)["error"]["message"] == "The server is shutting down."
    assert begun.sent[-1]["more_body"] is False
    # a whole stream stays whole, and what has no events gets none
    for ended in (end_events, end_by_default):
        whole = called(raising(asyncio.CancelledError(), ended), scope_of())
        assert EventDecoder().feed(whole.body) == ["1", DONE]
    assert called(raising(asyncio.CancelledError(), begin_json), scope_of()).body == b""


# ---- ids ----


def test_an_exchange_has_the_clients_id_or_a_fresh_one() -> None:
    for id in ("a", "x" * 256, "Ünser"):
        answer = called(ErrorMiddleware(fine), scope_of(headers={"X-Request-Id": id}))
        assert answer.headers["x-request-id"] == id
    fresh = set()
    for id in ("", "x" * 257, "a\tb", "a\x7f"):
        answer = called(ErrorMiddleware(fine), scope_of(headers={"X-Request-Id": id}))
        assert len(answer.headers["x-request-id"]) == 32
        fresh.add(answer.headers["x-request-id"])
    assert len(fresh) == 4
    silent = ErrorMiddleware(fine, id_header=False)
    assert "x-request-id" not in called(silent, scope_of(headers={"X-Request-Id": "a"})).headers


@given(st.text(max_size=3) | st.integers(250, 260).map("x".__mul__))
def test_an_id_can_stand_in_a_line(id: str) -> None:
    assert acceptable(id) == (1 <= len(id) <= 256 and id.isprintable())


def test_a_response_is_named_by_the_header_then_the_field_then_us() -> None:
    scope: Scope = {"client_request_id": "theirs", "request_id": "theirs"}
    first, second = (response_id("cmpl", scope, "field") for _ in range(2))
    assert first.response == second.response == "cmpl-theirs"
    assert first.engine.startswith("cmpl-theirs#")
    assert first.engine != second.engine
    scope = {"client_request_id": None, "request_id": "ours"}
    assert response_id("cmpl", scope, None).response == "cmpl-ours"
    assert response_id("cmpl", scope, "field").response == "cmpl-field"
    assert scope["request_id"] == "field"  # which the answer's header says then


# ---- routes ----


def served(**options: Any) -> ASGIApp:
    class Endpoint:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await respond(send, scope["path"].encode())

    routes = [Route(path, Endpoint(), methods=["GET", "DELETE"]) for path in ("/", "/a", "/health")]
    return application(routes, HttpConfig(**options))


@pytest.mark.parametrize(("path", "seen"), [("/", b"/"), ("/a", b"/a"), ("/a/", b"/a"), ("/a//", b"/a")])
def test_a_slash_at_the_end_is_none(path: str, seen: bytes) -> None:
    assert called(served(), scope_of(path)).body == seen


def test_what_nobody_serves_is_named() -> None:
    lost = called(served(), scope_of("/b"))
    assert (lost.status, lost.error["message"]) == (404, "There is no GET /b.")
    wrong = called(served(), {**scope_of("/a"), "method": "POST"})
    assert (wrong.status, wrong.error["reason"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "DELETE, GET, HEAD"
    assert wrong.error["message"] == "POST is not allowed for /a. Use DELETE, GET, HEAD."


def test_what_is_no_http_is_not_answered() -> None:
    assert called(served(), {"type": "websocket", "path": "/b", "headers": []}).sent == []


def test_layers_are_there_where_they_are_asked_for() -> None:
    origin = {"Origin": "https://a.example"}
    assert called(served(), scope_of("/a", origin)).status == 200
    assert "access-control-allow-origin" not in called(served(), scope_of("/a", origin)).headers
    open_to = served(allowed_origins=("https://a.example",), allow_credentials=True, api_key=("k",))
    answer = called(open_to, scope_of("/a", origin))
    assert answer.status == 401, "and a browser can read why"
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id, X-Penstock-Ignored"
    other = called(open_to, scope_of("/a", {"Origin": "https://b.example"}))
    assert "access-control-allow-origin" not in other.headers
    asked = {**origin, "Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "X-A"}
    for options, status in (({}, 200), ({"allowed_methods": "GET"}, 400), ({"allowed_headers": "X-B"}, 400)):
        app = served(allowed_origins=("https://a.example",), **options)
        assert called(app, {**scope_of("/a", asked), "method": "OPTIONS"}).status == status
    assert "x-request-id" not in called(served(enable_request_id_headers=False), scope_of("/a")).headers


def test_beyond_the_limit_probes_are_answered_and_others_told_to_come_back() -> None:
    app = restricted(served())
    for path in ("/health", "/health/"):
        assert called(app, scope_of(path)).status == 200
    answer = called(app, scope_of("/a"))
    assert (answer.status, answer.error["reason"]) == (503, "too_many_connections")
    assert answer.headers["retry-after"] == "1"
    assert "try again later" in answer.error["message"]


# ---- bodies ----


def body_of(chunks: list[bytes | None], headers: Headers | None = None, limit: int = 100) -> bytes:
    """Read these; None: the client leaves. What is not read is an error."""
    left = list(chunks)

    async def receive() -> Message:
        chunk = left.pop(0)
        if chunk is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    body = asyncio.run(read_body(scope_of(headers=headers), receive, limit))
    assert not left
    return body


@pytest.mark.parametrize(
    "media",
    [
        None,
        "application/json",
        "Application/JSON; charset=utf-8",
        " application/json ;x",
        "application/vnd.api+json",
    ],
)
def test_json_is_taken_under_all_its_names(media: str | None) -> None:
    headers = {} if media is None else {"Content-Type": media}
    assert body_of([b"{", b"", b"}"], headers) == b"{}"
    assert body_of([b"{}"], {**headers, "Content-Encoding": " Identity "}) == b"{}"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("Content-Type", "text/plain", "'text/plain'"),
        ("Content-Type", "application/jsonx", "'application/jsonx'"),
        ("Content-Type", "application/x-www-form-urlencoded", "Send `Content-Type: application/json`."),
        ("Content-Encoding", "gzip", "'gzip'"),
        ("Content-Encoding", "identity, gzip", "Send it without Content-Encoding."),
    ],
)
def test_what_is_declared_as_something_else_is_not_read(name: str, value: str, shown: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        body_of([b"{}"], {name: value})
    assert (caught.value.status, caught.value.code) == (415, "unsupported_media_type")
    assert shown in str(caught.value)


def test_a_body_has_as_many_bytes_as_are_allowed() -> None:
    assert body_of([b"x" * 60, b"x" * 40]) == b"x" * 100
    assert body_of([b"x" * 100], {"Content-Length": "100"}) == b"x" * 100
    for chunks, told in (([b"x" * 60, b"x" * 41], "101"), ([b"x" * 101], "101"), ([b"x" * 500] * 1, "500")):
        with pytest.raises(PayloadTooLarge, match=f"of {told} bytes .* limit of 100 bytes.*--max-body-bytes"):
            body_of(list(chunks))
    # what is announced counts as well, and is read so that the client reads the answer
    with pytest.raises(PayloadTooLarge, match="of 101 bytes"):
        body_of([b"x" * 50, b"x" * 51], {"Content-Length": "101"})
    for nonsense in ("-5", "x", "1e9", ""):
        assert body_of([b"{}"], {"Content-Length": nonsense}) == b"{}"


def test_who_asks_first_is_told_before_it_sends() -> None:
    with pytest.raises(PayloadTooLarge, match="of 101 bytes"):
        body_of([], {"Content-Length": "101", "Expect": "100-continue"})
    assert body_of([b"{}"], {"Content-Length": "100", "Expect": "100-continue"}) == b"{}"


def test_eight_times_the_limit_is_read_and_not_more() -> None:
    with pytest.raises(PayloadTooLarge, match="of 800 bytes"):
        body_of([b"x" * 100] * 8)
    endless: list[bytes | None] = [b"x" * 100] * 8 + [b"x"] + [b"never read"]
    with pytest.raises(PayloadTooLarge, match="of 801 bytes"):
        body_of(endless)


def test_who_leaves_in_a_body_has_left() -> None:
    for chunks in ([None], [b"{", None], [b"x" * 200, None]):
        with pytest.raises(ClientGone):
            body_of(list(chunks))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": "\xff"}', "it is not valid UTF-8 at byte 7"),
        (b"[1]", "it must be an object, got an array"),
        (b'"a"', "it must be an object, got a string"),
        (b"true", "it must be an object, got a boolean"),
        (b"null", "it must be an object, got null"),
        (b"1.5", "it must be an object, got a number"),
        (b"7", "it must be an object, got a number"),
        (b'{"a": "\\ud83d"}', "the escape \\ud83d without its other half"),
        (b'{"a": "\\uDC00x"}', "the escape \\uDC00 without its other half"),
        (b'{"a": "\\ud83d\\ud83d\\ude00"}', "the escape \\ud83d without"),
        (b'{"a": 1', "truncated"),
    ],
)
def test_what_is_no_object_says_why(data: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_object(data)
    assert str(caught.value).startswith("The request body cannot be read as JSON: ")
    assert why in str(caught.value)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDBFF", "\\udc00", "\\uDFFF"])
def test_half_a_character_is_told_as_such_wherever_it_stands(half: str) -> None:
    for text in (half, f"a{half}", f"{half}a", f"\\ud83d\\ude00{half}", f"{half}\\n", f"{half}\\u0041"):
        with pytest.raises(NotJson) as caught:
            parse_json(f'["{text}", "\\ud83d\\ude00"]'.encode())
        assert f"the escape {half} without its other half" in str(caught.value), text


def test_what_some_editors_write_can_be_read() -> None:
    assert parse_object('\ufeff {"a": "\\ud83d\\ude00"}'.encode()) == {"a": "😀"}
    with pytest.raises(NotJson):
        parse_json(b"{'a': 1}")


# ---- headers, answers, streams ----


def test_a_header_is_the_first_of_its_name() -> None:
    scope: Scope = {"headers": [(b"b", b"1"), (b"a", "é".encode("latin-1")), (b"a", b"2")]}
    assert (header(scope, b"a"), header(scope, b"b"), header(scope, b"c")) == ("é", "1", None)


def test_an_answer_says_its_length_and_type() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"abc", status=201, content_type=b"text/plain", headers={"X-A": "ü€"})

    answer = called(app, scope_of())
    assert (answer.status, answer.body) == (201, b"abc")
    assert answer.headers == {"content-type": "text/plain", "content-length": "3", "x-a": "ü?"}
    plain = called(fine, scope_of())
    assert (plain.status, plain.headers["content-type"]) == (200, "application/json")


def test_a_stream_begins_with_its_first_event() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send)
        assert not stream.started
        await stream.send(event(b"1"))
        assert stream.started
        await stream.send(event(b"2", name="more"))
        await stream.close(event(b"3"))

    answer = called(app, scope_of())
    assert answer.status == 200
    assert answer.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    assert answer.body == b"data: 1\n\nevent: more\ndata: 2\n\ndata: 3\n\n"
    assert [message.get("more_body") for message in answer.sent] == [None, True, True, False]
    assert {message["type"] for message in answer.sent[1:]} == {"http.response.body"}
    assert EventDecoder().feed(answer.body) == ["1", "2", "3"]


# ---- clients that leave ----


class Work:
    """Goes on until it is let go, and remembers its end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = asyncio.Event()
        self.ended = ""
        self._error = error

    async def __call__(self) -> None:
        try:
            await self.go.wait()
            self.ended = "done"
            if self._error is not None:
                raise self._error
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise


def test_work_goes_on_until_it_is_done_or_the_client_leaves() -> None:
    async def scene() -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        work = Work()
        messages.put_nowait({"type": "http.request"})  # says nothing
        task = asyncio.create_task(until_disconnect(messages.get, work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        work.go.set()
        await task
        assert work.ended == "done"

        work = Work()
        task = asyncio.create_task(until_disconnect(messages.get, work()))
        await asyncio.sleep(0)
        messages.put_nowait({"type": "http.disconnect"})
        await task  # without an error
        assert work.ended == "cancelled"

        work = Work(Unavailable("no"))
        work.go.set()
        with pytest.raises(Unavailable):
            await until_disconnect(messages.get, work())

        work = Work()
        task = asyncio.create_task(until_disconnect(messages.get, work()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):  # not by the client: the server ends
            await task
        assert work.ended == "cancelled"

    asyncio.run(asyncio.wait_for(scene(), 20))
