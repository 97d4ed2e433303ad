"""The document's JSON Schema, for editors: completion, documentation and errors while one writes."""

from __future__ import annotations

from typing import Any

from .model import Spec

ID = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what may be written in `penstock.yaml`.

    It knows shapes, ranges and texts; whether names lead somewhere, `penstock.spec.loads` knows.
    """
    made = Spec.model_json_schema(mode="validation")
    _close(made)
    return {"$schema": ID, **made, "title": "penstock.yaml"}


def _close(shape: Any) -> None:
    """Names that do not fit their pattern are refused: pydantic writes the pattern only."""
    if isinstance(shape, dict):
        if "patternProperties" in shape:
            shape["additionalProperties"] = False
        for inner in shape.values():
            _close(inner)
