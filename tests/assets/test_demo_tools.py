"""The demo model's tool FAQ: its chat template writes what the model was trained on."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from penstock.text.chat_template import ChatTemplate
from penstock.text.parsers.hermes import Hermes
from penstock.text.parsers.pieces import Message
from penstock.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "penstock" / "assets" / "demo"


@pytest.fixture(scope="module")
def tool_talk() -> Iterator[ModuleType]:
    """``tools/demo/tool_talk.py``, which is not part of the package."""
    sys.path.insert(0, str(ROOT / "tools" / "demo"))
    try:
        yield importlib.import_module("tool_talk")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def sampler(tool_talk: ModuleType) -> Any:
    corpus = sys.modules["corpus"]
    return tool_talk.ToolSampler(corpus.Sampler(corpus.load_faq(), seed=5))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.from_tokenizer(Tokenizer.from_directory(DEMO))


def tool(name: str, parameters: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in parameters}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_template_is_what_the_model_was_trained_on(
    template: ChatTemplate, tool_talk: ModuleType, sampler: Any, system: str | None
) -> None:
    tools = [tool(name, each["parameters"]) for name, each in sampler.tools.items()]
    line = "Tools: get_weather(city), add(a, b), search(query)"
    before = f"{system}\n\n" if system else ""
    head = f"<|im_start|>system\n{before}{line}<|im_end|>\n"
    for kind in sampler.tools:
        asked = sampler.exchange(kind)
        calls = [
            {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in asked.calls
        ]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": asked.question})
        first = f"{head}<|im_start|>user\n{asked.question}<|im_end|>\n<|im_start|>assistant\n"
        assert template.render(messages, tools=tools) == first
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": "c", "content": result} for result in asked.results]
        assert template.render(messages, tools=tools) == (
            f"{first}{tool_talk.calls_text(asked.calls)}<|im_end|>\n"
            f"<|im_start|>user\n{tool_talk.results_text(asked.results)}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_what_it_learns_to_write_is_what_the_parser_reads(tool_talk: ModuleType, sampler: Any) -> None:
    for kind in (*sampler.tools, *sampler.tools):
        asked = sampler.exchange(kind)
        parser = Hermes()
        message = Message.of([*parser.push(tool_talk.calls_text(asked.calls)), *parser.finish()])
        assert [(call.name, json.loads(call.arguments)) for call in message.calls] == list(asked.calls)
        assert message.content == ""
        assert all(str(value) in asked.question for _, values in asked.calls for value in values.values())


def test_held_out_questions_are_never_trained(tool_talk: ModuleType, sampler: Any) -> None:
    held_out = {name: each["questions"][-1] for name, each in sampler.tools.items()}
    trained = {text for each in sampler.tools.values() for text in each["questions"][:-1]}
    assert not trained & set(held_out.values())
