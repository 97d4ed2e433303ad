"""The API's description: it is valid, says everything that is served and nothing else, and is true."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from penstock.server import protocol, shapes
from penstock.server.app import ROUTES, TOKENIZER_INFO
from penstock.server.docs import DOCS
from penstock.server.openapi import OPERATIONS, describe
from penstock.server.state import State
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import REPLY

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
ALL = (*ROUTES, TOKENIZER_INFO, *DOCS)


@pytest.fixture(scope="module")
def full(tokenizer: Tokenizer, says: Any) -> Iterator[LiveServer]:
    """Everything that can be served."""
    with running(tokenizer, says(REPLY), enable_tokenizer_info_endpoint=True) as server:
        yield server


@pytest.fixture(scope="module")
def document(full: LiveServer) -> Any:
    answer = full.get("/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json


@pytest.fixture(scope="module")
def schemas(document: Any) -> Any:
    return document["components"]["schemas"]


def operations(document: Any) -> dict[tuple[str, str], Any]:
    return {
        (path, method.upper()): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_it_is_valid(document: Any) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(document)
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


def test_every_route_is_in_it_and_the_other_way_round(document: Any) -> None:
    assert set(operations(document)) == {
        (path.replace("{name:path}", "{name}"), method) for path, method, _ in ALL
    }
    assert {path for path, _, _ in ALL} >= set(OPERATIONS)


def test_what_it_names_is_served_and_with_no_other_method(full: LiveServer, document: Any) -> None:
    names = {path: methods for path, methods in document["paths"].items() if path.endswith("/{name}")}
    for path, methods in document["paths"].items():
        where = path.replace("{name}", "tiny")
        # a word behind a path may also be a name
        methods = methods.keys() | names.get(f"{path.rpartition('/')[0]}/{{name}}", {}).keys()
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            status = full.request(method, where, {}).status
            assert (status != 405) == (method.lower() in methods), (method, path)
            kept = path.startswith(("/v1/responses/", "/v1/files", "/v1/batches"))
            assert status != 404 or kept  # there is none of that name


def test_flags_take_routes_away(tokenizer: Tokenizer, says: Any, server: LiveServer) -> None:
    assert "/tokenizer_info" not in server.get("/openapi.json").json["paths"]
    assert server.get("/tokenizer_info").status == 404
    with running(tokenizer, says(REPLY), disable_fastapi_docs=True) as bare:
        assert bare.get("/openapi.json").status == 404
        assert bare.get("/docs").status == 404


def test_every_field_of_a_request_is_in_it(schemas: Any) -> None:
    for known in OPERATIONS.values():
        for shape in known.takes:
            schema = schemas[shape.__name__]
            assert set(schema["properties"]) == {*shape.__struct_encode_fields__}  # type: ignore[attr-defined]
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert schemas["CompletionRequest"]["required"] == ["prompt"]
    assert schemas["DetokenizeRequest"]["required"] == ["tokens"]


def test_null_is_nothing_wherever_it_says_so(full: LiveServer, schemas: Any) -> None:
    """And it says so of everything that may be left out."""
    for path, shape, needed in (
        (CHAT, "ChatRequest", {"messages": HI}),
        (COMPLETIONS, "CompletionRequest", {"prompt": "x"}),
        ("/detokenize", "DetokenizeRequest", {"tokens": [1]}),
    ):
        schema = schemas[shape]
        optional = set(schema["properties"]) - set(schema["required"])
        assert all({"type": "null"} in schema["properties"][name]["anyOf"] for name in optional)
        assert full.post(path, {**dict.fromkeys(optional), **needed}).status == 200
        for name in needed:
            assert full.post(path, {**needed, name: None}).status == 400


def bounds(schema: Any) -> Iterator[tuple[str, float, float]]:
    """(field, value within, value beyond) at every border of a request's numbers."""
    for name, said in schema["properties"].items():
        for part in (said, *said.get("anyOf", ())):
            step = 1 if part.get("type") == "integer" else 0.001
            if "minimum" in part:
                yield name, part["minimum"], part["minimum"] - step
            if "exclusiveMinimum" in part:
                yield name, part["exclusiveMinimum"] + step, part["exclusiveMinimum"]
            if "maximum" in part:
                yield name, part["maximum"], part["maximum"] + step


