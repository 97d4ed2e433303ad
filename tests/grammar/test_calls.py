"""Grammars of calls, on vocabularies with each family's own tokens: whatever they let a model write is read
as calls of the tools, with arguments that their schemas allow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken

import penstock.assets
from penstock.core.structured import StructuredOutputsParams
from penstock.grammar.compiler import Compiled, Compiler
from penstock.grammar.prepare import prepare
from penstock.text.parsers.families import REASONING_PARSERS, TOOL_PARSERS
from penstock.text.parsers.forms import Form, arguments_schema, calls, not_held, text_and_calls
from penstock.text.parsers.pieces import Message
from penstock.text.parsers.tools import Tool
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary

DEMO = Path(str(penstock.assets.__file__)).parent / "demo"
EOS = 2
DEEPSEEK = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
CHANNELS = ("start", "channel", "message", "constrain", "end", "call", "return")
#: Family → its tokens, as published tokenizers have them: (text, whether it is special).
TOKENS: dict[str, dict[str, bool]] = {
    "hermes": {"<tool_call>": False, "</tool_call>": False, "<think>": False, "</think>": False},
    "qwen3_coder": {"<tool_call>": False, "</tool_call>": False, "<think>": False, "</think>": False},
    "llama3_json": {"<|python_tag|>": True, "<|eom_id|>": True},
    "pythonic": {"<|python_start|>": True, "<|python_end|>": True},
    "mistral": {"[TOOL_CALLS]": True, "[AVAILABLE_TOOLS]": True},
    "mistral, version 13": {"[TOOL_CALLS]": True, "[ARGS]": True, "[CALL_ID]": True},
    "deepseek_v3": {f"<｜tool▁{each}｜>": True for each in DEEPSEEK},
    "openai": {f"<|{each}|>": True for each in CHANNELS},
    "deepseek_v31": {f"<｜tool▁{each}｜>": False for each in DEEPSEEK},
}
KIND = {"type": "string", "enum": ["wet", "dry"]}
TOOLS = (
    Tool(
        "typed",
        {
            "type": "object",
            "properties": {
                "count": {"type": "integer", "minimum": 1, "maximum": 99},
                "flag": {"type": "boolean"},
                "kind": {"$ref": "#/$defs/kind"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "either": {"type": ["string", "null"]},
                "three": {"const": "three"},
                "mixed": {"enum": ["one", 2, None]},
                "inner": {"type": "object", "properties": {"kind": {"$ref": "#/$defs/kind"}}},
                "kinds": {"type": "array", "items": {"$ref": "#/$defs/kind"}, "maxItems": 3},
                "any": {"description": "what you like"},
            },
            "required": ["count", "kind", "maybe", "mixed"],
            "$defs": {"kind": KIND},
        },
    ),
    Tool("none"),
    Tool("text.one", {"properties": {"text": {"type": "string", "maxLength": 9}}, "required": ["text"]}),
)
HARMONY = TOOL_PARSERS["openai"].form_for(lambda _: True) or Form("", "")
SCHEMAS = {tool.name: arguments_schema(tool.parameters) for tool in TOOLS}
CLOSING = ('"', "}", '"}', "]", "\n</parameter>\n", "1", "<|im_end|>")


def tokenizer_with(tokens: Mapping[str, bool]) -> Tokenizer:
    """The demo model's vocabulary, and these."""
    rust = Tokenizer.from_directory(DEMO)._rust
    for text, special in tokens.items():
        rust.add_tokens([AddedToken(text, special=special, normalized=False)])
    return Tokenizer(rust, special_tokens={"eos_token": "<|im_end|>"})


class Writer:
    """A model that knows nothing: it writes what a grammar lets it, and likes to come to an end."""

    def __init__(self, tokens: Mapping[str, bool]) -> None:
        self.tokenizer = tokenizer_with(tokens)
        self.compiler = Compiler(vocabulary(self.tokenizer, self.tokenizer.vocab_size, (EOS,)))
        self._closing = [self.tokenizer.encode(text) for text in CLOSING]

    def form(self, family: str) -> tuple[str, Form]:
        """(the parser's name, how calls are written with this vocabulary)"""

        def has_token(text: str) -> bool:
            return self.tokenizer.token_id(text) is not None

        form = TOOL_PARSERS[family].form_for(has_token)
        if form is None:
            family = "llama3_json"
            form = TOOL_PARSERS[family].form_for(has_token)
        assert form is not None
        return family, form

    def write(self, tag: Mapping[str, Any], seed: int, most: int = 400, wish: str = "") -> str | None:
        """A text, with a token in it that is written where it may be, now and then; None where it does not
        end within so many tokens."""
        wished = self.tokenizer.token_id(wish)
        asked = StructuredOutputsParams(structural_tag={"format": tag}, strict=False, whitespace_pattern=" ?")
        matcher = self.compiler.compile(prepare(asked)[0], steps=2).matcher()
        masks, draw = self.compiler.masks(1), random.Random(seed)
        output: list[int] = []
        planned: list[int] = []
        while len(output) < most:
            matcher.fill(masks, 0)
            assert not matcher.error
            allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()
            if not planned or planned[0] not in allowed:
                fitting = [ids for ids in self._closing if ids[0] in allowed]
                planned = list(draw.choice(fitting)) if fitting and draw.random() < 0.7 else []
            if wished in allowed and wished not in output and draw.random() < 0.3:
                planned = [wished]
            output.append(planned.pop(0) if planned else draw.choice(allowed))
            if output[-1] == EOS:
                return self.tokenizer.decode(output[:-1], skip_special_tokens=False)
            matcher.follow(output)
        return None


