"""From what a client asks for to the grammar that travels: cheap checks, in the API process.

It reads JSON and its schemas; it compiles nothing. What it lets through may still be refused by the compiler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.core.errors import InvalidRequest
from penstock.core.structured import MOST_CHARACTERS, Grammar, GrammarKind, StructuredOutputsParams

from .schema import dumps, examine, loads, without_more_properties
from .tags import examine_tags

MOST_CHOICES = 20_000


def prepare(params: StructuredOutputsParams) -> tuple[Grammar, list[str]]:
    """(the grammar, names of keywords that are skipped).

    Raises InvalidRequest or UnsupportedParameter, naming the place.
    """
    kind = params.kind
    field = f"{params.field}.{kind}" if params.field == "structured_outputs" else params.field
    whitespace = "" if params.disable_any_whitespace else params.whitespace_pattern
    skipped: list[str] = []
    lenient = params.strict is False
    if kind in ("json", "json_object"):
        schema, skipped = _schema(params, field)
        grammar = Grammar(GrammarKind.JSON, dumps(schema, field), whitespace, lenient)
    elif kind == "structural_tag":
        given = params.structural_tag
        tags, skipped = examine_tags(
            loads(given, field) if isinstance(given, str) else given, params.strict, field
        )
        grammar = Grammar(GrammarKind.TAG, dumps(tags, field), whitespace, lenient)
    elif kind == "choice":
        choices = list(dict.fromkeys(params.choice or ()))
        if len(choices) > MOST_CHOICES:
            raise InvalidRequest(
                f"{field} must have at most {MOST_CHOICES} choices, got {len(choices)}.", param=field
            )
        grammar = Grammar(GrammarKind.CHOICE, dumps(choices, field))
    elif kind == "regex":
        grammar = Grammar(GrammarKind.REGEX, params.regex or "")
    else:
        grammar = Grammar(GrammarKind.EBNF, params.grammar or "")
    if len(grammar.text) > MOST_CHARACTERS:
        raise InvalidRequest(
            f"{field} must have at most {MOST_CHARACTERS} characters, got {len(grammar.text)}.", param=field
        )
    if not grammar.text.strip():
        raise InvalidRequest(f"{field} is empty.", param=field)
    try:
        grammar.text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} is no valid Unicode: {error.reason}.", param=field) from None
    before = "" if params.before is None else dumps(examine_tags(params.before, None, field)[0], field)
    return replace(grammar, after=params.after, before=before), skipped


def _schema(params: StructuredOutputsParams, field: str) -> tuple[Any, list[str]]:
    if params.json_object:
        return {"type": "object"}, []
    schema: Any = loads(params.json, field) if isinstance(params.json, str) else params.json
    schema, skipped = examine(schema, params.strict, field)
    if params.disable_additional_properties:
        schema = without_more_properties(schema, field)
    return schema, skipped