def test_ranges_are_those_that_are_kept(full: LiveServer, schemas: Any) -> None:
    found = list(bounds(schemas["CompletionRequest"]))
    assert {name for name, _, _ in found} >= {"temperature", "top_p", "n", "frequency_penalty", "top_k"}
    for name, within, beyond in found:
        body = {"prompt": "x", "max_tokens": 8}
        assert full.post(COMPLETIONS, {**body, name: within}).status == 200, name
        refused = full.post(COMPLETIONS, {**body, name: beyond})
        assert (refused.status, refused.error["param"]) == (400, name)


PROMPTS = ["x", ["x", "y"], [1, 2], [[1], [2, 3]]]


def test_every_form_of_a_prompt(full: LiveServer, schemas: Any) -> None:
    assert len(schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]) == len(PROMPTS)
    for prompt in PROMPTS:
        assert full.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1}).status == 200


# ---- answers ----

ANSWERS: list[tuple[str, str, Any, type]] = [
    ("GET", "/v1/models", None, shapes.ModelList),
    ("GET", "/v1/models/tiny", None, shapes.Model),
    ("GET", "/health", None, shapes.Health),
    ("POST", "/ping", None, shapes.Health),
    ("GET", "/readyz", None, shapes.Health),
    ("GET", "/livez", None, shapes.Health),
    ("GET", "/version", None, shapes.Version),
    ("GET", "/load", None, shapes.Load),
    ("GET", "/tokenizer_info", None, shapes.TokenizerInfo),
    ("POST", "/tokenize", {"prompt": "x"}, shapes.Tokens),
    ("POST", "/tokenize", {"messages": HI, "return_token_strs": True}, shapes.Tokens),
    ("POST", "/detokenize", {"tokens": [1]}, shapes.Text),
    ("POST", CHAT, {"messages": HI}, shapes.ChatCompletion),
    (
        "POST",
        CHAT,
        {
            "messages": HI,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "return_prompt_text": True,
        },
        shapes.ChatCompletion,
    ),
    ("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 2}, shapes.Completion),
    (
        "POST",
        COMPLETIONS,
        {"prompt": ["x", "yz"], "logprobs": 2, "echo": True, "max_tokens": 2, "return_token_ids": True},
        shapes.Completion,
    ),
    ("POST", CHAT, {}, shapes.Error),
    ("POST", CHAT, {"messages": HI, "model": "none"}, shapes.Error),
    ("GET", "/nowhere", None, shapes.Error),
]


@pytest.mark.parametrize(("method", "path", "body", "shape"), ANSWERS)
def test_answers_are_as_it_says(
    full: LiveServer, schemas: Any, method: str, path: str, body: Any, shape: type
) -> None:
    answer = full.request(method, path, body)
    assert isinstance(msgspec.convert(answer.json, shape), shape)
    assert set(answer.json) >= set(schemas[shape.__name__]["required"])
    if shape is not shapes.TokenizerInfo:  # it has whatever the model's file has
        assert set(answer.json) <= set(schemas[shape.__name__]["properties"])


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 1}, shapes.ChatCompletionChunk),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 3, "logprobs": 1}, shapes.CompletionChunk),
    ],
)
@pytest.mark.parametrize("options", [None, {"include_usage": True, "continuous_usage_stats": True}])
def test_events_are_as_it_says(
    full: LiveServer, schemas: Any, path: str, body: Any, shape: type, options: Any
) -> None:
    events = full.events(path, {**body, "stream_options": options})
    for event in events:
        assert isinstance(msgspec.convert(event, shape), shape)
        assert set(event) <= set(schemas[shape.__name__]["properties"])
    assert len(events) >= 3


def test_answers_and_errors_are_named_for_each_operation(document: Any) -> None:
    for (path, method), operation in operations(document).items():
        answers = operation["responses"]
        assert {"200", "404", "500", "default"} <= set(answers), path
        assert ("400" in answers) == (method == "POST")
        bodiless = path == "/ping" or path.endswith("/cancel")
        assert ("requestBody" in operation) == (method == "POST" and not bodiless)
    chat = document["paths"][CHAT]["post"]["responses"]["200"]["content"]
    assert set(chat) == {"application/json", "text/event-stream"}
    assert chat["text/event-stream"]["x-event-schema"]["$ref"].endswith("/ChatCompletionChunk")
    unwell = document["paths"]["/readyz"]["get"]["responses"]["503"]["content"]["application/json"]
    assert unwell["schema"]["$ref"].endswith("/Unhealthy")


