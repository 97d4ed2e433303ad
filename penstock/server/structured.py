"""`response_format` and `structured_outputs` of a request, and the grammar that they become.

    fields ─ asked ─▶ StructuredOutputsParams ─ grammar_of ─▶ Grammar, which the engine can compile

As in vLLM, response_format wins over structured_outputs, and takes the other's options. It knows the fields
of OpenAI and vLLM; whether a grammar can be compiled, `penstock.text.grammar_check` finds out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.core.structured import KINDS, Grammar, StructuredOutputsParams
from penstock.grammar.prepare import prepare

from .ignored import Ignored
from .protocol import GenerateRequest
from .state import State

TOOLS = "tools"
"""The field that a grammar for calls comes from."""
FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def asked(request: GenerateRequest) -> StructuredOutputsParams | None:
    """What the output of this request has to match, if anything. Raises InvalidRequest, naming the field."""
    outer = _outputs(request.structured_outputs)
    inner = _format(request.response_format)
    if outer is None or inner is None:
        return inner or outer
    options = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
    return replace(inner, **{name: getattr(outer, name) for name in options})


async def grammar_of(
    state: State, params: StructuredOutputsParams | None, ignored: Ignored
) -> Grammar | None:
    """The grammar, checked; what is skipped of a schema goes into `ignored`. Raises InvalidRequest."""
    if params is None:
        return None
    defaults = state.config.structured_outputs_config or {}
    if defaults.get("disable_any_whitespace") and params.whitespace_pattern is None:
        params = replace(params, disable_any_whitespace=True)
    if defaults.get("disable_additional_properties"):
        params = replace(params, disable_additional_properties=True)
    size = (
        len(str(getattr(params, params.kind))) if params.kind != "choice" else len(params.choice or ()) * 16
    )
    grammar, skipped = await state.work.do(size, prepare, params)
    try:
        warnings = await state.grammars.check(grammar, params.field)
    except InvalidRequest as error:
        if params.field == TOOLS:  # nobody has sent a structural tag
            error.message = error.message.replace("the structural tag", "a grammar for calls of the tools")
        raise
    skip(skipped, ignored)
    if any("oneOf" in warning for warning in warnings):
        ignored.add(f"{params.field}.oneOf")
    return grammar


def skip(names: Iterable[str], ignored: Ignored) -> None:
    """Tell of keywords that are not enforced, or refuse them with --strict-fields."""
    for name in names:
        if ignored.strict:
            raise UnsupportedParameter(f"{name} cannot be enforced.", param=name)
        ignored.add(name)


def _outputs(given: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    """vLLM's field; an empty one asks for nothing."""
    if not given:
        return None
    known = {name: value for name, value in given.items() if name in OUTPUTS and value is not None}
    if not any(name in known for name in KINDS):
        if not known:
            return None
        raise InvalidRequest(
            f"structured_outputs has {', '.join(known)}, and nothing of {', '.join(KINDS)}.",
            param="structured_outputs",
        )
    return StructuredOutputsParams(**known)


def _format(given: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    """OpenAI's field."""
    if given is None:
        return None
    kind = given.get("type")
    if kind not in FORMATS:
        raise InvalidRequest(
            f"response_format.type must be one of {', '.join(FORMATS)}, got {quote(kind)}.",
            param="response_format.type",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, field="response_format")
    if kind == "structural_tag":
        tag = {name: given[name] for name in ("structures", "triggers", "format") if name in given}
        return StructuredOutputsParams(structural_tag=tag, field="response_format")
    return _schema(given.get("json_schema"))


def _schema(given: Any) -> StructuredOutputsParams:
    where = "response_format.json_schema"
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be an object, got {quote(given)}.", param=where)
    name, strict, schema = given.get("name"), given.get("strict"), given.get("schema")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(
            f"{where}.name must be a text that is not empty, got {quote(name)}.", param=where
        )
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(
            f"{where}.strict must be true or false, got {quote(strict)}.", param=f"{where}.strict"
        )
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(
            f"{where}.schema must be a JSON schema, which is an object, got {quote(schema)}.",
            param=f"{where}.schema",
        )
    return StructuredOutputsParams(json=schema, strict=bool(strict), field=f"{where}.schema")


OUTPUTS = frozenset(
    {
        *KINDS,
        *("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "strict"),
    }
)
"""Names in `structured_outputs`."""
