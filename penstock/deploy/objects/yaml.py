"""Plain data as YAML that every reader of Kubernetes reads alike.

Keys keep their order. Texts that a YAML 1.1 or 1.2 reader could take for something else (`1e3`, `on`, `0o7`)
are quoted; several lines are a literal block, where YAML allows one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0[ob][0-7_]+|\.?[0-9][0-9_.:]*([eE][-+]?[0-9]+)?)")
"""What some reader takes for a number."""
_WIDTH = 110


_Base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's, which is nine times as fast, and in every wheel of PyYAML."""


class _Dumper(_Base):  # type: ignore[misc]
    """Without anchors: who reads a manifest shall not look for what is meant."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    if "\n" in value and not any(line != line.rstrip() for line in value.split("\n")):
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|")
    if value and _NUMBER.fullmatch(value):
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"')
    return dumper.represent_scalar("tag:yaml.org,2002:str", value)


_Dumper.add_representer(str, _text)


def dump(data: Mapping[str, Any]) -> str:
    """One document."""
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=False
    )
    return text


def dump_all(documents: Iterable[Mapping[str, Any]], header: str = "") -> str:
    """Several documents of one file, beneath a comment."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return comment + "---\n".join(dump(document) for document in documents)
