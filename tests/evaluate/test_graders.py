"""Each grader by itself, by properties, and against what is meant to break it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.evaluate.answer import Answer, Refusal
from penstock.evaluate.dataset import Example
from penstock.evaluate.graders.desk import Desk, Grade, GraderDown
from penstock.evaluate.graders.judge import question, read_grade
from penstock.evaluate.graders.spec import AnyGrader, Judge, read_flag, read_grader
from penstock.evaluate.graders.text import grade, normalise
from penstock.evaluate.graders.values import pick_number, read_number, same_json
from penstock.evaluate.graders.worker import verdict
from tests.evaluate.server import AnsweringServer


def score(what: Any, answer: str, *expected: Any) -> float:
    """By a grader that needs nobody else."""
    grader = read_grader(what)
    grader.check(expected)
    return grade(grader, answer, expected)[0]


# ---- texts ----


@given(st.text(), st.text())
def test_exact_is_equality(answer: str, expected: str) -> None:
    assert score("exact", answer, expected) == float(answer == expected)
    assert score("exact", answer, "something else entirely", answer) == 1.0


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("answer", "expected", "good"),
    [
        ("The cat.", "cat", True),
        ("  a  Cat!\n", "CAT", True),
        ("theory", "ory", False),
        ("ﬁne", "fine", True),
        ("STRASSE", "straße", True),
        ("3.14", "314", False),
        ("-5", "5", False),
        ("$-5", "$5", False),
        (".5", "5", False),
        ("It is 1,000.", "it is 1,000", True),
        ("it is 1,000", "it is 1000", False),
        ("don't", "dont", True),
        ("", "the", True),
    ],
)
def test_normalised(answer: str, expected: str, good: bool) -> None:
    assert score("normalised", answer, expected) == float(good)
    assert score("normalized", answer, "no", expected) == float(good)


@given(st.text(), st.text(), st.text())
def test_includes(before: str, part: str, after: str) -> None:
    assert score("includes", before + part + after, part) == 1.0


def test_includes_normalised_takes_whole_words() -> None:
    assert score({"type": "includes", "normalised": True}, "It is Paris, of course", "PARIS") == 1.0
    assert score({"type": "includes", "normalised": True}, "comparison", "paris") == 0.0


def test_regex() -> None:
    assert score({"type": "regex", "pattern": "^yes"}, "yes, it is") == 1.0
    assert score({"type": "regex", "pattern": "^yes"}, "Yes") == 0.0
    assert score({"type": "regex", "pattern": "^yes", "ignore_case": True}, "Yes") == 1.0
    assert score({"type": "regex", "pattern": "yes", "full": True}, "yes, it is") == 0.0
    assert score("regex", "42!", r"\d+!", "x") == 1.0


# ---- values ----


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30, places=6))
def test_a_number_in_a_sentence_is_found(number: Any) -> None:
    text = f"{number:f}"
    assert pick_number(f"The answer is {text}.", "last") == number
    assert pick_number(text, "only") == number
    assert score({"type": "numeric"}, f"so, {text} euros", text) == 1.0


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    assert (found := pick_number(text, "last")) is None or found.is_finite()
    assert (read := read_number(text)) is None or read.is_finite()


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("1,234.5", "1234.5"),
        ("−3", "-3"),
        ("from 3 to 5", "5"),
        ("10-7", "7"),
        ("6.02e23", "6.02e23"),
        ("v1.2.3", None),
        ("x2", None),
        ("no", None),
        ("1e99999", "1"),
        ("about 5%.", "5"),
    ],
)
def test_numbers_in_answers(answer: str, number: str | None) -> None:
    found = pick_number(answer, "last")
    assert (None if found is None else found == read_number(number)) == (None if number is None else True)


def test_tolerances_are_exact_at_the_border() -> None:
    assert score({"type": "numeric", "absolute": 0.1}, "1.1", 1) == 1.0
    assert score({"type": "numeric", "absolute": 0.1}, "1.1000000000000000001", 1) == 0.0
    assert score({"type": "numeric", "relative": 0.01}, "-101", -100) == 1.0
    assert score({"type": "numeric", "relative": 0.01}, "-101.1", -100) == 0.0
    assert score({"type": "numeric", "pick": "first"}, "4, not 5", 4) == 1.0
    assert score({"type": "numeric", "pick": "only"}, "it is 4", 4) == 0.0
    assert score({"type": "numeric"}, "seven", 7) == 0.0


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "n": {"$ref": "#/$defs/count"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ('{"city": "Bern"}', True),
        ('{"city": "Bern", "n": 3}', True),
        ('{"city": "Bern", "n": -3}', False),
        ('{"n": 3}', False),
        ('{"city": "Bern", "x": 1}', False),
        ("Bern", False),
        ("", False),
        ("NaN", False),
        ('{"city": "Bern"} and more', False),
        ('```json\n{"city": "Bern"}\n```', False),
        ("[" * 100_000, False),
        ("9" * 10_000, False),
    ],
)
def test_json_schema(answer: str, good: bool) -> None:
    assert score({"type": "json_schema", "schema": SCHEMA}, answer) == float(good)


def test_json_in_a_fence_where_that_is_allowed() -> None:
    fenced = {"type": "json_schema", "schema": SCHEMA, "fenced": True}
    assert score(fenced, '```json\n{"city": "Bern"}\n```') == 1.0
    assert score(fenced, '{"city": "Bern"}') == 1.0
    assert score(fenced, "```\nBern\n```") == 0.0


def test_json_equal_to_what_is_expected() -> None:
    want = {"type": "json_schema", "schema": True}
    assert score(want, '{"b": [1.0, true], "a": null}', {"a": None, "b": [1, True]}) == 1.0
    assert score(want, '{"b": [true, true], "a": null}', {"a": None, "b": [1, True]}) == 0.0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON, _JSON)
def test_json_equality_is_that_of_what_is_written(left: Any, right: Any) -> None:
    assert same_json(left, json.loads(json.dumps(left)))
    assert same_json(left, right) == same_json(right, left)


# ---- what a set or a flag may say ----


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("exakt", "not known; choose from exact"),
        ({"pattern": "x"}, "a name or an object with its type"),
        ({"type": "regex", "patern": "x"}, "unknown field `patern`"),
        ({"type": "numeric", "absolute": "x"}, "the grader numeric"),
        (7, "a name or an object"),
    ],
)
def test_graders_that_are_none(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_grader(value)


@pytest.mark.parametrize(
    ("value", "expected", "words"),
    [
        ("exact", (), "needs a text"),
        ("exact", (4,), "needs a text"),
        ({"type": "regex", "pattern": "("}, (), "missing"),
        ({"type": "regex", "pattern": "x" * 30_000}, (), "20,000 characters"),
        ("regex", (), "needs a pattern"),
        ("numeric", ("four",), "needs a number"),
        ("numeric", (True,), "needs a number"),
        ({"type": "numeric", "relative": -1}, (1,), "from 0 on"),
        ({"type": "json_schema", "schema": {"type": "objekt"}}, (), "the schema is none"),
        ({"type": "judge", "scale": 0}, (), "from 1 to 100"),
        ({"type": "python", "function": "os.system"}, (), "module:name"),
        ({"type": "http", "url": "file:///etc/passwd"}, (), "write http"),
    ],
)
def test_graders_that_cannot_grade_this(value: Any, expected: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_grader(value).check(expected)


def test_flags(tmp_path: Any) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    (tmp_path / "r.txt").write_text("be kind")
    assert read_flag("regex:^a:b").pattern == "^a:b"  # type: ignore[union-attr]
    assert read_flag("numeric:0.5").absolute == 0.5  # type: ignore[union-attr]
    assert read_flag(f"json_schema:{tmp_path / 's.json'}").schema == {"type": "object"}  # type: ignore[union-attr]
    assert read_flag("python:a.b:c").function == "a.b:c"  # type: ignore[union-attr]
    assert read_flag(f"judge:{tmp_path / 'r.txt'}").rubric == "be kind"  # type: ignore[union-attr]
    assert read_flag("http://x/y").url == "http://x/y"  # type: ignore[union-attr]
    assert read_flag('{"type": "includes", "normalised": true}').normalised is True  # type: ignore[union-attr]
    for text in ("numeric:x", "json_schema:/nowhere", "exact:x", '{"type": 1}', "{"):
        with pytest.raises(ValueError):
            read_flag(text)


# ---- hooks and the process ----


def example(grader: AnyGrader, *expected: Any) -> Example:
    request = {"messages": [{"role": "user", "content": "why?"}]}
    return Example("e1", 1, "/chat/completions", request, expected, grader)


def answer(text: str) -> Answer:
    return Answer(text=text, latency=1, asked_at=0.0, concurrency=1)


def grade_all(*jobs: tuple[AnyGrader, str], seconds: float = 5.0) -> list[Grade]:
    """One after another, at one desk."""

    async def work() -> list[Grade]:
        async with aiohttp.ClientSession() as session, Desk(session, seconds=seconds) as desk:
            return [await desk.grade(example(grader), answer(text)) for grader, text in jobs]

    return asyncio.run(work())


def test_a_pattern_that_never_ends_is_ended_and_the_next_is_graded() -> None:
    evil = read_flag("regex:^(a+)+$")
    fine = read_flag("regex:^b")
    late, good = grade_all((evil, "a" * 50 + "b"), (fine, "b"), seconds=0.2)
    assert late.score is None
    assert "longer than 0.2 s" in late.why
    assert good.score == 1.0


def test_a_schema_with_such_a_pattern_and_one_that_refers_outside() -> None:
    evil = read_grader({"type": "json_schema", "schema": {"type": "string", "pattern": "^(a+)+$"}})
    outside = read_grader({"type": "json_schema", "schema": {"$ref": "http://127.0.0.1:1/s.json"}})
    late, away = grade_all((evil, json.dumps("a" * 50 + "b")), (outside, "1"), seconds=0.2)
    assert late.score is None
    assert away.score is None
    assert "outside of it" in away.why


def test_an_answer_of_megabytes_is_graded_and_one_of_more_is_wrong() -> None:
    long, longer = grade_all(
        (read_flag("regex:z$"), "y" * 3_000_000 + "z"), (read_flag("regex:z$"), "z" * 5_000_000)
    )
    assert long.score == 1.0
    assert longer.score == 0.0
    assert "5,000,000 characters" in longer.why


def hook_right(about: dict[str, Any]) -> bool:
    print("a hook may print")
    return bool(about["answer"] == "right" and about["request"]["messages"])


async def hook_async(about: dict[str, Any]) -> dict[str, Any]:
    return {"score": 0.25, "reason": f"of {about['id']}"}


def hook_hangs(about: dict[str, Any]) -> float:
    while True:
        pass


def hook_exits(about: dict[str, Any]) -> float:
    import os

    os._exit(7)


def hook_raises(about: dict[str, Any]) -> float:
    raise RuntimeError("nothing works")


def hook_nonsense(about: dict[str, Any]) -> str:
    return "good"


def python(name: str, timeout: float = 30.0) -> AnyGrader:
    return read_grader({"type": "python", "function": f"{__name__}:{name}", "timeout": timeout})


def test_python_hooks() -> None:
    grades = grade_all(
        (python("hook_right"), "right"),
        (python("hook_right"), "wrong"),
        (python("hook_async"), ""),
        (python("hook_raises"), ""),
        (python("hook_nonsense"), ""),
        (python("hook_nowhere"), ""),
    )
    assert [each.score for each in grades] == [1.0, 0.0, 0.25, None, None, None]
    assert grades[2].why == "of e1"
    assert "nothing works" in grades[3].why
    assert "neither a bool nor a number" in grades[4].why
    assert "hook_nowhere" in grades[5].why


def test_python_hooks_that_hang_or_end_their_process() -> None:
    hung, gone, fine = grade_all(
        (python("hook_hangs", 0.3), ""), (python("hook_exits"), ""), (python("hook_right"), "right")
    )
    assert (hung.score, gone.score, fine.score) == (None, None, 1.0)
    assert "longer than 0.3 s" in hung.why
    assert "(7)" in gone.why


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (True, 1.0),
        (0, 0.0),
        (0.5, 0.5),
        ({"score": 1}, 1.0),
        (1.5, None),
        (-1, None),
        (None, None),
        ({}, None),
    ],
)
def test_verdicts_of_hooks(said: Any, score: float | None) -> None:
    assert verdict(said)[0] == score


def test_no_answer_is_wrong() -> None:
    async def work() -> Grade:
        async with aiohttp.ClientSession() as session, Desk(session) as desk:
            return await desk.grade(example(read_flag("exact"), "x"), Refusal(status=400, message="too long"))

    found = asyncio.run(work())
    assert found == Grade(0.0, "no answer: HTTP 400: too long")


def test_http_hooks(serve: Callable[..., AnsweringServer]) -> None:
    """The tests' server answers any path below /v1; here as a grader that counts."""
    replies: list[Any] = [(200, {"score": 0.5, "reason": "half"}), (200, True), (200, {"x": 1}), (404, {})]
    server = serve(lambda _: replies.pop(0))
    url = f"{server.url}/v1/grade"

    async def work() -> list[Grade]:
        async with aiohttp.ClientSession() as session, Desk(session) as desk:
            grader = read_flag(url)
            about = Example("e9", 1, "/completions", {"prompt": "p"}, ("x",), grader, ("t",))
            return [await desk.grade(about, answer("a")) for _ in range(4)]

    grades = asyncio.run(work())
    assert [each.score for each in grades] == [0.5, 1.0, None, None]
    assert grades[0].why == "half"
    assert "HTTP 404" in grades[3].why


