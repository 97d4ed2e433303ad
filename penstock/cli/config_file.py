"""Flags in a YAML file, as vLLM's `--config` has them: keys are the names of flags.

    model: Qwen/Qwen3-0.6B
    max-model-len: 8192
    enable-prefix-caching: false      # --no-enable-prefix-caching
    served-model-name: [qwen, small]
    compilation-config: {mode: 3}     # JSON

It knows YAML and how arguments are written; it does not know the flags.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any


def read_config(file: str, switches: Container[str]) -> list[tuple[str, list[str]]]:
    """Each key of the file with its command line arguments, in their order.

    Args:
        switches: the spellings of all flags: one with a `--no-` twin takes true and false.

    Raises ValueError, naming the file and the line or key: it cannot be read, or is no mapping of flags.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that stands twice: the first would be dropped in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: list[Any] = []  # a key need not be hashable
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ValueError(
                        f"{file}: line {key_node.start_mark.line + 1}: {key} stands there twice."
                    )
                seen.append(key)
            return super().construct_mapping(node, deep)

    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        loaded = yaml.load(text, Loader)
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file}: not UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{file}: {where}{getattr(error, 'problem', None) or error}.") from error
    if loaded is None:
        return []
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: write one flag a line, such as `max-model-len: 8192`.")
    entries: dict[str, Any] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or key.startswith("-"):
            raise ValueError(f"{file}: {key!r} is not the name of a flag, such as max-model-len.")
        _put(entries, key, value, file)
    if "config" in entries:
        raise ValueError(f"{file}: config: a file cannot name another.")
    return [(key, _arguments(key, value, switches)) for key, value in entries.items()]


def _put(entries: dict[str, Any], key: str, value: Any, file: str) -> None:
    """`a.b: 1` is `a: {b: 1}`."""
    name, *path = key.split(".")
    *parents, last = [name.replace("_", "-"), *path]
    for parent in parents:
        entries = entries.setdefault(parent, {})
        if not isinstance(entries, dict):
            raise ValueError(f"{file}: {key}: {parent} is given in one piece already.")
    if last in entries:
        raise ValueError(f"{file}: {key} stands there twice.")
    entries[last] = value


def _arguments(key: str, value: Any, switches: Container[str]) -> list[str]:
    if isinstance(value, bool) and f"--no-{key}" in switches:
        return [f"--{key}" if value else f"--no-{key}"]
    if value is True and key.startswith("no-") and f"--{key}" in switches:
        return [f"--{key}"]  # as in vLLM; `no-x: false` would say nothing
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return [f"--{key}={_text(item)}" for item in value]
    return [f"--{key}={_text(value)}"]


def _text(value: Any) -> str:
    """As it would stand on the command line: `true`, `None`, JSON for what is nested."""
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)
