"""docs/spec.md, from the spec's models.

python -m penstock.cli.spec_page > docs/spec.md
"""

from __future__ import annotations

import datetime
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from penstock.spec import parts
from penstock.spec.model import Spec
from penstock.spec.schema import descriptions
from penstock.spec.units import NANO, Bytes, Dollars, Seconds

_HEAD = """\
# penstock.yaml

<!-- made by `python -m penstock.cli.spec_page > docs/spec.md`; a test compares them -->

One file says what runs, where, for whom, and at what price. `penstock gateway` and `penstock up` read it, and
what plans, compiles and simulates reads the same one. `penstock init` writes a commented example that runs as
it is; `penstock schema > penstock.schema.json` gives editors completion, with a first line of
`# yaml-language-server: $schema=penstock.schema.json`.

- All errors of a file are told at once, each with its line. An unknown key is one, and the nearest known key
  is suggested; so is a name that leads nowhere, a key that stands twice, and what cannot be true together.
- Secrets are never in the file: `api_key_env` and its like name environment variables.
- YAML's aliases (`*name`) are not read. Mappings and lists nest up to 32 deep, a file has 256 KiB at most.

| written | means |
|---|---|
| duration | seconds, or a text: `500ms`, `30s`, `5m`, `1.5h`, `1d` |
| size | bytes, or a text: `80GB` (decimal), `40GiB` (binary) |
| dollars | US dollars: `12.50` or `"$12.50"`, up to nine decimals; sums are exact |
| name | letters, digits and `. _ : / @ -`, up to 128 of them; what clients may send as `model` |
| variable | the name of an environment variable |
| label | a name in Kubernetes: small letters, digits and `-`, up to 63 |
| image | a container image with a tag or digest: `registry.example.com/llm/penstock:0.1.0-cuda` |
"""

_NAMED: tuple[tuple[Any, str], ...] = (
    (Seconds, "duration"),
    (Bytes, "size"),
    (Dollars, "dollars"),
    (parts.Name, "name"),
    (parts.Variable, "variable"),
    (parts.Flag, "flag"),
    (parts.HeaderName, "header"),
    (parts.HeaderValue, "text"),
    (parts.Label, "label"),
    (parts.LabelKey, "label key"),
    (parts.LabelValue, "label value"),
    (parts.Image, "image"),
)
_PLAIN = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    datetime.date: "date",
    Any: "any",
}


def render() -> str:
    """The page."""
    lines = [_HEAD.rstrip()]
    for part in _order():
        title = "The document" if part is Spec else part.__name__
        lines += ["", f"## {title}", "", inspect.cleandoc(part.__doc__ or ""), ""]
        lines += ["| key | value | default | |", "|---|---|---|---|"]
        texts = descriptions(part)
        lines += [_row(name, field, part, texts[name]) for name, field in part.model_fields.items()]
    return "\n".join(lines) + "\n"


def _order() -> list[type[parts.Part]]:
    """Every part once, in the order in which the document mentions it."""
    found: list[type[parts.Part]] = []

    def visit(part: type[parts.Part]) -> None:
        if part not in found:
            found.append(part)
            for hint in typing.get_type_hints(part, include_extras=True).values():
                for inner in _parts(hint):
                    visit(inner)

    visit(Spec)
    return found


def _parts(hint: Any) -> Iterator[type[parts.Part]]:
    if isinstance(hint, type) and issubclass(hint, parts.Part):
        yield hint
    for argument in get_args(hint):
        yield from _parts(argument)


def _row(name: str, field: FieldInfo, part: type[parts.Part], text: str) -> str:
    hint = typing.get_type_hints(part, include_extras=True)[name]
    text = " ".join(text.split()).replace("|", "\\|")
    default = (
        "required" if field.is_required() else _default(field.get_default(call_default_factory=True), hint)
    )
    return f"| `{name}` | {_type(hint)} | {default} | {text} |"


def _type(hint: Any) -> str:
    """A type in words."""
    for known, word in _NAMED:
        if hint == known:
            return word
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(arguments[0]) + _range(arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _type(next(each for each in arguments if each is not type(None)))
    if origin is Literal:
        return " \\| ".join(f"`{each}`" for each in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} → {_type(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return _PLAIN[hint]


def _range(constraints: tuple[Any, ...]) -> str:
    bounds = {}
    for constraint in constraints:
        for each in getattr(constraint, "metadata", None) or [constraint]:
            for sign, attribute in (("≥", "ge"), (">", "gt"), ("≤", "le")):
                if (value := getattr(each, attribute, None)) is not None:
                    bounds[sign] = value
    return "".join(f", {sign} {value:g}" for sign, value in bounds.items())


def _default(value: Any, hint: Any) -> str:
    if value in (None, (), {}) or value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if hint == Seconds:
        return f"`{value:g}s`"
    if hint == Dollars:
        return f"`{value / NANO:g}`"
    return f"`{value}`"


if __name__ == "__main__":
    print(render(), end="")