def test_an_unwell_server_answers_as_it_says(server: LiveServer) -> None:
    server.engine.draining = True
    answer = server.get("/readyz")
    assert (answer.status, msgspec.convert(answer.json, shapes.Unhealthy).status) == (503, "unavailable")


async def something(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Does something. And more
    than that."""


def test_a_route_without_a_row_is_described_by_its_handler() -> None:
    made = describe([("/new", "POST", something)], version="1", needs_key=True, root_path="")
    operation = made["paths"]["/new"]["post"]
    assert operation["summary"] == "Does something"
    assert operation["security"] == [{"bearer": []}]
    assert "requestBody" in operation


# ---- keys ----


def test_which_operations_need_a_key(tokenizer: Tokenizer, says: Any, document: Any) -> None:
    assert not any(operation["security"] for operation in operations(document).values())
    with running(tokenizer, says(REPLY), api_key=("k",), root_path="/llm/") as locked:
        assert locked.get("/docs").status == 200
        made = locked.get("/llm/openapi.json").json
        assert made["servers"] == [{"url": "/llm"}]
        assert made["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        for (path, method), operation in operations(made).items():
            status = locked.request(method, path.replace("{name}", "tiny")).status
            assert (
                (status == 401)
                == (operation["security"] == [{"bearer": []}])
                == ("401" in operation["responses"])
            )
        assert made["paths"]["/v1/models"]["get"]["security"]


# ---- the page ----


def test_the_page_loads_nothing_from_elsewhere(full: LiveServer) -> None:
    answer = full.get("/docs")
    page = answer.body.decode()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "//" not in re.sub(r"<!--.*?-->", "", page)  # no URL with a host, no protocol-relative one
    assert not re.search(r"\b(src|href|action)\s*=\s*[\"']", page)
    assert "innerHTML" not in page
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self';")
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(sha256(body.encode()).digest()).decode() in policy
    assert "unsafe" not in policy


def test_the_document_is_made_once_and_only_when_asked_for(full: LiveServer) -> None:
    assert full.get("/openapi.json").body == full.get("/openapi.json/").body
    assert json.dumps(full.get("/openapi.json").json)


# ---- /tokenizer_info ----


def test_tokenizer_info(tokenizer: Tokenizer, says: Any) -> None:
    rust = tokenizer._rust
    token = {"content": "<|eos|>", "lstrip": False, "special": True, "__type": "AddedToken"}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "vocab_file": "/home/me/vocab.json",
        "merges_file": "/home/me/merges.txt",
        "model_max_length": 256,
        "bos_token": None,
        "eos_token": token,
        "extra": ["a", token],
        "added_tokens_decoder": {"258": token},
    }
    own = Tokenizer(rust, chat_templates=tokenizer.chat_templates, config=config)
    with running(own, says(REPLY), enable_tokenizer_info_endpoint=True, api_key=("k",)) as server:
        assert server.get("/tokenizer_info").status == 401
        info = server.request("GET", "/tokenizer_info", headers={"Authorization": "Bearer k"}).json
    assert info == {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 256,
        "bos_token": None,
        "eos_token": "<|eos|>",
        "extra": ["a", "<|eos|>"],
        "added_tokens_decoder": {"258": "<|eos|>"},
        "chat_template": tokenizer.chat_templates["default"],
    }


def test_tokenizer_info_without_a_configuration(full: LiveServer, tokenizer: Tokenizer) -> None:
    assert full.get("/tokenizer_info").json == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.chat_templates["default"],
    }


def test_types_of_requests_are_the_protocols(schemas: Any) -> None:
    assert issubclass(protocol.ChatRequest, protocol.Body)
    for known in OPERATIONS.values():
        for shape in known.takes:
            assert issubclass(shape, protocol.Body)
            assert schemas[shape.__name__]["title"] == shape.__name__
