"""docs/kubernetes.md, docs/machine.md: their specs compile, and commands have flags that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from penstock.cli import main as program
from penstock.cli.flags import Parser
from penstock.deploy.formats import files
from penstock.deploy.operator import CHART
from penstock.deploy.resolve import resolve
from penstock.spec import loads

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("kubernetes.md", "machine.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall((DOCS / page).read_text()) if found == language]


def commands(page: str) -> list[list[str]]:
    """Every `penstock …` in a block or between backquotes, as words."""
    text = (DOCS / page).read_text()
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(penstock [a-z]+ [^`…]*)`", re.sub(BLOCK, "", text))
    found = []
    for line in lines:
        for part in re.split(r" \| | -- ", line):
            if part.startswith("penstock ") and not part.startswith("penstock.yaml"):
                found.append(shlex.split(part)[1:])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_with_flags_that_there_are(page: str) -> None:
    found = commands(page)
    assert len(found) >= 2
    for words in found:
        name, arguments = words[0], words[1:]
        assert name in program.COMMANDS, name
        if not arguments:
            continue
        parser = Parser(prog=f"penstock {name}")
        program.load(name).add_arguments(parser)
        parser.parse_args(arguments)


def test_the_spec_of_the_page_becomes_the_bundle_of_the_page() -> None:
    (text,) = blocks("kubernetes.md", "yaml")
    made = files(resolve(loads(text, "kubernetes.md")), "plain")
    page = (DOCS / "kubernetes.md").read_text()
    assert f"bundle: {len(made)} of {len(made)} files are new or changed." in page
    for name in made:
        if "/" not in name:
            assert f"`{name}`" in page, name
    assert f"--version {CHART}" in page
    assert "gpu-operator/values.yaml" in made
    readme = made["README.md"]
    # the commands of the page are those that the bundle itself gives
    for line in (
        "create secret generic penstock-secrets",
        "--from-literal=PENSTOCK_ENGINE_KEY",
        "penstock keys create --spec /etc/penstock/penstock.yaml first",
    ):
        assert line in readme
        assert line in page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
