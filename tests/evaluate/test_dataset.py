"""Reading sets: what a line may be, and all that is wrong with a file, with its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.evaluate.dataset import Dataset, canonical, read_dataset
from penstock.evaluate.graders.spec import Exact, Normalised, Numeric, Regex, read_flag


def read(tmp_path: Path, *lines: Any, **options: Any) -> Dataset:
    path = tmp_path / "set.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_dataset(path, **options)


def problems(tmp_path: Path, *lines: Any, **options: Any) -> str:
    with pytest.raises(StartupError) as caught:
        read(tmp_path, *lines, **options)
    return str(caught.value)


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "b"}]
    dataset = read(
        tmp_path,
        {"prompt": "a", "expected": "x"},
        "",
        {
            "id": 7,
            "messages": messages,
            "expected": ["x", "y"],
            "grader": "exact",
            "tags": ["t", "t"],
            "weight": 2,
        },
        {
            "request": {"prompt": "c", "max_tokens": 4, "model": "m", "stream": True},
            "expected": 4,
            "grader": "numeric",
        },
        {"input": "d", "ideal": ["x"]},
        {"input": messages, "ideal": "z", "group": "g"},
    )
    a, b, c, d, e = dataset.examples
    assert (a.id, a.line, a.path, a.expected) == ("line-1", 1, "/chat/completions", ("x",))
    assert a.request == {"messages": [{"role": "user", "content": "a"}]}
    assert a.grader == Normalised()
    assert (b.id, b.line, b.expected, b.grader, b.tags, b.weight) == (
        "7",
        3,
        ("x", "y"),
        Exact(),
        ("t",),
        2.0,
    )
    assert (c.path, c.request) == ("/completions", {"prompt": "c", "max_tokens": 4})
    assert c.grader == Numeric()
    assert (d.request["messages"][0]["content"], d.grader) == ("d", Exact())
    assert (e.request["messages"], e.group) == (messages, "g")


def test_defaults_of_the_file_and_of_the_flag(tmp_path: Path) -> None:
    lines = [
        {"defaults": {"grader": "exact", "request": {"max_tokens": 5, "seed": 1}, "tags": ["all"]}},
        {"prompt": "a", "expected": "x"},
        {"request": {"prompt": "b", "max_tokens": 9}, "expected": "x", "grader": "includes", "tags": []},
    ]
    first, second = read(tmp_path, *lines, grader=read_flag("regex:x")).examples
    assert first.grader == Exact()
    assert first.tags == ("all",)
    assert first.request["max_tokens"] == 5
    assert (second.request["max_tokens"], second.request["seed"], second.tags) == (9, 1, ())
    (flag,) = read(tmp_path, {"prompt": "a"}, grader=read_flag("regex:x")).examples
    assert flag.grader == Regex(pattern="x")


def test_all_broken_lines_are_named_and_nothing_is_run(tmp_path: Path) -> None:
    said = problems(
        tmp_path,
        {"prompt": "a", "expected": "x"},
        '{"prompt": "b", "expected": ',
        "[1]",
        {"expected": "x"},
        {"prompt": "c", "messages": [], "expected": "x"},
        {"prompt": "d", "expected": "x", "graders": "exact"},
        {"prompt": "e", "expected": "x", "grader": {"type": "regex", "pattern": "("}},
        {"prompt": "f"},
        {"id": "line-1", "prompt": "g", "expected": "x"},
        {"prompt": "a", "expected": "x"},
        {"prompt": "h", "expected": "x", "weight": 0},
        {"messages": "hello", "expected": "x"},
        {"request": {"messages": [{"role": "user"}], "n": 2}, "expected": "x"},
        {"defaults": {"grader": "exact"}},
        {"prompt": "i", "expected": "x", "grader": {"type": "python", "function": "os:system"}},
        "[" * 100_000,
    )
    for line, words in {
        2: "not JSON",
        3: "no JSON object",
        4: "needs one of prompt, messages and request",
        5: "has prompt and messages",
        6: "no 'graders'",
        7: "the pattern '('",
        8: "names no grader",
        9: "that of line 1, too",
        10: "stands in line 1",
        11: "weight is a number above 0",
        12: "messages are a list",
        13: "n is 1",
        14: "in the first line",
        15: "--allow-hooks",
        16: "nested too deeply",
    }.items():
        (told,) = [each for each in said.splitlines() if each.strip().startswith(f"line {line}:")]
        assert words in told
    assert "15 lines are broken, and nothing was run" in said
    assert "--skip-broken" in said


def test_broken_lines_may_be_left_out(tmp_path: Path) -> None:
    dataset = read(tmp_path, "{", {"prompt": "a", "expected": "x"}, "}", skip_broken=True)
    assert [each.line for each in dataset.examples] == [2]
    assert [each.partition(":")[0] for each in dataset.skipped] == ["line 1", "line 3"]


def test_many_broken_lines_are_counted(tmp_path: Path) -> None:
    said = problems(tmp_path, *["{"] * 1000)
    assert "1000 lines are broken" in said
    assert "and 970 more" in said
    assert len(said) < 20_000


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"defaults": {"grader": "exact"}}\n'])
def test_a_set_without_examples(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(StartupError, match="no examples"):
        read_dataset(path)
    with pytest.raises(StartupError, match="cannot be read"):
        read_dataset(tmp_path)
    with pytest.raises(StartupError, match="cannot be read"):
        read_dataset(tmp_path / "none")


def test_bytes_that_are_no_text_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "expected": "x"}\r\n{"prompt": "\xff", "expected": "x"}\n')
    with pytest.raises(StartupError, match="line 2"):
        read_dataset(path)
    assert len(read_dataset(path, skip_broken=True).examples) == 1


def test_a_line_that_never_ends_is_one_broken_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.evaluate.dataset.MOST_LINE", 1 << 10)
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "' + "x" * 10_000 + '"}\n' + json.dumps({"prompt": "a", "expected": "x"}))
    dataset = read_dataset(path, skip_broken=True)
    assert len(dataset.skipped) == 1
    assert [each.line for each in dataset.examples] == [2]


def test_a_limit(tmp_path: Path) -> None:
    lines = [{"prompt": str(n), "expected": "x"} for n in range(10)]
    assert len(read(tmp_path, *lines, limit=3).examples) == 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.binary(max_size=80), max_size=6))
def test_any_bytes_are_a_set_or_a_message(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(StartupError):
        read_dataset(path)


_VALUES = st.sampled_from(
    ["x", 4, None, [], {}, True, ["x"], {"type": "exact"}, "exact", [{"role": "user", "content": "q"}], -1.5]
)
_NAMES = (
    "id",
    "prompt",
    "messages",
    "request",
    "expected",
    "grader",
    "tags",
    "weight",
    "group",
    "input",
    "ideal",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5))
def test_any_fields_are_an_example_or_a_message(tmp_path: Path, line: dict[str, Any]) -> None:
    dataset = read(tmp_path, {"prompt": "fine", "expected": "x"}, line, skip_broken=True)
    assert all(each.startswith("line 2: ") for each in dataset.skipped)
    assert len(dataset.examples) + len(dataset.skipped) == 2


def test_canonical_is_of_the_content() -> None:
    """The outermost order says nothing; that of a tool's parameters does, to a model."""
    assert canonical({"b": 1, "a": [2]}) == canonical({"a": [2], "b": 1})
    assert canonical({"a": {"x": 1, "y": 2}}) != canonical({"a": {"y": 2, "x": 1}})
    assert canonical(["a", 1]) != canonical(["a", "1"])
