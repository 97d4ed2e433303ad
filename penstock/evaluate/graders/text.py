"""Texts against texts. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from penstock.core.errors import quote

from .spec import AnyGrader, Exact, Includes, JsonSchema, Normalised, Numeric, Regex
from .values import grade_json, grade_numeric

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_INSIDE = re.compile(r"(?<=\d)[.,](?=\d)|(?:^|(?<=[\s=<>~$€£]))(?:[-−]\.?|\.)(?=\d)")
"""Punctuation that changes a number: 3.14 is not 314, and -5 is not 5."""


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and surplus white space: the rule of SQuAD's own
    evaluation (Rajpurkar et al. 2016, evaluate-v1.1.py, `normalize_answer`), after Unicode's NFKC and case
    folding, and with the marks kept that belong to a number."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = {place for match in _INSIDE.finditer(text) for place in range(*match.span())}
    letters = (
        letter
        for place, letter in enumerate(text)
        if place in kept or not unicodedata.category(letter).startswith("P")
    )
    return " ".join(_ARTICLES.sub(" ", "".join(letters)).split())


def grade(grader: AnyGrader, answer: str, expected: tuple[Any, ...]) -> tuple[float, str]:
    """(score, why) of an answer under a grader that needs nobody else. Raises ValueError."""
    match grader:
        case Exact():
            return _either(answer in expected, "equal", "another text")
        case Normalised():
            same = normalise(answer) in {normalise(text) for text in expected}
            return _either(same, "equal", "another text")
        case Includes(normalised=True):
            text = f" {normalise(answer)} "
            return _either(any(f" {normalise(part)} " in text for part in expected), "there", "not there")
        case Includes():
            return _either(any(part in answer for part in expected), "there", "not there")
        case Regex():
            return _regex(grader, answer, expected)
        case JsonSchema(schema=schema, fenced=fenced):
            return grade_json(answer, schema, expected, fenced=fenced)
        case Numeric():
            return grade_numeric(answer, expected, grader.absolute, grader.relative, grader.pick)
        case _:
            raise ValueError(f"{type(grader).__name__} is no grader of texts")


def _regex(grader: Regex, answer: str, expected: tuple[Any, ...]) -> tuple[float, str]:
    flags = re.IGNORECASE if grader.ignore_case else 0
    for pattern in grader.patterns(expected):
        compiled = re.compile(pattern, flags)
        match = compiled.fullmatch(answer) if grader.full else compiled.search(answer)
        if match is not None:
            return 1.0, f"matches at character {match.start()}: {quote(match[0])}"
    return 0.0, "no match"


def _either(good: bool, yes: str, no: str) -> tuple[float, str]:
    return (1.0, yes) if good else (0.0, no)
