"""The source documents, as texts; and our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.check import run, sources

from .finding import in_code, places

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT.parent / "shared" / "sources"

# document → rule and line, of the traps that the list names
TRAPS = {
    "000": {("env-not-read", 77)},  # T17
    "001": {
        ("flag-unknown", 60),  # T1
        ("flag-mentioned", 222),  # T5: --num-scheduler-steps, in a list of flags
        ("trust-remote-code", 96),  # T22
        ("trust-remote-code", 64),
    },
    "002": {("continuation-broken", 30), ("engine-open", 44)},
    "003": {
        ("load-test-get", 86),  # T16
        ("image-latest", 25),  # T22
        ("trust-remote-code", 27),
    },
    "004": {
        ("flag-removed", 219),  # T5: --swap-space
        ("image-latest", 122),  # T22
        ("continuation-broken", 213),
    },
}


@pytest.mark.skipif(not DOCUMENTS.is_dir(), reason="the source documents are not here")
@pytest.mark.parametrize("name", TRAPS)
def test_traps_of_the_source_documents(name: str) -> None:
    path = DOCUMENTS / f"{name}.txt"
    found = in_code(path.read_text(), str(path))
    assert places(found) >= TRAPS[name]
    # nothing else is called an error
    errors = {each.rule.id for each in found if each.rule.severity == "error"}
    assert errors <= {"flag-unknown", "flag-removed", "env-not-read", "load-test-get", "continuation-broken"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_our_documents_have_no_errors(path: Path) -> None:
    """What they show can be run: every flag of ours and of vLLM's in them is there."""
    found = run.check_sources([sources.read(path)])
    assert [
        f"{each.path}:{each.line}: {each.rule.id}" for each in found if each.rule.severity == "error"
    ] == []


def test_our_benchmarks_have_no_errors() -> None:
    found = run.check([ROOT / "benchmarks", ROOT / "tools"])
    assert [
        f"{each.path}:{each.line}: {each.rule.id}" for each in found if each.rule.severity == "error"
    ] == []
