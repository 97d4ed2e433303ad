"""What an answer has in it and what it has not, and in how many pieces it goes out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server import answer
from penstock.server.answer import _Outbox
from penstock.server.generation import Choice, Prompt
from penstock.server.logprobs import CompletionLogprobs, chat_logprobs
from penstock.text.chat_template import ChatTemplate
from penstock.text.output import DecodedLogprob
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import MODEL, REPLY

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]

# ---- pieces ----


@pytest.mark.parametrize("size", [1, 1000, answer._TOGETHER, 3 * answer._TOGETHER])
def test_a_long_answer_goes_out_in_pieces_of_a_bounded_size(size: int) -> None:
    pieces = iter([bytes([number]) * size for number in range(10)])
    sent = []
    while body := answer._next(pieces):
        sent.append(body)
    assert b"".join(sent) == b"".join(bytes([number]) * size for number in range(10))
    assert all(len(body) < answer._TOGETHER + size for body in sent)
    assert all(len(body) >= answer._TOGETHER for body in sent[:-1])


class Written:
    """A stream that names what it is given."""

    interval = 3

    def opening(self, choice: Choice) -> bytes:
        return b"o"

    def chunks(self, choice: Choice) -> bytes:
        return b"%d" % len(choice.pending.token_ids)

    def ending(self, generation: object) -> bytes:
        return b""

    def error(self, error: Exception) -> bytes:
        return b""


def entry(alternatives: int) -> DecodedLogprob:
    plain = DecodedLogprob(1, "a", 1, -0.5, 2)
    return DecodedLogprob(1, "a", 1, -0.5, 2, top=(plain,) * alternatives)


@pytest.mark.parametrize("alternatives", [0, 20])
def test_a_prompts_logprobs_weigh_in_with_the_first_tokens_only(alternatives: int) -> None:
    """What is written down for a chunk decides whether a thread does it."""
    outbox = _Outbox(Written(), tells_tokens=False)
    choice = Choice(0, "r:0", Prompt(tuple(range(1000)), "", 9), processor=None)
    choice.pending.token_ids.append(1)
    choice.pending.logprobs.append(entry(alternatives))
    assert outbox.size == 0
    outbox.add(choice)
    assert outbox.size == 1001 * (2 + alternatives)
    assert outbox.take() == b"o1"
    assert (outbox.size, outbox.take()) == (0, b"")
    for token in range(3):
        choice.pending.token_ids.append(token)
        choice.pending.logprobs.append(entry(alternatives))
        outbox.add(choice)
        assert outbox.size == (3 * (2 + alternatives) if token == 2 else 0)  # due with the third of them
    assert outbox.take() == b"3"


def test_tokens_without_logprobs_weigh_one_each() -> None:
    outbox = _Outbox(Written(), tells_tokens=False)
    for index in range(4):
        choice = Choice(index, f"r:{index}", Prompt(tuple(range(1000)), "", 9), processor=None)
        choice.pending.token_ids += [1, 2]
        outbox.add(choice)
    assert outbox.size == 8
    assert outbox.take() == b"o2" * 4


def test_who_wants_them_is_told_the_tokens_before_each_chunk_of_them() -> None:
    """Also where their text is held back; not where there is nothing but an opening, before which stand the
    prompt's counts."""
    outbox = _Outbox(Written(), tells_tokens=True)
    choice = Choice(0, "r:0", Prompt((1,), "", 9), processor=None)
    outbox.add(choice)
    assert outbox.take() == b": prompt 1 0\no"
    choice.pending.token_ids += [7]
    outbox.add(choice)
    assert outbox.take() == b": tokens 7\n1"
    choice.pending.token_ids += [8, 9, 10]
    outbox.add(choice)
    assert outbox.take() == b": tokens 8,9,10\n3"
    choice.pending.finish_reason = "length"
    outbox.add(choice)
    assert outbox.take() == b": tokens \n0"


# ---- chat ----


def test_the_first_chunk_has_of_the_prompt_what_was_asked_for(server: LiveServer) -> None:
    own = {"id", "object", "created", "model", "system_fingerprint", "choices"}
    for fields, more in (
        ({}, set()),
        ({"return_prompt_text": True}, {"prompt_text"}),
        ({"return_token_ids": True}, {"prompt_token_ids"}),
        ({"return_token_ids": True, "return_prompt_text": True}, {"prompt_token_ids", "prompt_text"}),
    ):
        first, *others = server.events(CHAT, {"messages": HI, **fields})
        assert set(first) == own | more
        assert all(set(event) == own for event in others)
        whole = server.post(CHAT, {"messages": HI, **fields}).json
        assert ("prompt_text" in whole) == ("prompt_text" in more)
        assert (whole["prompt_token_ids"] is not None) == ("prompt_token_ids" in more)


