"""Whether objects are what Kubernetes takes: its own schemas (kubernetes-validate), and those of CRDs beside
the repository. Fields that no schema has are errors, too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from .matrix import shared

VERSION = "1.32"
_CORE = ("v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1", "autoscaling/v2")


def problems(plain: Mapping[str, Any], version: str = VERSION) -> list[str]:
    """What is wrong with an object. Skips the test where there is nothing to compare with."""
    if plain["apiVersion"] in _CORE:
        validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
        try:
            validate.validate(plain, version, strict=True)
        except validate.ValidationError as error:
            return [f"{version}: {error.message}"]
        return []
    schema = _schemas().get((plain["apiVersion"], plain["kind"]))
    if schema is None:
        return []
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(plain)]


@cache
def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) → its schema, closed."""
    folder = shared()
    if folder is None:
        pytest.skip("needs ../shared/crds")
    found = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for name in ("lws", "gateway-api"):
        for crd in yaml.load_all((folder / "crds" / f"{name}.yaml").read_text(), loader):
            if crd and crd["kind"] == "CustomResourceDefinition":
                spec = crd["spec"]
                for version in spec["versions"]:
                    schema = version["schema"]["openAPIV3Schema"]
                    schema["properties"]["metadata"] = {"type": "object"}
                    found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = _closed(schema)
    return found


def _closed(schema: Any) -> Any:
    """The schema with nothing beside its properties; quantities and ports are numbers or texts."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {
        key: {name: _closed(each) for name, each in value.items()} if key == "properties" else _closed(value)
        for key, value in schema.items()
        if key not in ("format", "anyOf", "oneOf", "not", "allOf")
    }
    if "properties" in closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed
