"""The document's JSON Schema, for editors: completion, documentation and errors while one writes."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .model import Spec
from .parts import Part

ID = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what may be written in `penstock.yaml`.

    It knows shapes, ranges and texts; whether names lead somewhere, `penstock.spec.loads` knows.
    """
    made = Spec.model_json_schema(mode="validation")
    _close(made)
    shapes = {**made["$defs"], "Spec": made}
    for part in _parts():
        if part.__name__ in shapes:
            for name, text in descriptions(part).items():
                shapes[part.__name__]["properties"][name]["description"] = text
    return {"$schema": ID, **made, "title": "penstock.yaml"}


def descriptions(part: type[Part]) -> dict[str, str]:
    """Field → the text beneath it. pydantic reads these, too (`use_attribute_docstrings`), but whenever the
    module is imported, which took each command that knows a spec a tenth of a second."""
    (written,) = ast.parse(inspect.getsource(part)).body
    assert isinstance(written, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(beneath.value.value)
        for field, beneath in pairwise(written.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(beneath, ast.Expr)
        and isinstance(beneath.value, ast.Constant)
        and isinstance(beneath.value.value, str)
    }


def _parts(part: type[Part] = Part) -> Iterator[type[Part]]:
    """All classes of the document."""
    for each in part.__subclasses__():
        yield each
        yield from _parts(each)


def _close(shape: Any) -> None:
    """Names that do not fit their pattern are refused: pydantic writes the pattern only."""
    if isinstance(shape, dict):
        if "patternProperties" in shape:
            shape["additionalProperties"] = False
        for inner in shape.values():
            _close(inner)
