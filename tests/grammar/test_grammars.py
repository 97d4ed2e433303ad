"""Kinds of grammars, structural tags, what begins after a thought, and the bounds of the cache."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.core.errors import InvalidRequest, StartupError
from penstock.core.structured import Grammar, GrammarKind, StructuredOutputsParams
from penstock.grammar import cache
from penstock.grammar.cache import Grammars
from penstock.grammar.compiler import Compiler
from penstock.grammar.prepare import prepare
from penstock.grammar.vocabulary import Vocabulary
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary

from .conftest import Judge

Make = Callable[..., Judge]

ARGUMENTS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CALL = {
    "type": "tag",
    "begin": "<call:f>",
    "content": {"type": "json_schema", "json_schema": ARGUMENTS},
    "end": "</call>",
}
DATE = {"type": "string", "format": "date"}
WRITTEN = '<call:f>{"a": 1}</call>'
OLDER = {"structures": [{"begin": "<call:f>", "schema": ARGUMENTS, "end": "</call>"}], "triggers": ["<call:"]}


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"regex": r"[a-z]+/\d{2}"}, ["a/12", "xyz/00"], ["a/1", "a/123", "1/12"]),
        ({"regex": "^a$"}, ["a"], ["^a$", "aa"]),
        ({"choice": ["yes", "yesterday", 'q"\n']}, ["yes", "yesterday", 'q"\n'], ["yest", "no"]),
        ({"grammar": 'root ::= n ("+" n)*\nn ::= [0-9]+'}, ["1", "12+3"], ["+", "1+"]),
        ({"grammar": 'start: N ("+" N)*\nN: /[0-9]+/'}, ["1", "12+3"], ["+", "1+"]),
        ({"json_object": True}, ["{}", '{"a": [1]}'], ["[]", "1"]),
        ({"json": json.dumps(ARGUMENTS)}, ['{"a": 1}', '{\n  "a": 1\n}'], ["{}", '{"a":     1}']),
        ({"json": ARGUMENTS, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json": ARGUMENTS, "whitespace_pattern": "_?"}, ['{"a":_1}'], ['{"a": 1}']),
        (
            {"json": {"properties": {"a": {}}}, "disable_additional_properties": True},
            ['{"a": 1}'],
            ['{"b": 1}'],
        ),
        (
            {"structural_tag": OLDER},
            ["hello", WRITTEN, f"so {WRITTEN} and {WRITTEN}."],
            ["<call:g>", "<call:f>1"],
        ),
        ({"structural_tag": json.dumps(OLDER)}, [WRITTEN], ["<call:f>[]</call>"]),
    ],
)
def test_kinds(judge: Make, asked: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    judged = judge(**asked)
    for text in right:
        assert judged.takes(text), text
    for text in wrong:
        assert not judged.takes(text), text


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


@pytest.mark.parametrize(
    ("tag", "right", "wrong"),
    [
        ({"type": "sequence", "elements": [text("a"), text("b")]}, ["ab"], ["a", "b"]),
        ({"type": "or", "elements": [text("a"), {"type": "regex", "pattern": "b+"}]}, ["a", "bb"], ["ab"]),
        ({"type": "optional", "content": text("a")}, ["", "a"], ["aa"]),
        ({"type": "star", "content": text("a")}, ["", "aa"], ["b"]),
        ({"type": "plus", "content": text("a")}, ["a", "aa"], [""]),
        ({"type": "repeat", "min": 2, "max": 3, "content": text("a")}, ["aa", "aaa"], ["a", "aaaa"]),
        ({"type": "grammar", "grammar": 'root ::= "x" | "y"'}, ["x"], ["xy"]),
        ({"type": "any_text"}, ["", "anything\n at all"], []),
        ({"type": "any_text", "excludes": ["bad", "<x>"]}, ["", "a ba\nd<x"], ["a bad one", "<x>"]),
        (
            {"type": "tag", "begin": "<r>", "content": {"type": "any_text"}, "end": ["</r>", "</s>"]},
            ["<r></r>", "<r>why\n not</s>"],
            ["<r>why", "<r></r>b</r>"],
        ),
        (
            {
                "type": "tag",
                "begin": "<r>",
                "content": {"type": "any_text", "excludes": ["not"]},
                "end": "</r>",
            },
            ["<r>why no</r>"],
            ["<r>why not</r>"],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<call:"], "tags": [CALL], "excludes": ["<think>"]},
            ["so", f"so {WRITTEN} then"],
            ["<think>", f"<think>{WRITTEN}", f"{WRITTEN}<think>"],
        ),
        ({**CALL, "end": ["</call>", "."]}, [WRITTEN, '<call:f>{"a": 1}.'], ["<call:f>", '<call:f>{"a": 1}']),
        ({"type": "sequence", "elements": [text("a"), {"type": "any_text"}]}, ["a", "a b"], ["b"]),
        (
            {"type": "triggered_tags", "triggers": ["<call:"], "tags": [CALL], "at_least_one": True},
            [WRITTEN, f"so {WRITTEN} then {WRITTEN}!"],
            ["", "so", "<call:g>"],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<call:"], "tags": [CALL], "stop_after_first": True},
            ["so", f"so {WRITTEN}"],
            [f"{WRITTEN} then"],
        ),
        (
            {"type": "tags_with_separator", "tags": [CALL], "separator": "\n", "at_least_one": True},
            [WRITTEN, f"{WRITTEN}\n{WRITTEN}"],
            ["", "so", f"{WRITTEN} "],
        ),
        (
            {"type": "tags_with_separator", "tags": [CALL], "separator": ",", "stop_after_first": True},
            ["", WRITTEN],
            [f"{WRITTEN},{WRITTEN}"],
        ),
    ],
)
def test_structural_tags(judge: Make, tag: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    judged = judge(structural_tag={"format": tag})
    for each in right:
        assert judged.takes(each), each
    for each in wrong:
        assert not judged.takes(each), each


@pytest.mark.parametrize(
    ("tag", "param"),
    [
        ({}, "structural_tag.type"),
        ({"type": "json"}, "structural_tag.type"),
        ({"format": {"type": "tag", "content": text("a"), "end": ""}}, "structural_tag.format.begin"),
        ({"format": {"type": "or", "elements": []}}, "structural_tag.format.elements"),
        ({"format": {"type": "any_text", "excludes": [""]}}, "structural_tag.format.excludes"),
        ({"format": {"type": "any_text", "max_tokens": -1}}, "structural_tag.format.max_tokens"),
        ({"format": {"type": "any_text", "max_tokens": True}}, "structural_tag.format.max_tokens"),
        ({"format": {"type": "any_text", "max_chars": 1e3}}, "structural_tag.format.max_chars"),
        ({"format": {"type": "json_schema", "style": "glm_xml"}}, "structural_tag.format.style"),
        ({"format": {"type": "json_schema", "any_order": True}}, "structural_tag.format.any_order"),
        (
            {"format": {"type": "json_schema", "style": "qwen_xml", "json_schema": {"type": "array"}}},
            "structural_tag.format.json_schema",
        ),
        (
            {"format": {"type": "qwen_xml_parameter", "json_schema": {"properties": {"on": DATE}}}},
            "structural_tag.format.json_schema.properties.on.format",
        ),
        (
            {"format": {"type": "repeat", "min": 3, "max": 2, "content": text("a")}},
            "structural_tag.format.min",
        ),
        (
            {"format": {"type": "json_schema", "json_schema": {"not": {}}}},
            "structural_tag.format.json_schema.not",
        ),
        ({"structures": {}, "triggers": []}, "structural_tag.structures"),
        ({"structures": OLDER["structures"], "triggers": ["<tool"]}, "structural_tag.tags.0.begin"),
        ({"structures": OLDER["structures"], "triggers": []}, "structural_tag.triggers"),
    ],
)
def test_wrong_structural_tags_are_named(tag: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(StructuredOutputsParams(structural_tag=tag))
    assert caught.value.param == f"structured_outputs.{param}"


@pytest.mark.parametrize("end", ["</think>", "<|im_start|>", "\n\n"])
def test_a_grammar_begins_after_the_thought(judge: Make, end: str) -> None:
    judged = judge(json=ARGUMENTS, after=end)
    assert judged.takes('I think {"b": it is</thin 1.' + end + '{"a": 1}')
    assert not judged.takes("I think." + end + "well")
    assert not judged.takes('{"a": 1}')  # nothing ends before the thought does
    assert not judged.takes("I think.")


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "exactly one"),
        ({"json": 3}, "JSON schema"),
        ({"json": "{"}, "no JSON"),
        ({"json": "3"}, "JSON schema"),
        ({"regex": 3}, "regular expression"),
        ({"regex": " "}, "empty"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"regex": "a" * (1 << 20 | 1)}, "characters"),
        ({"choice": []}, "not empty"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": [str(i) for i in range(20_001)]}, "20000 choices"),
        ({"json_object": False}, "must be true"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "contradict"),
        ({"json": {}, "strict": "yes"}, "true or false"),
        ({"structural_tag": "{"}, "no JSON"),
    ],
)
def test_what_is_no_grammar(asked: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        prepare(StructuredOutputsParams(**asked))


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": r"\bfoo\b"}, "lookarounds"),
        ({"grammar": "root ::= x"}, "'x' not found"),
        ({"grammar": "root = "}, "cannot be compiled"),
        ({"json": {}, "whitespace_pattern": "("}, "cannot be compiled"),
    ],
)
def test_what_cannot_be_compiled(judge: Make, asked: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        judge(**asked).takes("aa")


@pytest.mark.parametrize("asked", [{"regex": "(?=a)b"}, {"json": {"type": "string", "pattern": "a{2"}}])
def test_a_refusal_shows_nothing_that_the_client_has_not_sent(judge: Make, asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        judge(**asked).takes("aa")
    assert "start:" not in refused.value.message
    assert "%llguidance" not in refused.value.message
    assert " at 3(" not in refused.value.message


def test_a_model_without_an_end_has_no_grammars(demo: Tokenizer) -> None:
    without = Compiler(vocabulary(demo, demo.vocab_size, ()))
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        without.compile(Grammar(GrammarKind.REGEX, "a"))


def test_a_tokenizer_that_the_library_cannot_read() -> None:
    with pytest.raises(StartupError, match="not available"):
        Compiler(Vocabulary("{}", 1, (0,)))


def test_a_matcher_that_fails_says_so_and_allows_nothing(judge: Make, compiler: Compiler) -> None:
    matcher = judge(regex="ab").compiled.matcher()
    matcher.follow([5, 6, 7])
    masks = compiler.masks(1)
    masks[:] = -1
    matcher.fill(masks, 0)
    assert "the grammar of the output failed" in matcher.error
    assert not masks.any()
    assert not matcher.ended
    assert matcher.copy().error == matcher.error


def test_copies_go_their_own_ways(judge: Make, demo: Any) -> None:
    ids = demo.encode("ab", add_special_tokens=False)
    repeats = judge(regex="(ab)+")
    matcher = repeats.matcher("ab")
    assert matcher is not None
    other = matcher.copy()
    tokens = [9, 9, *ids, *ids]
    other.follow(tokens, prompt_len=2)
    assert (matcher.counted, other.counted) == (len(ids), 2 * len(ids))
    assert repeats.may_end(matcher)
    assert repeats.may_end(other)


def test_what_is_needed_stays_and_the_rest_is_bounded(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_KEPT", 3)
    grammars = Grammars(lambda: compiler)
    made = [Grammar(GrammarKind.REGEX, f"a{i}") for i in range(6)]
    needed = grammars.start(made[0]).result()
    for each in made[1:]:
        grammars.compile(each)
    gc.collect()
    assert [grammars.ready(each) is not None for each in made] == [True, False, False, False, True, True]
    assert grammars.compile(made[0]) is needed
    broken = grammars.matcher(Grammar(GrammarKind.REGEX, "("))
    assert "unclosed" in broken.error
    grammars.close()


def test_a_tag_for_each_argument(judge: Make) -> None:
    """Qwen's: in the order of the schema, texts without quotes."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    }
    city, days, unit = (
        f"<parameter={name}>\n{value}\n</parameter>\n"
        for name, value in (("city", "New\nYork"), ("days", "3"), ("unit", "f"))
    )
    for content in (
        {"type": "json_schema", "style": "qwen_xml", "json_schema": schema},
        {"type": "qwen_xml_parameter", "json_schema": schema},
    ):
        tag = {"type": "tag", "begin": "<function=f>\n", "content": content, "end": "</function>"}
        judged = judge(structural_tag={"format": tag})
        for right in (city, city + days, city + days + unit, city + unit):
            assert judged.takes(f"<function=f>\n{right}</function>"), right
        for wrong in ("", days, days + city, city.replace("city", "town"), city + days.replace("3", "three")):
            assert not judged.takes(f"<function=f>\n{wrong}</function>"), wrong