def test_documents_and_effort_reach_the_template(tokenizer: Tokenizer, says: Any) -> None:
    text = "{% for d in documents or [] %}<{{ d.title }}>{% endfor %}{{ reasoning_effort | default('-') }}"
    body = {"messages": HI, "documents": [{"title": "a"}, {"title": "b"}], "reasoning_effort": "high"}
    with running(tokenizer, says(REPLY), template=ChatTemplate({"default": text})) as server:
        server.post(CHAT, body)
        server.post(CHAT, {"messages": HI})
        prompts = [tokenizer.decode(add.prompt) for add in server.engine.adds]
    assert prompts == ["<a><b>high", "-"]


@pytest.mark.parametrize(("limit", "fine", "wrong"), [(3, [0, 3], [-2, -1, 4]), (-1, [-1, 0, 30], [-2])])
def test_alternatives_within_the_servers_limit(
    tokenizer: Tokenizer, says: Any, limit: int, fine: list[int], wrong: list[int]
) -> None:
    body = {"messages": HI, "logprobs": True, "max_tokens": 1}
    with running(tokenizer, says(REPLY), max_logprobs=limit) as server:
        for top in fine:
            assert server.post(CHAT, {**body, "top_logprobs": top}).status == 200, top
        for top in wrong:
            error = server.post(CHAT, {**body, "top_logprobs": top}).error
            assert error["param"] == "top_logprobs"
            assert error["message"].startswith(f"top_logprobs must be between 0 and {limit}, got {top}.")
            assert error["message"].endswith("set by --max-logprobs.")


def test_alternatives_without_logprobs_are_refused_whatever_their_number(server: LiveServer) -> None:
    for top in (-1, 1):
        assert server.post(CHAT, {"messages": HI, "top_logprobs": top}).error["param"] == "top_logprobs"


@pytest.mark.parametrize(
    ("role", "echo", "shown"),
    [("assistant", True, "Well, "), ("assistant", False, ""), ("user", True, "")],
)
def test_only_a_last_message_of_the_models_own_is_echoed(
    server: LiveServer, role: str, echo: bool, shown: str
) -> None:
    body = {"messages": [*HI, {"role": role, "content": "Well, "}], "echo": echo}
    message = server.post(CHAT, body).json["choices"][0]["message"]
    assert message["content"] == shown + REPLY
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in server.events(CHAT, body))
    assert text == shown + REPLY


def test_a_request_has_a_cache_of_its_own_only_where_it_says_so(server: LiveServer) -> None:
    server.post(CHAT, {"messages": HI})
    server.post(CHAT, {"messages": HI, "cache_salt": "tenant"})
    assert [add.spec.cache_salt for add in server.engine.adds] == ["", "tenant"]


# ---- completions ----


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_prompt_that_is_not_echoed_are_not_asked_for(server: LiveServer, stream: bool) -> None:
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({"logprobs": 2}, None),
        ({"logprobs": 2, "echo": True}, 2),
        ({"echo": True}, None),
    ]
    if not stream:
        cases += [({"logprobs": 2, "echo": True, "prompt_logprobs": 0}, 0), ({"prompt_logprobs": 3}, 3)]
    for fields, wanted in cases:
        server.engine.adds.clear()
        assert server.post(TEXT, {"prompt": "ab", "max_tokens": 1, "stream": stream, **fields}).status == 200
        assert [add.prompt_logprobs for add in server.engine.adds] == [wanted], fields


def test_token_ids_beyond_the_context_pass_where_they_are_cut(server: LiveServer) -> None:
    room = server.engine.info.max_model_len
    body = {"prompt": list(range(64)) * 10, "max_tokens": 1}
    refused = server.post(TEXT, body).error
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "prompt")
    assert server.post(TEXT, {**body, "truncate_prompt_tokens": 5}).status == 200
    assert server.engine.adds[0].prompt == (59, 60, 61, 62, 63)
    # and that is known before the ids are looked at
    outside = server.post(TEXT, {"prompt": [10**6] * (room + 1)}).error
    assert (outside["code"], outside["param"]) == ("context_length_exceeded", "prompt")


