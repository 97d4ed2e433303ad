"""docs/coverage.md: no number is missing, and every test and command that it names is there."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from penstock.check import run
from penstock.cli import main as program
from penstock.cli.flags import Parser

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "coverage.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in PAGE.splitlines()
        if re.match(r"\| [STG]\d+ \|", line)
    )
}
NUMBERS = [
    *(f"S{n}" for n in range(1, 111)),
    *(f"T{n}" for n in range(1, 24)),
    *(f"G{n}" for n in range(1, 17)),
]


@cache
def functions_of(file: str) -> set[str]:
    """Names of a file's test functions, without test_."""
    path = HERE / file
    assert path.exists(), file
    found = ast.walk(ast.parse(path.read_text()))
    functions = [each for each in found if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {each.name.removeprefix("test_") for each in functions if each.name.startswith("test_")}


def test_every_number_has_one_row_and_there_are_no_others() -> None:
    numbers = re.findall(r"^\| ([STG]\d+) \|", PAGE, re.MULTILINE)
    assert sorted(numbers) == sorted(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_a_row_names_is_there(number: str) -> None:
    asked, made, shown = ROWS[number]
    assert asked
    assert made
    named = re.findall(r"`([^`]+)`", shown)
    assert named, "a row shows something"
    for each in named:
        if each.startswith("penstock "):
            command, *arguments = shlex.split(each)[1:]
            assert command in program.COMMANDS, each
            if "--help" not in arguments:
                parser = Parser(prog=each)
                program.load(command).add_arguments(parser)
                parser.parse_args(arguments)
        else:
            file, _, name = each.partition("::")
            assert (name or None) is None or name in functions_of(file), each
            assert functions_of(file), each


def test_rules_that_it_names_are_rules() -> None:
    there = {rule.id for rule in run.rules()}
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    named = set(re.findall(r"(?<!\*)\*([a-z]+(?:-[a-z0-9]+)*)\*(?!\*)", text)) - {"italics"}
    assert len(named) > 30
    assert named <= there
