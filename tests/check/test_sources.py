"""Every place of a text is known, and no text of others crashes or runs away."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.check.sources import Document, documents_of, read, read_text, walk
from penstock.check.tree import MAX_DEPTH

YAML = """\
# a comment
apiVersion: v1
kind: Service
metadata: {name: a, labels: {"b/c": 'd'}}
spec:
  ports:
    - name: http
      port: 8000
  script: |
    first
      second $X
  folded: >-
    one two
    three
  long: "quoted
    on two"
"""


def one(text: str, path: str = "a.yaml") -> Document:
    source = read_text(text, path)
    assert not source.problems
    (document,) = source.documents
    return document


def test_places_of_keys_and_values() -> None:
    document = one(YAML)
    assert document.at("kind") == (3, 1)
    assert document.value_at("kind") == (3, 7)
    assert document.at("metadata", "labels", "b/c") == (4, 30)
    assert document.value_at("metadata", "labels", "b/c") == (4, 38)
    assert document.at("spec", "ports", 0) == (7, 7)
    assert document.at("spec", "ports", 0, "port") == (8, 7)
    assert document.at("spec", "ports", 5, "port") == (6, 3), "the nearest that is there"
    assert document.word("spec", "ports", 0, "port").text == "8000"


def test_places_within_scalars_of_several_lines() -> None:
    document = one(YAML)
    text = document.get("spec", "script")
    assert text == "first\n  second $X\n"
    assert document.value_at("spec", "script", offset=text.index("first")) == (10, 5)
    assert document.value_at("spec", "script", offset=text.index("$X")) == (11, 14)
    text = document.get("spec", "folded")
    assert text == "one two three"
    assert document.value_at("spec", "folded", offset=text.index("two")) == (13, 9)
    assert document.value_at("spec", "folded", offset=text.index("three")) == (14, 5)
    text = document.get("spec", "long")
    assert text == "quoted on two"
    assert document.value_at("spec", "long", offset=text.index("two")) == (16, 8)


def test_several_documents_lists_and_lines() -> None:
    text = "a: 1\n---\n---\nkind: List\nitems:\n- b: 2\n  c: 3\n-\n  d: 4\n--- # last\ne: 5\n"
    documents, problems = documents_of(text, "x.yaml", line=10)
    assert not problems
    assert [document.data for document in documents] == [{"a": 1}, {"b": 2, "c": 3}, {"d": 4}, {"e": 5}]
    assert [document.at()[0] for document in documents] == [10, 15, 18, 20]
    assert documents[1].at("c") == (16, 3)
    assert documents[3].at("e") == (20, 1)


def test_a_broken_document_hides_no_other() -> None:
    documents, problems = documents_of("a: 1\n---\nb: [1\nc: 2\n---\nd: 4\n", "x.yaml")
    assert [document.data for document in documents] == [{"a": 1}, {"d": 4}]
    (problem,) = problems
    assert problem.rule.id == "yaml-broken"
    assert problem.line == 4
    assert "expected" in problem.what


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b: c\n", 1),
        ("a:\n\tb: 1\n", 2),
        ("a: *nobody\n", 1),
        ("a: &x [*x]\n", 1),
        ("a: 1\n? [b]\n: 2\n", 2),
        ("a: \x01\n", 1),
        ("a: " + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), 1),
    ],
)
def test_what_is_broken_has_a_line(text: str, line: int) -> None:
    documents, problems = documents_of(text, "x.yaml")
    assert not documents
    assert [(each.rule.id, each.line) for each in problems] == [("yaml-broken", line)]


def test_aliases_are_written_out_within_bounds() -> None:
    document = one("a: &a {x: 1}\nb: *a\nc:\n  <<: *a\n  y: 2\n")
    assert document.data == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert document.at("b") == (2, 1)
    assert document.at("b", "x") == (1, 8)
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
    )
    documents, problems = documents_of(bomb, "x.yaml")
    assert not documents
    assert "entries" in problems[0].what


def test_scalars_are_those_of_kubernetes() -> None:
    text = "a: 0644\nb: 1_000\nc: yes\nd: 2001-01-01\ne: 12:30\nf: 1e3\ng: ~\nh: .inf\n"
    text += "i: '1'\nj: !!str 1\nk: 16Gi\n8: x\n"
    assert one(text).data == {
        "a": 420, "b": 1000, "c": True, "d": "2001-01-01", "e": "12:30", "f": 1000.0, "g": None,
        "h": float("inf"), "i": "1", "j": "1", "k": "16Gi", "8": "x",
    }  # fmt: skip


def test_the_same_key_twice() -> None:
    source = read_text("a:\n  b: 1\n  b: 2\n", "x.yml")
    assert source.documents[0].data == {"a": {"b": 2}}
    assert [(each.rule.id, each.line) for each in source.problems] == [("yaml-duplicate-key", 3)]


def test_json_with_tabs_and_surrogates() -> None:
    text = '{\n\t"a": "\\ud83d\\ude00\\/",\n\t"b": [1, -2.5e3,\n\t\ttrue, null]\n}\n'
    document = one(text, "x.json")
    assert document.data == {"a": "\U0001f600/", "b": [1, -2500.0, True, None]}
    assert document.at("b", 2) == (4, 3)
    assert document.at("a") == (2, 2)


@pytest.mark.parametrize(
    "text", ['{"a": 1,}', "[1 2]", "{", '{"a" 1}', "", "[1] x", '{"a": tru}', '"a\nb"', "[" * 5000]
)
def test_broken_json(text: str) -> None:
    source = read_text(text, "x.json")
    assert [each.rule.id for each in source.problems] == ["yaml-broken"]


def test_templates_of_helm_are_told_and_not_parsed() -> None:
    text = "kind: A\nname: {{ .Values.name }}\n---\nkind: B\ntext: '{{ $labels.pod }}'\n---\n"
    text += "{{- if .Values.x }}\na: 1\n{{- end }}\n"
    documents, problems = documents_of(text, "templates/a.yaml")
    assert [document.data["kind"] for document in documents] == ["B"]
    assert [(each.rule.id, each.line) for each in problems] == [("helm-template", 2)]


def test_a_folder_is_walked_in_order_and_within_reason(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.json", "sub/c.yml", "node_modules/d.yaml", ".git/e.yaml", ".github/f.yml",
                 "Dockerfile", "x.png", "g.py", "env/pyvenv.cfg", "env/h.yaml"):  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    found = [Path(source.path).relative_to(tmp_path).as_posix() for source in walk([tmp_path])]
    assert found == ["Dockerfile", "a.json", "b.yaml", "g.py", ".github/f.yml", "sub/c.yml"]


def test_what_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"a: \xff")
    for path in (bad, tmp_path / "nobody.yaml", Path("/dev/zero"), Path("a\0b")):
        (problem,) = read(path).problems
        assert problem.rule.id == "file-unreadable"
        assert problem.path == str(path)
