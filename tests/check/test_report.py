"""Findings as text, JSON and SARIF."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from penstock.check import report, run
from penstock.check.finding import Finding, Rule, Severity

TOOLS = Path(__file__).parents[2] / ".tools" / "node_modules" / "@microsoft" / "jest-sarif"
"""An npm package with the schema; .ci/run installs it."""
ERROR = Rule("a-rule", Severity.ERROR, "it is wrong", "It hurts.", "Mend it.")
NOTE = Rule("b-rule", Severity.NOTE, "it is so", "It matters.", "Look.")
WARNING = Rule("c-rule", Severity.WARNING, "it may", "It could.", "Think.")
FOUND = [
    Finding(ERROR, "./a b.yaml", 3, 5, "The value is 3."),
    Finding(ERROR, "./a b.yaml", 9, 1, "The value is 4.", "Write 5."),
    Finding(NOTE, "/etc/x.sh", 1, 1, "Odd\x1b[31m."),
    Finding(NOTE, "-", 1, 1, "Odd."),
]


def test_statuses() -> None:
    assert report.status([]) == report.CLEAN == 0
    assert report.status(FOUND) == report.FOUND == 1
    assert report.status(FOUND[2:], strict=True) == 0
    warning = [Finding(WARNING, "a", 1, 1, "x")]
    assert (report.status(warning), report.status(warning, strict=True)) == (0, 1)


def test_text_tells_why_once_for_each_file() -> None:
    lines = report.text(FOUND, files=3).splitlines()
    assert lines[:5] == [
        "./a b.yaml:3:5: error a-rule: The value is 3.",
        "    why: It hurts.",
        "    fix: Mend it.",
        "./a b.yaml:9:1: error a-rule: The value is 4.",
        "    fix: Write 5.",
    ]
    assert "/etc/x.sh:1:1: note b-rule: Odd\\x1b[31m." in lines
    assert lines[-1] == "2 errors, 2 notes in 3 files."
    assert report.text([], files=1) == "Nothing found in 1 file.\n"


def test_json() -> None:
    data = json.loads(report.as_json(FOUND, files=3, version="1.2.3"))
    assert data["counts"] == {"error": 2, "warning": 0, "note": 2}
    assert (data["status"], data["files"], data["version"]) == (1, 3, "1.2.3")
    assert data["findings"][0] == {
        "rule": "a-rule",
        "severity": "error",
        "path": "./a b.yaml",
        "line": 3,
        "column": 5,
        "what": "The value is 3.",
        "why": "It hurts.",
        "fix": "Mend it.",
    }


def sarif(found: list[Finding], lines: dict[str, list[str]] | None = None) -> dict[str, object]:
    log: dict[str, object] = json.loads(report.sarif(found, run.rules(), lines or {}, version="0.1.0"))
    return log


@pytest.mark.parametrize("found", [FOUND, []])
def test_sarif_keeps_to_its_schema(found: list[Finding]) -> None:
    schemas = sorted(TOOLS.glob("lib/schemas/sarif-2.1.0*.json"))
    if not schemas:
        pytest.skip("SARIF's schema is not there: npm install --prefix .tools @microsoft/jest-sarif")
    schema = json.loads(schemas[-1].read_text())
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    validator(schema).validate(sarif(found))


def test_sarif() -> None:
    (ran,) = sarif(FOUND)["runs"]  # type: ignore[misc, index]
    rules = ran["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["a-rule", "b-rule"]
    assert rules[0]["help"]["text"] == "It hurts.\n\nMend it."
    first = ran["results"][0]
    assert (first["ruleId"], first["ruleIndex"], first["level"]) == ("a-rule", 0, "error")
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "a%20b.yaml", "uriBaseId": "ROOT"}
    assert place["region"] == {"startLine": 3, "startColumn": 5}
    assert ran["results"][2]["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "file:///etc/x.sh"
    }


def test_a_finding_stays_itself_when_lines_move() -> None:
    """Its fingerprint hangs on the text of its line; the second of two equal lines has one of its own."""

    def prints(found: list[Finding], text: str) -> list[str]:
        (ran,) = sarif(found, {"a": text.split("\n")})["runs"]  # type: ignore[misc, index]
        return [result["partialFingerprints"]["primaryLocationLineHash"] for result in ran["results"]]

    before = prints([Finding(ERROR, "a", 1, 1, "x"), Finding(ERROR, "a", 2, 1, "x")], "same\n  same\n")
    after = prints([Finding(ERROR, "a", 3, 1, "x"), Finding(ERROR, "a", 4, 1, "x")], "new\n\nsame\nsame\n")
    assert before == after
    assert len(set(before)) == 2
    assert prints([Finding(NOTE, "a", 1, 1, "x")], "same\n")[0] not in before


def test_every_rule_can_be_told() -> None:
    rules = run.rules()
    assert len({rule.id for rule in rules}) == len(rules) > 40
    for rule in rules:
        assert rule.id == rule.id.lower().replace("_", "-").replace(" ", "-")
        assert rule.summary
        assert not rule.summary.endswith(".")
        assert rule.why.endswith((".", "?"))
        assert rule.fix
        assert rule.why in report.explain(rule)
    assert report.list_of(rules).count("\n") == len(rules)
