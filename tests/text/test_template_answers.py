"""Chat templates that fail: who is at fault, what is said, and which field is named; and their borders."""

from __future__ import annotations

import asyncio
import enum
from collections import UserDict
from pathlib import Path

import pytest

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.text.chat_template import TEMPLATE_BYTES, ChatTemplate, read_override
from penstock.text.template_pool import Limits

HI = [{"role": "user", "content": "hi"}]
BRIEF = Limits(seconds=30.0, characters=1000)
HASTY = Limits(seconds=0.5, characters=1000)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set ns = namespace(x='x' * 1000) %}{% for i in range(99) %}{% set ns.x = ns.x * 9 %}{% endfor %}"


def refused(template: str, *, own: bool, **arguments: object) -> InvalidRequest:
    """Why a template fails that is the model's, or the request's own."""
    chat = ChatTemplate(
        {"default": "plain" if own else template},
        source="the model's template",
        limits=HASTY if template is ENDLESS else BRIEF,
    )
    with pytest.raises(InvalidRequest) as caught:
        chat.render(HI, **({"chat_template": template} if own else {}), **arguments)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, "{} was stopped after 0.5 s on these messages."),
        (
            "{% for i in range(1001) %}x{% endfor %}",
            "{} makes more than 1,000 characters of these messages, which no context of this server holds.",
        ),
        (HUGE, "{} takes more than 256 MiB on these messages."),
    ],
)
def test_a_limit_is_told_by_its_name_to_whose_template_it_was(template: str, said: str) -> None:
    theirs, ours = refused(template, own=True), refused(template, own=False)
    assert theirs.message == said.format("the request's chat_template")
    assert theirs.param == "chat_template"
    assert ours.message == said.format("the model's template")
    assert ours.param == "messages"
    timed = template is ENDLESS
    assert theirs.advice == ("The server's limit is set by --chat-template-timeout." if timed else "")


def test_an_output_may_be_as_long_as_its_limit() -> None:
    chat = ChatTemplate({"default": "{% for i in range(1000) %}x{% endfor %}"}, limits=BRIEF)
    assert chat.render(HI) == "x" * 1000


@pytest.mark.parametrize("own", [False, True])
def test_a_refusal_and_a_fault_are_the_messages(own: bool) -> None:
    error = refused("{{ raise_exception('roles must alternate') }}", own=own)
    assert (error.message, error.param) == (
        "the chat template refuses these messages: roles must alternate",
        "messages",
    )
    error = refused("{{ messages[0].content.nothing() }}", own=own)
    assert error.message.startswith("the chat template fails on these messages: UndefinedError: ")
    assert error.param == "messages"


def test_a_syntax_error_is_told_with_its_line() -> None:
    error = refused("one\n{% if %}", own=True)
    assert error.message.startswith("chat_template has a syntax error in line 2: ")
    assert error.param == "chat_template"
    with pytest.raises(ModelLoadError, match="the template of x has a syntax error in line 3") as caught:
        ChatTemplate({"default": "\n\n{% if %}"}, source="the template of x")
    assert caught.value.param == "chat_template"
    assert caught.value.advice == "Correct it, or give another one with --chat-template."
    with pytest.raises(ModelLoadError, match=r"^the templates 'rag' has a syntax error in line 1"):
        ChatTemplate({"rag": "{% if %}"}, source="the templates")


def test_a_template_that_cannot_be_compiled_is_told_at_start() -> None:
    """Constants are folded: this one by a filter that takes its time."""
    with pytest.raises(ModelLoadError, match=r"the template of x is not compiled after 0\.5 s\.") as caught:
        ChatTemplate(
            {"default": "{{ ('x' * 10 ** 8) | wordwrap(1) }}"}, source="the template of x", limits=HASTY
        )
    assert caught.value.param == "chat_template"


def test_the_longest_template() -> None:
    most = "{# " + "x" * (TEMPLATE_BYTES - 6) + " #}"
    assert len(most) == TEMPLATE_BYTES
    assert ChatTemplate({"default": most}).render(HI) == ""
    with pytest.raises(ModelLoadError, match=f"has {TEMPLATE_BYTES + 1:,} characters; at most") as caught:
        ChatTemplate({"default": most + "x"})
    assert caught.value.param == "chat_template"


def test_the_output_is_bounded_by_the_context() -> None:
    assert Limits.for_context(2.0, 100_000) == Limits(2.0, 6_400_000)
    assert Limits.for_context(2.0, 100) == Limits(2.0, 1 << 20)
    chat = ChatTemplate({"default": "{% for i in range(2000) %}x{% endfor %}"}, limits=BRIEF)
    assert len(chat.for_context(10).render(HI)) == 2000
    with pytest.raises(InvalidRequest, match="1,000 characters"):
        chat.render(HI)


# ---------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("messages", "arguments", "param"),
    [
        ([], {}, "messages"),
        (HI, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        (HI, {"messages": []}, "chat_template_kwargs"),
        ([{"role": "user"}], {"add_generation_prompt": False, "continue_final_message": True}, None),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {"add_generation_prompt": False, "continue_final_message": True},
            None,
        ),
        (
            HI,
            {
                "add_generation_prompt": False,
                "continue_final_message": True,
                "chat_template": "{# content #}dropped",
            },
            None,
        ),
    ],
)
def test_the_field_at_fault_is_named(
    messages: list[dict[str, object]], arguments: dict[str, object], param: str | None
) -> None:
    chat = ChatTemplate({"default": "{{ messages[0].content }}"})
    with pytest.raises(InvalidRequest) as caught:
        chat.render(messages, **arguments)  # type: ignore[arg-type]
    assert caught.value.param == (param or "continue_final_message")


