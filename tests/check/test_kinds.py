"""What no rule knows does not pass for checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.check.run import check, check_text
from penstock.cli.main import main

WHOLE = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("# an application\nhello: world\n", 2, "none of what is checked"),
        ("just a text\n", 1, "none of what is checked"),
        ("- 1\n- [2, {a: b}]\n", 1, "none of what is checked"),
        ("", 1, "nothing in it"),
        ("# only a comment\n", 1, "nothing in it"),
    ],
)
def test_a_named_file_that_is_nothing(
    text: str, line: int, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    (found,) = check([path])
    assert (found.rule.id, found.line) == ("file-unknown", line)
    assert what in found.what
    assert main(["check", str(path)]) == 1
    assert f"a.yaml:{line}:1: error file-unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        "llm: {provider: openai}\n",
        "outer: {inner: [{temperature: 0.2}]}\n",
        'services: {db: {image: "postgres:17.2"}}\n',
        "groups: []\n",
        "resources: [a.yaml]\n",
    ],
)
def test_what_may_be_checked_is_known(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert "file-unknown" not in {found.rule.id for found in check([path])}


def test_a_folder_may_have_anything_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("hello: world\n")
    assert check([tmp_path]) == []


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("kind: Deployment\nmetadata: {name: a}\n", 1, "Deployment has no apiVersion."),
        ("spec: {}\nkind: Service\n", 2, "Service has no apiVersion."),
        ("apiVersion: apps/v1\nmetadata: {name: a}\n", 1, "An object of apps/v1 has no kind."),
    ],
)
def test_an_object_has_apiversion_and_kind(text: str, line: int, what: str) -> None:
    found = check_text(f"{WHOLE}---\n{text}")
    assert [(each.line, each.what) for each in found if each.rule.id == "object-incomplete"] == [
        (line + WHOLE.count("\n") + 1, what)
    ]


@pytest.mark.parametrize(
    "text", [WHOLE, "kind: small\nmetadata: {a: 1}\n", "kind: Config\n", "spec: {a: 1}\n"]
)
def test_what_is_no_object_is_left_alone(text: str) -> None:
    assert "object-incomplete" not in {each.rule.id for each in check_text(text)}