def test_a_grader_that_is_down_ends_the_grading(serve: Callable[..., AnsweringServer]) -> None:
    server = serve(lambda _: None)
    server.down = True

    async def no_wait(_: float) -> None:
        return None

    async def work() -> None:
        async with aiohttp.ClientSession() as session, Desk(session, sleep=no_wait) as desk:
            for _ in range(5):
                await desk.grade(example(read_flag(f"{server.url}/v1/grade")), answer("a"))

    with pytest.raises(GraderDown, match="does not answer"):
        asyncio.run(work())


# ---- the judge ----


@pytest.mark.parametrize(
    ("text", "scale", "score"),
    [
        ("It is right.\nGRADE: 1", 1, 1.0),
        ("GRADE: 1\nNo, wait.\n**Grade: 0**", 1, 0.0),
        ("grade: 4/5", 5, 0.8),
        ("GRADE: 7", 5, None),
        ("GRADE: -1", 5, None),
        ("I would grade it 1 if I could", 1, None),
        ("", 1, None),
    ],
)
def test_the_judges_grade(text: str, scale: int, score: float | None) -> None:
    assert read_grade(text, scale) == score


@given(st.text(), st.integers(1, 100))
def test_any_text_of_a_judge_is_read(text: str, scale: int) -> None:
    assert (found := read_grade(text, scale)) is None or 0 <= found <= 1


@given(st.text())
def test_an_answer_cannot_close_its_own_marks(text: str) -> None:
    """The mark has a hash of all that is shown, which no text can hold of itself."""
    body = question(Judge(), {"messages": [{"role": "user", "content": "q"}]}, ("r",), text)
    shown = body["messages"][1]["content"]
    mark = shown.partition("<question ")[2].partition(">")[0]
    assert shown.count(f"</answer {mark}>") == 1
    assert f"\n{text}\n</answer" in shown


def test_a_rubric_and_several_turns_are_shown() -> None:
    request = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"text": "why?"}]},
        ]
    }
    body = question(Judge(rubric="kindness", scale=5), request, (), "because")
    system, user = body["messages"]
    assert "kindness" in system["content"]
    assert "from 0 (useless) to 5 (perfect)" in system["content"]
    assert "system: be brief\n\nuser: why?" in user["content"]
    assert "reference" not in user["content"]