def test_messages_that_are_nested_too_deeply() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply") as caught:
        ChatTemplate({"default": "x"}).render([{"role": "user", "content": deep}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_by_any_name(name: str) -> None:
    chat = ChatTemplate({"default": "{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}"})
    assert chat.render([{"role": "assistant", "content": "x", name: "why"}]) == "why/why"
    both = {"reasoning_content": "first", "thinking": "second", "reasoning": "third"}
    assert chat.render([{"role": "assistant", **both}]) == "first/second"


def test_a_final_message_is_left_open() -> None:
    chat = ChatTemplate({"default": "{% for m in messages %}<{{ m.content }}>{% endfor %}"})
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    assert chat.render(said, add_generation_prompt=False) == "<a><b >"
    assert chat.render(said, add_generation_prompt=False, continue_final_message=True) == "<a><b "
    trims = ChatTemplate({"default": "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"})
    assert trims.render(said, add_generation_prompt=False, continue_final_message=True) == "<a><b"


def test_the_last_part_with_text_is_continued() -> None:
    chat = ChatTemplate({"default": "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"})
    assert chat.content_format == "openai"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    message = {"role": "assistant", "content": parts}
    said = chat.render([message], add_generation_prompt=False, continue_final_message=True)
    assert said == "[a][b"
    assert parts[1] == {"type": "text", "text": "b"}


class _Word(str):
    __slots__ = ()


class _Number(enum.IntEnum):
    ONE = 1


class _Fraction(float):
    pass


def test_values_of_other_classes_arrive_as_plain_ones() -> None:
    chat = ChatTemplate({"default": "{{ messages[0].content | tojson }}"})
    content = {
        "word": _Word("x"),
        "number": _Number.ONE,
        "fraction": _Fraction(0.5),
        "mapping": UserDict({"a": None}),
        "tuple": (True, None, 1, "y"),
        "other": object(),
    }
    assert chat.render([{"role": "user", "content": content}]) == (
        '{"word": "x", "number": 1, "fraction": 0.5, "mapping": {"a": null}, "tuple": [true, null, 1, "y"], '
        '"other": "<object>"}'
    )


# ---------------------------------------------------------------------------- which template


NAMED = {"default": "usual", "tool_use": "tools", "rag": "rag"}


def test_which_template_is_taken() -> None:
    chat = ChatTemplate(NAMED)
    assert chat.available
    assert chat.render(HI) == "usual"
    assert chat.render(HI, tools=[]) == "tools"
    assert chat.render(HI, chat_template="rag") == "rag"
    assert chat.render(HI, chat_template="own") == "own"
    assert ChatTemplate({"default": "usual"}).render(HI, tools=[]) == "usual"
    several = ChatTemplate({"b": "x", "a": "y"})
    with pytest.raises(InvalidRequest, match=r"several chat templates \(a, b\) and no default") as caught:
        several.render(HI)
    assert caught.value.param == "chat_template"
    assert caught.value.advice == "Start the server with --chat-template and the one to use."
    with pytest.raises(InvalidRequest, match="has no chat template") as caught:
        ChatTemplate({}).render(HI)
    assert caught.value.param == "messages"
    assert "--chat-template FILE" in caught.value.advice
    assert not ChatTemplate({}).available


def test_the_content_format_is_that_of_the_usual_template() -> None:
    loops = "{% for part in messages[0].content %}{% endfor %}"
    assert ChatTemplate({"rag": loops, "default": "x"}).content_format == "string"
    assert ChatTemplate({"rag": "x", "default": loops}).content_format == "openai"
    assert ChatTemplate({"rag": loops}).content_format == "openai"
    assert ChatTemplate({}).content_format == "string"
    others = "{% for part in messages[0]['tool_calls'] %}{% endfor %}{% for m in messages %}{% endfor %}"
    assert ChatTemplate({"default": others}).content_format == "string"


def test_a_namespace_may_begin_with_any_keys_but_private_ones() -> None:
    assert ChatTemplate({"default": "{% set ns = namespace({1: 2}, a=3) %}{{ ns.a }}"}).render(HI) == "3"
    with pytest.raises(InvalidRequest, match="private name '_a'"):
        ChatTemplate({"default": "{% set ns = namespace(_a=3) %}"}).render(HI)


def test_what_an_override_may_be(tmp_path: Path) -> None:
    for text in ("{{ messages }}", "one\ntwo", "{% x"):
        assert read_override(text) == text
    file = tmp_path / "template.jinja"
    file.write_text("{{ 1 }}")
    assert read_override(str(file)) == "{{ 1 }}"
    with pytest.raises(ModelLoadError, match=r"^--chat-template ") as caught:
        read_override("no-such-file")
    assert caught.value.param == "--chat-template"
    assert caught.value.advice == "Give the path of a jinja file, or a template that contains '{{' or '{%'."


def test_rendering_in_a_thread_is_the_same() -> None:
    chat = ChatTemplate({"default": "{{ messages[0].content }}{{ extra }}"})
    assert asyncio.run(chat.render_async(HI, extra="!")) == "hi!"