def test_free_text_has_so_many_tokens(judge: Make, demo: Tokenizer) -> None:
    text_of = [demo.decode(demo.encode("one two three four")[:count]) for count in range(5)]
    bounded = {"type": "any_text", "max_tokens": 3}
    for tag, end in (
        ({"type": "tag", "begin": "so:", "content": bounded, "end": "<|im_start|>"}, "<|im_start|>"),
        ({"type": "tag", "begin": "so:", "content": bounded, "end": ["", "<|im_start|>"]}, ""),
    ):
        judged = judge(structural_tag=tag)
        assert [judged.takes(f"so:{each}{end}") for each in text_of] == [True, True, True, True, False]
    with pytest.raises(InvalidRequest, match="max_tokens needs an end that is a token"):
        judge(structural_tag={"type": "tag", "begin": "", "content": bounded, "end": "END"})
    none = judge(structural_tag={"type": "sequence", "elements": [{**bounded, "max_tokens": 0}, text("a")]})
    assert [none.takes(each) for each in ("a", "ba")] == [True, False]


@pytest.mark.parametrize("end", ["END", "<|im_start|>"])
def test_free_text_has_so_many_characters(judge: Make, end: str) -> None:
    content = {"type": "any_text", "max_chars": 4, "excludes": ["no"]}
    judged = judge(structural_tag={"type": "tag", "begin": "<", "content": content, "end": end})
    for right in ("", "a", "abcd", "a\nb", "éàü!", "1EN"):
        assert judged.takes(f"<{right}{end}"), right
    for wrong in ("abcde", "éàü!!", "no", "a no"):
        assert not judged.takes(f"<{wrong}{end}"), wrong
    both = {**content, "max_chars": 9, "max_tokens": 1}
    judged = judge(structural_tag={"type": "tag", "begin": "<", "content": both, "end": "<|im_start|>"})
    assert [judged.takes(f"<{each}<|im_start|>") for each in ("a", "a b c d e")] == [True, False]


def test_as_often_as_it_likes(judge: Make) -> None:
    judged = judge(structural_tag={"type": "repeat", "min": 2, "max": -1, "content": text("ab")})
    assert [judged.takes("ab" * times) for times in (1, 2, 30)] == [False, True, True]
