"""Hooks refuse, rewrite and tag; and what happens when they fail."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.gateway.hooks import Hooks
from penstock.gateway.records import Principal
from penstock.spec.model import Hook

from .conftest import BODY, KEY, SPEC, STREAM, Make
from .upstream import TOKENS, Upstream, Wire

SEEN: list[dict[str, Any]] = []
STUCK = threading.Event()


async def masks(about: dict[str, Any]) -> dict[str, Any]:
    """Rewrites the prompt, tries to change the model, and tags."""
    SEEN.append(about)
    body = about["body"]
    body["messages"][0]["content"] = "***"
    return {"body": {**body, "model": "another", "stream": True}, "tags": {"pii": "yes", "feature": "x"}}


def refuses(about: dict[str, Any]) -> dict[str, Any]:
    """In a thread."""
    return {"refuse": "not with me"}


def rewrites(about: dict[str, Any]) -> dict[str, Any]:
    SEEN.append(about)
    return {"answer": {"said": "nothing"}} if "answer" in about else {"tags": {"looked": "back"}}


def raises(about: dict[str, Any]) -> None:
    raise ValueError("my secret")


def hangs(about: dict[str, Any]) -> None:
    STUCK.wait(20)


def babbles(about: dict[str, Any]) -> Any:
    return {"approve": True}


def spec_with(*hooks: str) -> str:
    lines = "".join(f"    - {{{{{hook}}}}}\n" for hook in hooks)
    return SPEC + f"gateway:\n  hooks:\n{lines}"


def python(name: str, when: str = "before", **more: Any) -> str:
    rest = "".join(f", {key}: {json.dumps(value)}" for key, value in more.items())
    return f'when: {when}, python: "{__name__}:{name}"{rest}'


def test_a_hook_rewrites_and_tags_before_anything_counts(make: Make) -> None:
    SEEN.clear()
    keys = {KEY: Principal(key_id="k1", tags={"feature": "own"})}
    gateway = make(spec=spec_with(python("masks")), keys=keys)
    response = gateway.post()
    assert response.headers["content-type"] == "application/json"
    (asked,) = gateway.upstream.asked
    assert asked.json["messages"] == [{"role": "user", "content": "***"}]
    assert (asked.json["model"], asked.json["stream"]) == ("tiny-1", False)
    row = gateway.row()
    assert row.tags == {"pii": "yes", "feature": "own"}
    assert "tags feature, pii" in row.note
    assert "rewrote the body" in row.note
    (about,) = SEEN
    assert (about["id"], about["route"], about["key_id"]) == (row.id, "small", "k1")


def test_a_hook_refuses_and_the_ledger_says_so(make: Make) -> None:
    gateway = make(spec=spec_with(python("refuses"), python("masks")))
    for body in (BODY, STREAM):
        response = gateway.post(body)
        assert (response.status, response.reason) == (403, "refused_by_hook")
        assert "not with me" in response.error["message"]
    assert not gateway.upstream.asked
    for row in gateway.rows(2):
        assert (row.status, row.end, row.attempts, row.dollars) == (403, "refused", 0, None)
        assert row.note.endswith("refuses: refused")
    assert not any(gateway.meter.used.values())


@pytest.mark.parametrize("name", ["raises", "hangs", "babbles"])
@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_hook_that_fails_lets_pass_or_not(make: Make, name: str, mode: str) -> None:
    STUCK.clear()
    gateway = make(spec=spec_with(python(name, on_failure=mode, timeout=0.2 if name == "hangs" else 20)))
    response = gateway.post()
    STUCK.set()
    assert response.status == (200 if mode == "open" else 503)
    assert b"secret" not in response.body
    assert f"{name}: failed" in gateway.row().note


def test_a_hook_rewrites_or_refuses_a_whole_answer_that_is_charged(make: Make) -> None:
    gateway = make(spec=spec_with(python("rewrites", "after")))
    assert gateway.post().json == {"said": "nothing"}
    row = gateway.row()
    assert (row.end, row.output_tokens) == ("done", len(TOKENS))
    gateway = make(spec=spec_with(python("refuses", "after")))
    assert gateway.post().status == 403
    row = gateway.row()
    assert (row.status, row.end, row.settlement, row.output_tokens) == (
        403,
        "refused",
        "settled",
        len(TOKENS),
    )
    assert row.dollars


def test_a_hook_sees_a_stream_afterwards_and_tags_its_row(make: Make) -> None:
    SEEN.clear()
    gateway = make(spec=spec_with(python("rewrites", "after"), python("refuses", "after")))
    response = gateway.post(STREAM)
    assert response.body.endswith(b"data: [DONE]\n\n")
    row = gateway.row()
    assert (row.tags, row.end) == ({"looked": "back"}, "done")
    (about,) = SEEN
    assert about["events"] == response.body.decode()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["key", "tag of a hook"])
def test_a_hook_outside_of_the_house_is_not_told_of_what_must_not_leave(
    make: Make, when: str, how: str
) -> None:
    async def nods(wire: Wire) -> None:
        await wire.whole(200, {})

    server = Upstream(default=nods).start()
    try:
        keys = {KEY: Principal(key_id="k1", local_only=how == "key")}
        tags = "" if how == "key" else "tags:\n  looked: {{back: {{local_only: true}}}}\n"
        for local, status in ((False, 503), (True, 200)):
            hook = f'when: {when}, url: "{server.url}/check", local: {json.dumps(local)}'
            spec = spec_with(python("rewrites"), hook) + tags
            response = make(spec=spec, keys=keys).post()
            assert (response.status, len(server.asked)) == (status, int(local)), response.body
    finally:
        server.stop()


def test_a_hook_behind_http(make: Make) -> None:
    async def judge(wire: Wire) -> None:
        wanted = wire.asked.json["body"]["messages"][0]["content"]
        await wire.whole(200, {"refuse": "no"} if wanted == "bad" else {})

    server = Upstream(default=judge).start()
    try:
        hook = f'when: before, url: "{server.url}/check", routes: [small]'
        gateway = make(spec=spec_with(hook))
        assert gateway.post().status == 200
        bad = {**BODY, "messages": [{"role": "user", "content": "bad"}]}
        assert gateway.post(bad).status == 403
        assert [each.path for each in server.asked] == ["/check"] * 2
        server.stop()
        assert gateway.post().status == 503
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["no.such.module:f", f"{__name__}:nothing", f"{__name__}:SEEN"])
def test_a_callable_that_is_none_is_said_at_the_start(name: str) -> None:
    with pytest.raises(StartupError):
        Hooks([Hook(when="before", python=name)])