def read(family: str, text: str, **options: Any) -> Message:
    parser = TOOL_PARSERS[family](TOOLS, **options)
    return Message.of([*parser.push(text), *parser.finish()])


def check(message: Message) -> None:
    for call in message.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.fixture(scope="module", params=sorted(TOKENS))
def writer(request: pytest.FixtureRequest) -> tuple[str, Writer]:
    return request.param.split(",")[0], Writer(TOKENS[request.param])


@pytest.mark.parametrize("single", [False, True])
def test_what_must_be_called_is_called(writer: tuple[str, Writer], single: bool) -> None:
    name, model = writer
    family, form = model.form(name)
    written = [model.write(calls(form, SCHEMAS, single), seed) for seed in range(3)]
    ended = [text for text in written if text is not None]
    assert ended
    for text in ended:
        whole = read(family, text)
        assert whole.calls, text
        assert not whole.content, text
        check(whole)
        assert len(whole.calls) == 1 or not single
        streamed = read(family, text, trusted=True)
        assert [(each.name, json.loads(each.arguments)) for each in streamed.calls] == [
            (each.name, json.loads(each.arguments)) for each in whole.calls
        ], text


#: As the templates of the families have it in their histories: what their models have learnt to write.
LEARNT = {
    "hermes": '<tool_call>\n{"name": "look", "arguments": {"at": "New\\nYork", "days": 3}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=look>\n<parameter=at>\nNew\nYork </p>\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "look", "parameters": {"at": "New York", "days": 3}}',
    "mistral": '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "New York", "days": 3}}]',
    "mistral, version 13": '[TOOL_CALLS]look[ARGS]{"at": "New York", "days": 3}',
    "openai": "<|channel|>commentary to=functions.look <|constrain|>json<|message|>"
    '{"at":"New York","days":3}',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
    '{"at": "New York", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>"
    '{"at": "New York", "days": 3}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}


@pytest.mark.parametrize("family", sorted(LEARNT))
@pytest.mark.parametrize(
    "text", [{"type": "string"}, {"type": "string", "maxLength": 14}, {"type": ["string", "null"]}]
)
def test_a_grammar_takes_what_models_have_learnt(family: str, text: dict[str, Any]) -> None:
    model = Writer(TOKENS[family])
    _, form = model.form(family.split(",")[0])
    schema = {"properties": {"at": text, "days": {"type": "integer"}}, "required": ["at", "days"]}
    tag = calls(form, {"look": arguments_schema(schema)}, False)
    asked = StructuredOutputsParams(structural_tag={"format": tag}, strict=False, whitespace_pattern=" ?")
    takes = taking(model.compiler, model.tokenizer, model.compiler.compile(prepare(asked)[0]))
    assert takes(LEARNT[family])
    assert not takes(LEARNT[family].replace("3", '"three"'))


def test_calls_within_text(writer: tuple[str, Writer]) -> None:
    name, model = writer
    family, form = model.form(name)
    called = 0
    for seed in range(4):
        text = model.write(text_and_calls(form, SCHEMAS, False), seed, most=200, wish=form.trigger)
        if text is not None:
            message = read(family, text)
            check(message)
            called += len(message.calls)
    # no token leads there, only texts
    assert called or name in ("llama3_json", "pythonic", "openai")


def taking(compiler: Compiler, tokenizer: Tokenizer, compiled: Compiled) -> Callable[[str], bool]:
    """Whether a text matches, token by token, and may end there."""

    def takes(text: str) -> bool:
        matcher, ids = compiled.matcher(), tokenizer.encode(text, add_special_tokens=False)
        masks = compiler.masks(1)
        for count, token in enumerate(ids, start=1):
            matcher.fill(masks, 0)
            if not masks[0, token >> 5] >> (token & 31) & 1:
                return False
            matcher.follow(ids[:count])
        matcher.fill(masks, 0)
        return bool(masks[0, EOS >> 5] >> (EOS & 31) & 1)

    return takes


@pytest.mark.parametrize("special", [False, True])
def test_a_thought_is_free_and_ends_with_its_token(special: bool) -> None:
    """Qwen's marks of a thought are added tokens that are not special; a model begins with the first one."""
    marks = {"<think>": special, "</think>": special, "<tool_call>": False}
    tokenizer = tokenizer_with(marks)
    compiler = Compiler(vocabulary(tokenizer, tokenizer.vocab_size, (EOS,)))
    asked = StructuredOutputsParams(json={"type": "integer"}, after="</think>")
    takes = taking(compiler, tokenizer, compiler.compile(prepare(asked)[0]))
    assert takes("a thought</think>12")
    assert takes("<think>a</think>12") is not special
    assert takes("a <tool_call>{}</think>12")
    assert not takes("a</think>b</think>12")
    assert not takes("a</think>")
    assert not takes("<think>12")


ANALYSIS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL, CONSTRAINED = "<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>"
ASIDE = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.none <|constrain|>json<|message|>{}"


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("header", "outputs", "right", "wrong"),
    [
        ("said_json", {"json": {"type": "integer"}}, f"{CONSTRAINED}12", f"{FINAL}12"),
        ("said", {"choice": ["a", "b"]}, f"{FINAL}b", f"{FINAL}c"),
        ("said", {"regex": "[ab]+"}, f"{FINAL}abba", "abba"),
        ("", {"structural_tag": {"format": calls(HARMONY, SCHEMAS, True)}}, CALL, f"{FINAL}no"),
        ("", {"structural_tag": {"format": text_and_calls(HARMONY, SCHEMAS, True)}}, f"{FINAL}no", "no"),
        ("", {"structural_tag": {"format": text_and_calls(HARMONY, SCHEMAS, True)}}, f"{ASIDE}{CALL}", ASIDE),
        ("", {"structural_tag": {"format": calls(HARMONY, SCHEMAS, True)}}, CALL, f"{ASIDE}{CALL}"),
    ],
)
def test_an_answer_stands_in_its_channel(
    thinking: bool, header: Any, outputs: dict[str, Any], right: str, wrong: str
) -> None:
    """As vLLM admits answers of gpt-oss, but for texts before calls that have to come."""
    model = Writer(TOKENS["openai"])
    opening = REASONING_PARSERS["openai_gptoss"].opening(thinking, header)
    asked = StructuredOutputsParams(**outputs, before=opening, whitespace_pattern=" ?")
    takes = taking(model.compiler, model.tokenizer, model.compiler.compile(prepare(asked)[0]))
    begun = "hm<|end|><|start|>assistant" if thinking else ""
    assert takes(f"{begun}{right}")
    assert takes(f"{begun}{ANALYSIS}{right}")
    assert takes(f"{begun}{ANALYSIS}{ANALYSIS}{right}")
    assert takes(right) is not thinking
    assert not takes(f"{begun}{wrong}")
    assert not takes(f"{begun}{ANALYSIS}{wrong}")
    assert not takes(f"{begun}{ANALYSIS}")


