"""Thoughts, as the families mark them, and prompts that say how an answer begins."""

from __future__ import annotations

import pytest

from penstock.text.parsers.families import REASONING_PARSERS
from penstock.text.parsers.harmony import Harmony
from penstock.text.parsers.message import MessageParser
from penstock.text.parsers.pieces import Message, Text, Thought

NAMES = sorted(name for name, family in REASONING_PARSERS.items() if family.together is None)

#: What follows the prompt → thought and answer: vLLM 0.32's of qwen3, for all of these but the last.
ANSWERS = {
    "<think>a</think>b": ("a", "b"),
    "a</think>b": ("a", "b"),
    "<think>a": ("a", ""),
    "Hello": ("Hello", ""),
    "<think>\na\n</think>\n\nb": ("\na\n", "\n\nb"),
    "<think>\n\n</think>\n\nhi": ("\n\n", "\n\nhi"),
    "a </think> b </think> <think> c": ("a ", " b </think> <think> c"),
    "a < b </thin x</think>": ("a < b </thin x", ""),
    "a</thi": ("a</thi", ""),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ANSWERS)
def test_thought_and_answer(name: str, text: str) -> None:
    for step in (1, 2, 3, 5, len(text)):
        parser = MessageParser(REASONING_PARSERS[name]())
        pieces = []
        for start in range(0, len(text), step):
            pieces += parser.push(text[start : start + step])
        pieces += parser.finish()
        message = Message.of(pieces)
        assert (message.reasoning, message.content) == ANSWERS[text]
        kinds = [type(piece) for piece in pieces]
        assert kinds == sorted(kinds, key=[Thought, Text].index)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_thought_all_is_text(name: str) -> None:
    parser = MessageParser(REASONING_PARSERS[name](thinking=False))
    assert Message.of(parser.push("a <think> b </think>") + parser.finish()).content == "a <think> b </think>"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("prompt", "enabled", "continued", "thinking"),
    [
        ("<|im_start|>assistant\n", True, False, True),
        ("<|im_start|>assistant\n", False, False, False),
        ("<|im_start|>assistant\n<think>\n", True, False, True),
        ("<|im_start|>assistant\n<think>\n", False, False, True),  # the template has the last word
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", True, False, False),
        ("assistant <think>a</think> b user c assistant", True, False, True),  # an earlier thought
        ("user: what is </think> and <think>?\nassistant\n", False, False, False),
        ("assistant\n<think>so far", True, True, True),
        ("assistant\n<think>done</think>so far", True, True, False),
        ("assistant\nso far", True, True, False),
    ],
)
def test_what_a_prompt_says(name: str, prompt: str, enabled: bool, continued: bool, thinking: bool) -> None:
    assert REASONING_PARSERS[name].begins_thinking(prompt, enabled, continued) is thinking


def test_a_call_ends_the_thought_of_models_that_call_from_it() -> None:
    mark = ("<tool_call>",)
    text = "I need it.<tool_call>x"
    assert REASONING_PARSERS["qwen3"](interrupts=mark).push(text) == [
        Thought("I need it."),
        Text("<tool_call>x"),
    ]
    assert REASONING_PARSERS["deepseek_r1"](interrupts=mark).push(text) == [Thought(text)]


@pytest.mark.parametrize(
    ("prompt", "continued", "thinking"),
    [
        ("<|start|>user<|message|>hi<|end|><|start|>assistant", False, False),
        ("<|start|>assistant<|channel|>analysis<|message|>", False, True),
        ("<|start|>assistant<|channel|>analysis<|message|>so far", True, True),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>so far",
            True,
            False,
        ),
        (
            "<|start|>user<|message|>what is <|channel|>analysis<|message|>?<|end|><|start|>assistant",
            True,
            False,
        ),
        ("so far", True, False),
    ],
)
def test_what_a_prompt_of_channels_says(prompt: str, continued: bool, thinking: bool) -> None:
    assert REASONING_PARSERS["openai_gptoss"].begins_thinking(prompt, True, continued) is thinking


def test_calls_stay_text_where_nothing_may_be_called() -> None:
    text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    parser = Harmony(calling=False)
    message = Message.of(parser.push(f"<|channel|>analysis<|message|>a<|end|><|start|>assistant{text}"))
    assert (message.reasoning, message.content) == ("a", f"<|start|>assistant{text}")


def test_a_parser_of_channels_says_whether_it_thinks() -> None:
    parser = MessageParser(tools=Harmony())
    seen = []
    for token in ("<|channel|>", "analysis", "<|message|>", "a", "<|end|>", "<|start|>", "assistant"):
        parser.push(token)
        seen.append(parser.thinking)
    assert seen == [False, False, True, True, False, False, False]
