"""Chat templates that never end, or take all memory, for a model or for a request: stopped, and only they.

Templates are programs of the model's author, or of a client where the operator allows it; messages are the
client's. What a template does in jinja2 or in Python's C code cannot be interrupted from within: these run in
the pool's processes, with small limits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.text.chat_template import ChatTemplate
from penstock.text.template_pool import Limits, TemplateError, TemplatePool
from tests.attack.harness import error_of, post, withstands
from tests.e2e.server import Server, serving

LIMITS = Limits(seconds=1.0, characters=100_000)
HI = [{"role": "user", "content": "hi"}]

_LOOP = "{% for i in range(9999) %}"
_END = "{% endfor %}"
#: What a refusal says of a template that was stopped; on a busy machine the one comes before the other.
STOPPED = "stopped after|more than 256 MiB"
TOO_LONG = "more than 100,000 characters"
#: name → (template, what the refusal says).
BOMBS = {
    "nested loops": (_LOOP * 3 + _END * 3, "stopped after"),
    "a string of 1 GB": ("{{ messages[0].content * 500000000 }}", STOPPED),
    "a string of 10 GB, by constants": ("{{ ('a' * 10000000000) | length }}", STOPPED),
    "a power": ("{{ 9 ** (9 ** 9) }}", STOPPED),
    "output": (_LOOP + "{{ 'x' * 1000 }}" + _END, TOO_LONG),
    "a long text": ("{{ 'x' * 100001 }}", TOO_LONG),
    "a macro that calls itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "a range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "a list": ("{% set ns = namespace(x=[1]) %}" + _LOOP + "{% set ns.x = ns.x + ns.x %}" + _END, STOPPED),
    "a doubled string": (
        "{% set ns = namespace(x='ab') %}" + _LOOP + "{% set ns.x = ns.x ~ ns.x %}" + _END,
        STOPPED,
    ),
    "names": (
        "{% set ns = namespace(x=[]) %}" + _LOOP * 2 + "{% set ns.x = ns.x + [i] %}" + _END * 2,
        STOPPED,
    ),
    "replace": ("{{ ('a' * 100000) | replace('', 'b' * 100000) | length }}", STOPPED),
    "wordwrap": ("{{ ('a ' * 50000000) | wordwrap(1) | length }}", STOPPED),
    "truncate": ("{{ ('a ' * 500000000) | truncate(100000000) | length }}", STOPPED),
    "center": ("{{ 'a' | center(10 ** 10) | length }}", STOPPED),
    "format": ("{{ '%01000000000d' | format(1) | length }}", STOPPED),
    "indent": ("{{ messages | tojson(indent=10 ** 9) }}", STOPPED),
    "join": ("{{ (['a' * 1000] * 10000000) | join('b' * 1000) | length }}", STOPPED),
    "sort": ("{{ (range(99999) | list * 999) | sort | length }}", STOPPED),
    "batch": ("{{ range(99999) | batch(1000000000, 'x') | list | length }}", STOPPED),
    "lorem ipsum": ("{{ lipsum(n=100000) }}", f"{STOPPED}|{TOO_LONG}"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    "own words": ("{{ raise_exception('x' * 1000000) }}", "refuses these messages: x{100,500}$"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_requests_template_is_stopped(name: str) -> None:
    text, why = BOMBS[name]
    template = ChatTemplate({}, limits=LIMITS)
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=why) as caught:
        template.render(HI, chat_template=text)
    assert time.monotonic() - began < 5
    assert len(str(caught.value)) < 1000
    assert template.render(HI, chat_template="{{ messages[0].content }}") == "hi"  # others go on


@pytest.mark.parametrize("name", ["a power", "nesting"])
def test_a_models_template_is_stopped_while_it_is_compiled(name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"the model's chat template .*compile") as caught:
        ChatTemplate({"default": BOMBS[name][0]}, limits=LIMITS, source="the model's chat template")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["x" * (1 << 20) + "x", "{% if 1 %}" * 20_000, "{{ x }}" * 140_000])
def test_a_template_that_takes_long_to_compile(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(ModelLoadError):
        ChatTemplate({"default": text}, limits=LIMITS)
    assert time.monotonic() - began < 5


def test_deep_data_of_a_client() -> None:
    template = ChatTemplate({"default": "{{ tools | tojson }}{{ messages | string }}"}, limits=LIMITS)
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        template.render(HI, tools=[deep])
    for _ in range(100_000):  # or the interpreter would, recursively
        deep = deep["a"]
    for _ in range(500):
        deep = {"a": deep}
    assert template.render(HI, tools=[deep]).count("a") >= 500
    for _ in range(1000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest, match="RecursionError"):
        template.render(HI, tools=[deep])


def test_many_messages_are_stopped_or_served() -> None:
    template = ChatTemplate(
        {"default": "{% for m in messages %}{{ m.role }}{% endfor %}"}, limits=Limits(20.0)
    )
    assert len(template.render(HI * 100_000)) == 400_000


def test_the_process_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PENSTOCK_API_KEY", "secret")
    fresh = TemplatePool()
    try:
        assert fresh.run("ready", {}, LIMITS) == "ready"
        worker = fresh._free[0]
        environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
        assert b"secret" not in environment
    finally:
        fresh.close()


def test_a_worker_that_has_grown_is_replaced() -> None:
    fresh = TemplatePool()
    try:
        fresh.run("", {}, LIMITS)
        first = fresh._free[0]._process.pid
        fresh.run("", {}, LIMITS)
        assert fresh._free[0]._process.pid == first
        assert fresh.run("{{ (x * 20000000) | length }}", {"x": "abcd"}, Limits(5.0)) == "80000000"
        with pytest.raises(TemplateError):
            fresh.run("{{ (x * 1000000000) | length }}", {"x": "a"}, LIMITS)
        assert fresh.run("ok", {}, LIMITS) == "ok"
        assert fresh._free[0]._process.pid != first
        assert len(fresh._free) == 1
    finally:
        fresh.close()


def test_a_worker_that_was_killed_while_idle_costs_one_answer() -> None:
    fresh = TemplatePool()
    try:
        fresh.run("", {}, LIMITS)
        fresh._free[0]._process.kill()
        fresh._free[0]._process.wait()
        assert fresh.run("ok", {}, LIMITS) == "ok"
    finally:
        fresh.close()


def test_an_orphan_ends_by_itself() -> None:
    fresh = TemplatePool()
    fresh.run("", {}, LIMITS)
    (worker,) = fresh._free
    worker._socket.close()  # as if the server had been killed
    assert worker._process.wait(10) == 0


def test_the_event_loop_goes_on() -> None:
    """While templates run, and while others wait for theirs, and whoever waits too long is sent away."""
    template = ChatTemplate({}, limits=LIMITS)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def run() -> list[Any]:
        clock = asyncio.create_task(tick())
        bombs = [template.render_async(HI, chat_template=BOMBS["nested loops"][0]) for _ in range(3)]
        answers = await asyncio.gather(*bombs, return_exceptions=True)
        clock.cancel()
        return answers

    answers = asyncio.run(run())
    assert all(isinstance(answer, InvalidRequest) for answer in answers)
    assert ticks > 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("demo", "--trust-request-chat-template", "--chat-template-timeout", "1")
    with serving(*flags, log=tmp_path_factory.mktemp("log") / "log") as running:
        chat(running, "{{ messages[0].content }}")
        yield running


def chat(server: Server, template: str | None = None) -> tuple[int, bytes]:
    body: dict[str, Any] = {"messages": HI, "max_tokens": 1}
    return post(server, "/v1/chat/completions", body | ({"chat_template": template} if template else {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nested loops", "a string of 1 GB", "output", "replace", "indent", "own words"]
)
def test_a_server_under_such_templates(server: Server, name: str) -> None:
    def attack() -> None:
        error = error_of(chat(server, BOMBS[name][0]))
        assert error["type"] == "invalid_request_error"
        assert error["param"] in ("chat_template", "messages")

    withstands(server, attack)
    assert chat(server)[0] == 200