def test_the_tokens_that_end_calls_end_their_grammars() -> None:
    """`<|call|>` and `<|return|>` are ends of sequence of gpt-oss; no form has them in it."""
    tokenizer = tokenizer_with(TOKENS["openai"])
    ends = [tokenizer.token_id(text) for text in ("<|call|>", "<|return|>")]
    found = [end for end in ends if end is not None]
    compiler = Compiler(vocabulary(tokenizer, tokenizer.vocab_size, tuple(found)))
    tag = {"format": calls(HARMONY, SCHEMAS, True)}
    asked = StructuredOutputsParams(structural_tag=tag, whitespace_pattern=" ?", strict=False)
    matcher = compiler.compile(prepare(asked)[0]).matcher()
    ids, masks = tokenizer.encode(CALL, add_special_tokens=False), compiler.masks(1)
    allowed = []
    for count in (len(ids) - 1, len(ids)):
        matcher.follow(ids[:count])
        matcher.fill(masks, 0)
        allowed.append([bool(masks[0, end >> 5] >> (end & 31) & 1) for end in found])
    assert allowed == [[False, False], [True, True]]


def test_what_texts_without_quotes_are_not_held_to() -> None:
    form = TOOL_PARSERS["qwen3_coder"].form
    hermes = TOOL_PARSERS["hermes"].form
    assert form is not None
    assert hermes is not None
    dated = arguments_schema({"properties": {"on": {"anyOf": [{"type": "string", "format": "date"}]}}})
    short = arguments_schema({"properties": {"on": {"type": "string", "maxLength": 3}}})
    assert not_held(form, dated) == "properties.on.format"
    assert not_held(hermes, dated) is None
    assert not_held(form, short) is None
    assert not_held(form, arguments_schema({"properties": {"on": {"type": "array", "items": KIND}}})) is None
