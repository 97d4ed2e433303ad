"""What every object of Kubernetes has: kind, names, labels; and how typed parts become plain data.

    Part (snake_case, frozen) ──to_plain──▶ dicts, lists, numbers, texts (camelCase) ──▶ yaml.py

What stands at its default is left out, so that an object has what was decided and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Base of typed parts: fields in Python's spelling, written in Kubernetes'."""

    def to_dict(self) -> dict[str, Any]:
        """As Kubernetes has it."""
        plain: dict[str, Any] = to_plain(self)
        return plain


def to_plain(value: Any) -> Any:
    """Parts, mappings and tuples as plain data; what is None or empty in a mapping of ours stays."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    return value


class Metadata(Part, frozen=True, kw_only=True):
    """Names and labels of an object."""

    name: str
    namespace: str | None = None
    labels: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}


class Object(Part, frozen=True, kw_only=True):
    """One object. `body` is what stands beside kind and metadata: `{"spec": …}`, `{"data": …}`."""

    api_version: str
    kind: str
    metadata: Metadata
    body: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """As Kubernetes has it."""
        return {
            "apiVersion": self.api_version,
            "kind": self.kind,
            "metadata": self.metadata.to_dict(),
            **to_plain(self.body),
        }

    @property
    def key(self) -> tuple[str, str, str]:
        """(apiVersion, kind, name), which is unique in a namespace."""
        return (self.api_version, self.kind, self.metadata.name)
