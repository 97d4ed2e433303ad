"""Files through the gateway: OpenAI's own client, owners, forms that are none."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import openai
import pytest

from tests.gateway.upstream import Wire, half_body, hang_up, no_json, reset, status

from .cloud import MOMENT, parts
from .conftest import CHAT, Gateway, LiveLedger, Make, form, line, lines


def test_openais_client_uploads_reads_and_deletes(gateway: Gateway) -> None:
    content = bytes(range(256)) * 100
    with gateway.client() as ours:
        made = ours.files.create(
            file=("page.pdf", content),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 86_400},
        )
        id = made.id.partition(".")[0]
        assert id == "file-0001"
        assert made.id != id
        (asked,) = gateway.cloud.asked
        fields = {"purpose": "user_data", "expires_after[anchor]": "created_at"}
        assert parts(asked) == {
            **fields,
            "expires_after[seconds]": "86400",
            "file": (content, "page.pdf"),
        }
        assert made.expires_at == MOMENT + 86_400
        assert ours.files.retrieve(made.id).id == made.id
        assert ours.files.content(made.id).read() == content
        assert [each.id for each in ours.files.list()] == [made.id]
        deleted = ours.files.delete(made.id)
        assert (deleted.id, deleted.deleted) == (made.id, True)
        assert list(ours.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            ours.files.retrieve(made.id)
    assert gateway.rows() == []  # files use no device


def test_a_line_is_as_its_request_would_be(gateway: Gateway) -> None:
    """Names, caps and salts, and every other byte as it came."""
    given = [
        line(1, max_tokens=5000, temperature=0.10),
        line(2, model="classify", max_completion_tokens=7, cache_salt="somebody else's"),
        b'{"custom_id": "r3", "method": "POST", "url": "/v1/chat/completions", "extra": 1.50,'
        b' "body": {"messages": [], "seed": 1.0, "model": "small"}}',
    ]
    answer = gateway.upload(b"\xef\xbb\xbf" + lines(*given) + b"\n  \n")
    assert answer.status == 200
    sent = parts(gateway.cloud.asked[0])["file"][0]
    first, second, third = (json.loads(each) for each in sent.splitlines())
    assert first == {
        **line(1),
        "body": {**line(1)["body"], "temperature": 0.1, "model": "tiny-1", "max_tokens": 100},
    }
    assert second["body"]["model"] == "tiny-1"
    assert second["body"]["max_completion_tokens"] == 7
    assert "cache_salt" not in second["body"]  # OpenAI's refuses what it does not know
    assert third["body"] == {"messages": [], "seed": 1.0, "model": "tiny-1", "max_tokens": 50}
    assert b'"extra":1.50' in sent
    assert b'"seed":1.0' in sent


def test_engines_of_ours_get_the_salt_of_the_key(make: Make) -> None:
    gateway = make(replace={"kind: openai": "kind: penstock"})
    assert gateway.upload(lines(line(cache_salt="x")), key=gateway.key).status == 200
    body = json.loads(parts(gateway.cloud.asked[0])["file"][0])["body"]
    assert body["cache_salt"].startswith("key:key_")


def test_other_keys_know_nothing_of_it(gateway: Gateway) -> None:
    name = gateway.upload(b"x", "user_data").json["id"]
    gateway.upload(b"y", "user_data", key=gateway.stranger)
    before = len(gateway.cloud.asked)
    id, _, token = name.partition(".")
    forged = [(name, gateway.stranger), (id, gateway.key), (f"file-0002.{token}", gateway.key)]
    forged += [(each, gateway.key) for each in (f"{name}x", name[:-1], "..", "%2e%2e", ".", "x%00y")]
    for each, key in forged:
        for method, suffix in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
            assert gateway.call(method, f"/v1/files/{each}{suffix}", key=key).status == 404, each
    for path in (f"{name}/../../admin", f"{name}%2F..%2F..%2Fadmin", f"{name}/other", f"{name}/content/x"):
        assert gateway.call("GET", f"/v1/files/{path}").status == 404
    assert len(gateway.cloud.asked) == before
    assert gateway.call("GET", f"/v1/files/{name}", key="sk-ps-wrong").status == 401
    assert [each["id"] for each in gateway.call("GET", "/v1/files").json["data"]] == [name]


def test_lists_have_pages(gateway: Gateway) -> None:
    names = [gateway.upload(b"x", "user_data").json["id"] for _ in range(5)]
    gateway.upload(b"x", "vision")
    gateway.upload(b"x", "user_data", key=gateway.stranger)

    def page(query: str) -> tuple[list[str], bool]:
        answer = gateway.call("GET", f"/v1/files?purpose=user_data&{query}").json
        ids = [each["id"] for each in answer["data"]]
        assert (answer["first_id"], answer["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
        return ids, answer["has_more"]

    newest = names[::-1]
    assert page("limit=2") == (newest[:2], True)
    assert page(f"limit=2&after={newest[1]}") == (newest[2:4], True)
    assert page(f"limit=2&after={newest[3]}") == (newest[4:], False)
    assert page(f"limit=3&order=asc&after={names[0]}") == (names[1:4], True)
    assert page("limit=5") == (newest, False)
    assert page(f"after={newest[-1]}") == ([], False)
    with gateway.client() as ours:
        found = [each.id for each in ours.files.list(limit=2, purpose="user_data")]
    assert found == newest  # the client turns the pages
    for query in ("limit=0", "limit=x", "limit=10001", "order=up", "what=1", "a&b", "limit=1%0d%0aX:1"):
        assert gateway.call("GET", f"/v1/files?{query}").status == 400, query
    assert gateway.call("GET", "/v1/files?after=file-0001").status == 404


def test_files_that_have_expired_are_in_no_list(gateway: Gateway) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    gateway.live.door.wall = lambda: MOMENT * 1_000_000_000
    gateway.upload(b"x", "user_data", **fields)
    assert len(gateway.call("GET", "/v1/files").json["data"]) == 1
    gateway.live.door.wall = lambda: (MOMENT + 3601) * 1_000_000_000
    assert gateway.call("GET", "/v1/files").json["data"] == []


WRONG_LINES: list[tuple[Any, int, str]] = [
    (b'{"custom_id": ', 400, "Line 2 of the file: The request body cannot be read as JSON"),
    (b"[1]", 400, "Line 2 of the file: .*an object"),
    (b"\xff\xfe", 400, "Line 2 of the file: .*UTF-8"),
    (b"[" * 1900, 400, "Line 2 of the file: .*nested too deeply"),
    ({**line(), "method": "GET"}, 400, "Line 2 of the file: method must be POST, got 'GET'"),
    ({**line(), "url": "/v1/bills"}, 400, "Line 2 of the file: url must be one of /v1/chat"),
    ({**line(), "url": "/v1/embeddings"}, 400, "Line 2 of the file: .*one endpoint"),
    ({**line(), "custom_id": 5}, 400, "Line 2 of the file: custom_id must be a string"),
    ({**line(), "body": None}, 400, "Line 2 of the file: "),
    (line(model="nobody"), 404, "Line 2 of the file: The model 'nobody' does not exist"),
    (line(model="other"), 400, "Line 2 of the file: .*'other'.*small.*one model"),
    (line(stream=True), 400, "Line 2 of the file: .*stream"),
    (line(max_tokens=-1), 400, "Line 2 of the file: max_tokens must be from 0"),
    (line(2, x="y" * 2000), 413, "Line 2 of the file is over the limit of 2000 bytes"),
]


def test_a_line_that_is_wrong_is_named(gateway: Gateway) -> None:
    for bad, code, said in WRONG_LINES:
        answer = gateway.upload(lines(line(), bad, line(3)))
        assert answer.status == code, said
        assert re.search(said, answer.error["message"]), answer.error
    assert gateway.cloud.asked == []


def test_what_a_batch_may_not_have(gateway: Gateway) -> None:
    assert "no requests" in gateway.upload(b"\n\n").error["message"]
    many = gateway.upload(lines(*map(line, range(21))))
    assert (many.status, many.error["param"]) == (413, None)
    assert "Line 21" in many.error["message"]
    forbidden = gateway.upload(lines(line()), key=gateway.narrow)
    assert (forbidden.status, forbidden.reason) == (403, "model_not_allowed")
    responses = {
        **line(),
        "url": "/v1/responses",
        "body": {"model": "small", "input": "x", "background": True},
    }
    assert gateway.upload(lines(responses)).reason == "unsupported_parameter"
    responses["body"] = {"model": "small", "input": "x", "previous_response_id": "resp_1"}
    assert gateway.upload(lines(responses)).reason == "unsupported_parameter"
    assert gateway.cloud.asked == []


WRONG_FORMS = [
    (form(b"x", purpose="vision"), "multipart/form-data", 400),
    (form(b"x", purpose="vision"), f"multipart/form-data; boundary={'b' * 71}", 400),
    (form(b"x", purpose="vision"), "application/json", 415),
    (form(b"x", purpose="vision")[:-6], "", 400),
    (form(b"x", purpose="vision").replace(b"--b\r\n", b"--c\r\n"), "", 400),
    (b"no form at all", "", 400),
    (b"", "", 400),
    (form(b"x"), "", 400),
    (form(b"x", purpose="no such/purpose"), "", 400),
    (form(b"x", purpose="vis\x00ion"), "", 400),
    (form(b"x", purpose="vision", other="1"), "", 400),
    (form(b"x", purpose="v" * 9000), "", 400),
    (form(b"x", purpose="vision").replace(b'; filename="in.jsonl"', b""), "", 400),
    (form(b"x", purpose="vision").replace(b'name="file"', b'name="data"'), "", 400),
    (form(b"x", purpose="vision")[:-7] + form(b"y"), "", 400),
    (form(b"x", purpose="a")[:-7] + form(b"y", purpose="b"), "", 400),
    (
        form(b"x", purpose="vision").replace(b"text/html", b"text/html\r\nContent-Transfer-Encoding: base64"),
        "",
        400,
    ),
    (form(b"x", purpose="vision").replace(b"text/html", b"x" * 5000), "", 400),
    (
        b"".join(b'--b\r\nContent-Disposition: form-data; name="x%d"\r\n\r\n\r\n' % n for n in range(20)),
        "",
        400,
    ),
    (form(b"x" * 100_001, purpose="vision"), "", 413),
]


def test_forms_that_are_none(gateway: Gateway) -> None:
    for number, (body, kind, code) in enumerate(WRONG_FORMS):
        answer = gateway.form(body, kind or "multipart/form-data; boundary=b")
        assert answer.status == code, number
        assert answer.error["message"]
    assert gateway.cloud.asked == []
    assert gateway.upload(b"fine", "vision").status == 200


WRONG_NAMES = [
    "../../etc/passwd",
    "a/b",
    "a\\b",
    'a\\"b',
    "",
    ".",
    "..",
    "a\tb",
    "a\x00b",
    "a\x85b",
    "x" * 256,
    "a\u202eb",
]


def test_names_of_files_that_are_refused(gateway: Gateway) -> None:
    for filename in WRONG_NAMES:
        assert gateway.upload(b"x", "vision", filename=filename).status == 400, filename
    assert gateway.cloud.asked == []


def test_names_and_types_of_files_pass_as_what_they_are(gateway: Gateway) -> None:
    assert gateway.upload(b"x", "vision", filename="Ünïcode; name=x 漢字.png").status == 200
    assert 'filename="Ünïcode; name=x 漢字.png"\r\n'.encode() in gateway.cloud.asked[0].body
    body = form(b"x", purpose="vision").replace(b"text/html", b"text/html; x=\xe9\x0b")
    assert gateway.form(body).status == 200
    assert b"Content-Type: application/octet-stream\r\n" in gateway.cloud.asked[1].body


def test_a_client_that_leaves_in_the_middle_leaves_nothing(gateway: Gateway) -> None:
    body = form(b"x" * 50_000, purpose="vision")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.live.port), 20) as connection:
        connection.sendall(head.encode() + body[:30_000])
    assert gateway.upload(b"fine", "vision").status == 200
    assert len(gateway.cloud.asked) == 1
    assert not [
        each for each in (gateway.folder / "spool").iterdir() if each.suffix not in (".lock", ".journal")
    ]


def test_a_client_that_is_slow_has_its_time(gateway: Gateway) -> None:
    gateway.live.stop()
    gateway.live = LiveLedger(gateway.spec, timeout_body=0.3)
    gateway.start()
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b\r\n"
    )
    assert gateway.live.raw(head.encode()).startswith(b"HTTP/1.1 408 ")
    assert gateway.upload(b"fine", "vision").status == 200


def test_as_many_uploads_as_may_be(make: Make) -> None:
    gateway = make(replace={"max_bytes: 100000": "max_bytes: 100000, max_uploads: 1"})
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n"
        "Expect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.live.port), 20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # it is being read
        answer = gateway.upload(b"x", "vision")
        assert (answer.status, answer.reason) == (503, "too_many_uploads")
        assert answer.headers["retry-after"]
    with socket.create_connection(("127.0.0.1", gateway.live.port), 20) as connection:
        connection.sendall(head.replace("1000", "1000000").encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_where_a_file_goes_without_lines(make: Make) -> None:
    spec = """
    upstreams:
      one: {{url: "{url}/v1", files: true, models: {{a: {{}}}}}}
      two: {{url: "{url}/two", files: true, models: {{b: {{}}}}}}
      three: {{url: "{url}/three", models: {{c: {{}}}}}}
    routes:
      both: {{targets: [{{model: a, upstream: one}}, {{model: b, upstream: two}}]}}
      second: {{targets: [{{model: b, upstream: two}}]}}
    teams: {{narrow: {{routes: [second]}}}}
    """
    gateway = make(spec=spec)
    answer = gateway.upload(b"x", "vision")
    assert (answer.status, answer.reason) == (400, "no_files")
    assert "one, two" in answer.error["message"]
    assert "`model`" in answer.error["message"]
    assert gateway.upload(b"x", "vision", model="both").status == 200
    assert gateway.cloud.asked[-1].path == "/v1/files"
    gateway.upload(b"x", "vision", target_model_names="second")
    gateway.upload(b"x", "vision", key=gateway.narrow)  # there is only one for it
    assert gateway.cloud.paths("POST") == ["/v1/files", "/two/v1/files", "/two/v1/files"]
    assert "model" not in parts(gateway.cloud.asked[0])
    assert gateway.upload(b"x", "vision", model="nobody").status == 404
    assert gateway.upload(b"x", "vision", model="both", key=gateway.narrow).status == 403
    apart = gateway.upload(lines(line(model="second")), model="both")
    assert (apart.status, apart.error["param"]) == (400, "model")


def test_nobody_takes_files(make: Make) -> None:
    gateway = make(replace={"files: true": "files: false"})
    for content, purpose in ((b"x", "vision"), (lines(line()), "batch")):
        answer = gateway.upload(content, purpose)
        assert (answer.status, answer.reason) == (400, "no_files")
        assert "files: true" in answer.error["message"]


async def slowly(wire: Wire) -> None:
    await wire.gone.wait()


@pytest.mark.parametrize(
    ("behaviour", "code", "reason"),
    [
        (reset, 502, "upstream_reset"),
        (hang_up, 502, "upstream_reset"),
        (no_json, 502, "upstream_invalid"),
        (half_body, 502, "upstream_cut"),
        (status(200, body={"id": "../admin"}), 502, "upstream_invalid"),
        (status(200, body=[1]), 502, "upstream_invalid"),
        (status(302, "Location: /v1/admin"), 502, "upstream_invalid"),
        (status(401), 502, "upstream_status"),
        (status(404), 502, "upstream_invalid"),
        (status(429, "Retry-After: 7"), 503, "upstream_status"),
        (status(500), 502, "upstream_status"),
        (status(400), 400, 400),
        (status(413), 413, 413),
        (slowly, 504, "upstream_slow"),
    ],
)
def test_an_upstream_that_does_not_take_it(make: Make, behaviour: Any, code: int, reason: Any) -> None:
    timeout = 1 if behaviour is slowly else 20
    gateway = make(replace={"max_lines: 20": f"max_lines: 20, timeout: {timeout}"})
    gateway.cloud.script["POST", "/v1/files"] = behaviour
    answer = gateway.upload(lines(line()))
    assert (answer.status, answer.reason) == (code, str(reason))
    assert gateway.call("GET", "/v1/files").json["data"] == []
    gateway.cloud.script.clear()
    assert gateway.upload(lines(line())).status == 200


def test_the_next_replica_is_asked_where_one_takes_no_connection(make: Make) -> None:
    gateway = make(clouds=2)
    gateway.clouds[0].upstream.stop()
    names = [gateway.upload(b"x", "vision").json["id"] for _ in range(3)]
    for name in names:  # where it is
        assert gateway.call("GET", f"/v1/files/{name}/content").body == b"x"
    assert len(gateway.clouds[1].files) == 3
    gateway.clouds[1].upstream.stop()
    answer = gateway.upload(b"x", "vision")
    assert (answer.status, answer.reason) == (502, "upstream_connect")


async def half_a_file(wire: Wire) -> None:
    await wire.head(200, "Content-Length: 1000", content_type="text/plain")
    await wire.send(b"x" * 500)


async def half_a_chunk(wire: Wire) -> None:
    await wire.head(200, "Transfer-Encoding: chunked", content_type="text/plain")
    await wire.chunk(b"x" * 500)


async def stalls(wire: Wire) -> None:
    await wire.head(200, "Content-Length: 1000", content_type="text/plain")
    await wire.send(b"x" * 500)
    await wire.gone.wait()


@pytest.mark.parametrize("behaviour", [half_a_file, half_a_chunk, stalls])
def test_half_of_a_file_never_looks_like_all_of_it(make: Make, behaviour: Any) -> None:
    idle = 1 if behaviour is stalls else 20
    gateway = make(replace={"timeout_idle: 20": f"timeout_idle: {idle}"})
    name = gateway.upload(b"x", "vision").json["id"]
    gateway.cloud.script["GET", "/v1/files/file-0001/content"] = behaviour
    with gateway.client() as ours, pytest.raises(openai.APIConnectionError):
        ours.files.content(name).read()


def test_a_file_that_is_gone_upstream_is_in_no_list(gateway: Gateway) -> None:
    name = gateway.upload(b"x", "vision").json["id"]
    del gateway.cloud.files["file-0001"]
    answer = gateway.call("GET", f"/v1/files/{name}/content")
    assert (answer.status, answer.reason) == (404, "not_found")
    assert gateway.call("GET", f"/v1/files/{name}").status == 404
    assert gateway.call("GET", "/v1/files").json["data"] == []


def test_a_client_that_leaves_while_the_upstream_takes_it_has_it_all_the_same(gateway: Gateway) -> None:
    async def late(wire: Wire) -> None:
        await wire.read_by_client()
        code, value = gateway.cloud.answer(wire.asked, "/v1/files")
        await wire.whole(code, value)

    gateway.cloud.script["POST", "/v1/files"] = late
    body = form(b"whole", purpose="vision")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.live.port), 20) as connection:
        connection.sendall(head.encode() + body)
        gateway.wait_for(lambda: bool(gateway.cloud.asked))
    gateway.cloud.upstream.go()
    gateway.wait_for(lambda: bool(gateway.call("GET", "/v1/files").json["data"]))
    (file,) = gateway.call("GET", "/v1/files").json["data"]
    assert gateway.call("GET", f"/v1/files/{file['id']}/content").body == b"whole"


def test_paths_have_their_methods(gateway: Gateway) -> None:
    assert gateway.call("PUT", "/v1/files").status == 405
    assert gateway.call("PATCH", "/v1/files/x").status == 405
    assert gateway.call("GET", "/v1/files/x/y").status == 404
    assert gateway.call("POST", CHAT, line()["body"]).status == 429  # ten tokens a minute