def test_who_asks_for_too_much_is_told_which_field(server: LiveServer) -> None:
    error = server.post(TEXT, {"prompt": "a" * 10, "max_tokens": 300}).error
    assert error["param"] == "max_tokens"
    assert error["message"].endswith("Shorten the prompt, or set max_tokens to at most 246.")


def test_every_kind_of_logprobs_has_a_place_of_its_own(server: LiveServer) -> None:
    choice = server.post(TEXT, {"prompt": "ab", "max_tokens": 1, "prompt_logprobs": 0, "echo": True}).json[
        "choices"
    ][0]
    assert choice["logprobs"] is None
    assert len(choice["prompt_logprobs"]) == 2


# ---- health, models ----


def test_no_proxy_remembers_that_a_server_was_down(server: LiveServer) -> None:
    server.engine.stuck = "no step for 60 s"
    answered = server.get("/livez")
    assert (answered.status, answered.headers["cache-control"]) == (503, "no-store")
    server.engine.stuck = ""
    assert server.get("/livez").status == 200


def test_a_served_name_is_the_only_one_there_is(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), served_model_name=()) as server:
        [card] = server.get("/v1/models").json["data"]
        assert card["id"] == card["root"] == server.engine.info.path
        assert server.post(CHAT, {"model": MODEL, "messages": HI}).status == 404
        assert server.post(CHAT, {"model": card["id"], "messages": HI}).json["model"] == card["id"]
        assert 'model_name="/models/tiny"' in server.get("/metrics").body.decode()


def test_a_model_is_described_as_vllm_describes_it(server: LiveServer) -> None:
    card = server.get(f"/v1/models/{MODEL}").json
    assert card.pop("created") > 1_700_000_000
    assert card == {
        "id": MODEL,
        "object": "model",
        "owned_by": "penstock",
        "root": server.engine.info.path,
        "parent": None,
        "max_model_len": server.engine.info.max_model_len,
        "permission": [],
    }


# ---- logprobs ----


@given(top=st.integers(-1, 6), alternatives=st.integers(0, 5), as_ids=st.booleans())
def test_as_many_alternatives_are_told_as_were_asked_for(top: int, alternatives: int, as_ids: bool) -> None:
    entry = DecodedLogprob(
        9, "é", 1, -3.0, 7, top=[DecodedLogprob(i, f"t{i}", 2, -0.5 * i, i + 1) for i in range(alternatives)]
    )
    told = alternatives if top < 0 else min(top, alternatives)
    names = [f"token_id:{i}" if as_ids else f"t{i}" for i in range(told)]
    own = "token_id:9" if as_ids else "é"

    [chat] = msgspec.json.decode(msgspec.json.encode(chat_logprobs([entry], top, as_ids=as_ids)))["content"]
    assert (chat["token"], chat["logprob"], chat["bytes"]) == (own, -3.0, [0xC3, 0xA9])
    assert [other["token"] for other in chat["top_logprobs"]] == names
    assert [other["logprob"] for other in chat["top_logprobs"]] == [-0.5 * i for i in range(told)]

    pieces = CompletionLogprobs(top, as_ids=as_ids)
    for offset in (0, 1):  # the second one goes on where the first one ended
        piece = msgspec.json.decode(msgspec.json.encode(pieces.piece([entry])))
        assert (piece["tokens"], piece["token_logprobs"], piece["text_offset"]) == ([own], [-3.0], [offset])
        assert piece["top_logprobs"] == [{own: -3.0} | {name: -0.5 * i for i, name in enumerate(names)}]


# ---- tokenize ----


def test_tokens_of_messages_are_those_that_the_model_gets(tokenizer: Tokenizer, says: Any) -> None:
    """Also with a template that wants their content in parts."""
    text = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"
    with running(tokenizer, says(REPLY), template=ChatTemplate({"default": text})) as server:
        told = server.post("/tokenize", {"messages": HI}).json
        server.post(CHAT, {"messages": HI})
        assert told["tokens"] == list(server.engine.adds[0].prompt) == tokenizer.encode("[Hi]")
    assert told == {
        "count": 4,
        "max_model_len": server.engine.info.max_model_len,
        "tokens": told["tokens"],
        "token_strs": None,
    }
