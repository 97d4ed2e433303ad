"""What an output has to match: as a client asks for it, and as it travels to whoever samples.

    StructuredOutputsParams ── penstock.grammar.prepare ──▶ Grammar    one kind, one text; plain data, and
    (vLLM's fields, one of them set)                                   hashable: who compiles finds it again

It knows the kinds and what belongs together; it neither parses nor compiles a grammar (penstock.grammar).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from .errors import InvalidRequest, quote

MOST_CHARACTERS = 1 << 20
"""Of a grammar's text. What is longer is refused before anybody reads it."""


class GrammarKind(StrEnum):
    """What a grammar's text is."""

    JSON = "json"  # a JSON schema
    REGEX = "regex"  # a regular expression, of the whole output
    CHOICE = "choice"  # a JSON list of strings
    EBNF = "grammar"  # EBNF (GBNF) or Lark
    TAG = "structural_tag"  # JSON: free text with structured parts, see penstock.grammar.tags


@dataclass(frozen=True, slots=True)
class Grammar:
    """One request's."""

    kind: GrammarKind
    text: str
    whitespace: str | None = None
    """Of JSON: a regular expression of what may stand between its tokens; "" is nothing, None the default."""
    lenient: bool = False
    """Of JSON: keywords that cannot be enforced are skipped, instead of refused."""
    after: str = ""
    """The output is free up to the end of this text, such as a reasoning model's "</think>"."""
    before: str = ""
    """What stands before it, as JSON of a structural tag's format: gpt-oss' thoughts, and a header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """vLLM's StructuredOutputsParams: exactly one of the first six is given.

    Raises InvalidRequest, naming the field, when they do not fit together.
    """

    json: str | dict[str, Any] | bool | None = None
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    """The whole output matches it."""
    choice: list[str] | tuple[str, ...] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """A grammar in EBNF (GBNF's notation) or Lark's."""
    json_object: bool | None = None
    """True: any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """Free text with structured parts, as JSON: vLLM's {"structures", "triggers"} or {"format"}."""
    disable_any_whitespace: bool = False
    """JSON without any whitespace between its tokens."""
    disable_additional_properties: bool = False
    """Objects that say nothing of `additionalProperties` have none."""
    whitespace_pattern: str | None = None
    """A regular expression of the whitespace between JSON's tokens; by default as much as pretty-printing
    takes, and not without end."""
    strict: bool | None = None
    """Whether a keyword of a schema that cannot be enforced is an error. True: any keyword, also one that
    nobody knows. None: a keyword of JSON Schema that a validator would enforce, as in vLLM. False: none;
    clients are told what was skipped."""
    after: str = ""
    """Penstock's own: where the grammar begins, see `Grammar.after`."""
    before: dict[str, Any] | None = None
    """Penstock's own: what stands before it, see `Grammar.before`."""
    field: str = "structured_outputs"
    """Penstock's own: where it came from, for errors, such as "response_format"."""

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{', '.join(given)} are" if given else "none of them is"
            raise InvalidRequest(
                f"structured_outputs takes exactly one of {', '.join(KINDS)}; {what} given.",
                param=f"{self.field}.{given[1]}" if given else self.field,
            )
        for name, (wanted, what) in _TYPES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, wanted):
                raise InvalidRequest(
                    f"structured_outputs.{name} must be {what}, got {quote(value)}.",
                    param=f"structured_outputs.{name}",
                )
        if self.json_object is False:
            raise InvalidRequest(
                "structured_outputs.json_object must be true, got False.",
                param="structured_outputs.json_object",
                advice="Leave structured_outputs out for free text.",
            )
        if self.choice is not None:
            if not self.choice or not all(isinstance(text, str) and text for text in self.choice):
                raise InvalidRequest(
                    f"structured_outputs.choice must be texts that are not empty, got {quote(self.choice)}.",
                    param="structured_outputs.choice",
                )
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InvalidRequest(
                "structured_outputs.whitespace_pattern and disable_any_whitespace contradict each other.",
                param="structured_outputs.whitespace_pattern",
            )

    @property
    def kind(self) -> str:
        """Name of the one that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)


KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Fields of which one is given."""

_TYPES: Mapping[str, tuple[Any, str]] = {
    "json": (str | dict | bool, "a JSON schema"),
    "regex": (str, "a regular expression"),
    "choice": (list | tuple, "a list of texts"),
    "grammar": (str, "a grammar's text"),
    "json_object": (bool, "true"),
    "structural_tag": (str | dict, "JSON, or its text"),
    "disable_any_whitespace": (bool, "true or false"),
    "disable_additional_properties": (bool, "true or false"),
    "whitespace_pattern": (str, "a regular expression"),
    "strict": (bool, "true or false"),
    "after": (str, "a text"),
    "before": (dict, "a format"),
    "field": (str, "a text"),
}

FIELDS = tuple(entry.name for entry in fields(StructuredOutputsParams))
"""Names of all fields."""
