"""Every family's published format, in golden files; and that the borders of deltas do not matter."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.parsers.families import REASONING_PARSERS, TOOL_PARSERS
from penstock.text.parsers.message import MessageParser
from penstock.text.parsers.pieces import Arguments, CallBegin, CallEnd, Message, Piece, Text, Thought
from penstock.text.parsers.tools import Tool

GOLDEN = Path(__file__).parent / "golden"
TYPED = Tool(
    "typed",
    {
        "type": "object",
        "properties": {
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "flag": {"type": "boolean"},
            "options": {"type": "object"},
            "items": {"type": "array"},
            "text": {"type": "string"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "float": {"type": "float"},
            "number": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "object": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        },
    },
)
CITY = {"type": "object", "properties": {name: {"type": "string"} for name in ("city", "state", "unit")}}
FILE = {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}}
TOOLS = (Tool("get_weather", CITY), Tool("write_file", FILE), TYPED)
CASES = [
    pytest.param(path.stem, case, id=f"{path.stem}-{case['case'].replace(' ', '_')}")
    for path in sorted(GOLDEN.glob("*.yaml"))
    for case in yaml.safe_load(path.read_text(encoding="utf-8"))
]


def parse(family: str, deltas: list[str], *, thinks: bool = False, **options: Any) -> list[Piece]:
    ids = iter(range(1000))
    if family == "openai":  # it reads thoughts, too
        options["thinking"] = thinks
    tools = TOOL_PARSERS[family](TOOLS, ids=lambda: f"id{next(ids)}", **options)
    reasoning = REASONING_PARSERS["qwen3"](interrupts=tools.marks) if thinks and family != "openai" else None
    parser = MessageParser(reasoning, tools)
    pieces = [piece for delta in deltas for piece in parser.push(delta)]
    return pieces + parser.finish()


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(borders)]


def together(pieces: list[Piece]) -> list[Any]:
    """The pieces with neighbours of a kind joined: what does not depend on the borders."""
    joined: list[Any] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, CallBegin | CallEnd) or type(last) is not type(piece):
            joined.append(piece)
        elif isinstance(piece, Arguments):
            joined[-1] = Arguments(piece.index, last.text + piece.text)
        else:
            joined[-1] = type(piece)(last.text + piece.text)
    return joined


HEADERS = re.compile(
    r"(<\|start\|>assistant)?<\|channel\|>(analysis|commentary|final)( to=[a-z.]+)?"
    r"( ?<\|constrain\|>)?( ?json| code)?<\|message\|>"
    r"|<\|(end|return|call)\|>|\s"
)


def said(family: str, pieces: list[Piece]) -> list[Any]:
    """All that is said; of gpt-oss, but for what stands around messages."""
    if family != "openai":
        return together(pieces)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Text | Thought))
    return [HEADERS.sub("", text)]


def check_whole(pieces: list[Piece]) -> None:
    """Calls begin and end once, in order, one at a time; their arguments are objects."""
    open_call: int | None = None
    begun = 0
    texts: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, CallBegin):
            assert open_call is None
            assert piece.index == begun
            open_call, begun = piece.index, begun + 1
            texts[piece.index] = ""
        elif isinstance(piece, Arguments):
            assert piece.index == open_call
            assert piece.text
            texts[piece.index] += piece.text
        elif isinstance(piece, CallEnd):
            assert piece.index == open_call
            assert isinstance(json.loads(texts[piece.index]), dict)
            open_call = None
        else:
            assert piece.text
            assert open_call is None
    assert open_call is None


@pytest.mark.parametrize(("family", "case"), CASES)
def test_golden(family: str, case: dict[str, Any]) -> None:
    text = case["text"]
    whole = parse(family, [text])
    message = Message.of(whole)
    assert message.content == case.get("content", "")
    assert message.reasoning == case.get("reasoning", "")
    assert [[call.name, json.loads(call.arguments)] for call in message.calls] == case.get("calls", [])
    check_whole(whole)
    assert together(parse(family, list(text))) == together(whole)
    for place in range(len(text)):
        assert together(parse(family, [text[:place], text[place:]])) == together(whole)


@pytest.mark.parametrize("family", sorted({path.stem for path in GOLDEN.glob("*.yaml")}))
def test_the_first_call_is_all_that_a_single_one_gives(family: str) -> None:
    for case in yaml.safe_load((GOLDEN / f"{family}.yaml").read_text(encoding="utf-8")):
        calls = case.get("calls", [])
        for deltas in ([case["text"]], list(case["text"])):
            found = Message.of(parse(family, deltas, single=True)).calls
            assert [[call.name, json.loads(call.arguments)] for call in found] == calls[:1]


#: What texts are put together from: marks, whole calls and their parts.
PARTS: dict[str, list[str]] = {
    family: sorted(
        {
            *TOOL_PARSERS[family].all_marks(),
            *(case["text"] for case in yaml.safe_load((GOLDEN / f"{family}.yaml").read_text("utf-8"))),
            *(
                '{"name": "f", "arguments": ',
                '{"a": "',
                "{",
                "}",
                "[",
                "]",
                '"',
                "\\",
                "\n",
                " ",
                ";",
                ", ",
                "f(",
            ),
            *("get_weather", "```json\n", "1", "é", "text", "<think>", "</think>", "<", "to=f"),
        }
    )
    for family in (path.stem for path in GOLDEN.glob("*.yaml"))
}


@pytest.mark.parametrize("family", sorted(PARTS))
@pytest.mark.parametrize("thinks", [False, True])
def test_any_borders_give_the_same_message(family: str, thinks: bool) -> None:
    parts = st.lists(st.sampled_from(PARTS[family]), max_size=8)

    @given(texts=parts, places=st.lists(st.integers(0, 2000), max_size=12), single=st.booleans())
    @settings(derandomize=True, max_examples=60, deadline=None, database=None)
    def check(texts: list[str], places: list[int], single: bool) -> None:
        text = "".join(texts)
        whole = parse(family, [text], thinks=thinks, single=single)
        assert together(parse(family, cut(text, places), thinks=thinks, single=single)) == together(whole)
        assert together(parse(family, list(text), thinks=thinks, single=single)) == together(whole)
        check_whole(whole)
        if not thinks and not any(isinstance(piece, CallBegin) for piece in whole):  # nothing is lost
            assert said(family, whole) == said(family, [Text(text)] if text else [])

    check()


@pytest.mark.parametrize(
    ("family", "text", "name", "arguments"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": "x y", "b": [1, 2]}}\n</tool_call>',
            "f",
            3,
        ),
        ("llama3_json", '{"name": "f", "parameters": {"a": "x y", "b": [1, 2]}}', "f", 3),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "x y", "b": [1, 2]}', "f", 3),
        (
            "openai",
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
            '{"a": "x y", "b": [1, 2]}<|call|>',
            "f",
            3,
        ),
        (
            "deepseek_v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
            '{"a": "x y", "b": [1, 2]}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "f",
            3,
        ),
    ],
)
def test_calls_that_a_grammar_wrote_come_as_they_are_written(
    family: str, text: str, name: str, arguments: int
) -> None:
    """The name once and before all of the call is there, then fragments; cut off anywhere, what there is."""
    pieces = parse(family, list(text), trusted=True)
    check_whole(pieces)
    assert [piece.name for piece in pieces if isinstance(piece, CallBegin)] == [name]
    fragments = [piece.text for piece in pieces if isinstance(piece, Arguments)]
    assert len(fragments) > arguments
    assert "".join(fragments) == '{"a": "x y", "b": [1, 2]}'
    held = parse(family, [text])
    assert together(pieces) == together(held)
    first = text.index('{"a"')
    for end in range(len(text)):
        part = Message.of(parse(family, cut(text[:end], [3, 7, 31]), trusted=True))
        if part.calls:
            assert part.content == ""
            assert part.calls[0].arguments == '{"a": "x y", "b": [1, 2]}'[: max(0, end - first)]
        else:
            assert part.content == text[:end]


@pytest.mark.parametrize("family", sorted(TOOL_PARSERS))
def test_ids_are_one_for_each_call(family: str) -> None:
    ids = {TOOL_PARSERS[family].new_id() for _ in range(100)}
    assert len(ids) == 100
    if family == "mistral":
        assert all(len(each) == 9 and each.isalnum() for each in ids)
