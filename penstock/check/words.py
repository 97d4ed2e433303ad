"""What can be said of a word without running anything."""

from __future__ import annotations

import re
from enum import Enum, auto

from .finding import Word


class Place(Enum):
    """Where a command runs."""

    SHELL = auto()
    """On somebody's machine: what it binds to, others reach."""
    CONTAINER = auto()
    """In a container of one machine: others reach what is published."""
    POD = auto()
    """In a pod: Services and NetworkPolicies say who reaches it."""


_PLACEHOLDER = re.compile(
    r"^$|^<.*>$|^\[.*\]$|^\{.*\}$|\.\.\.|…|(^|[_\W])(your|my|xxx+|changeme|change-me|replace|placeholder|example|dummy|"
    r"fake|todo|redacted|secret|token|key|none|null|test|empty|unused|ignored)([_\W]|$)",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|sk-ant-[A-Za-z0-9_-]{8,}|gsk_[A-Za-z0-9]{16,}|AIza[A-Za-z0-9_-]{30,}|"
    r"xai-[A-Za-z0-9]{16,}|nvapi-[A-Za-z0-9_-]{16,}|r8_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|ghp_[A-Za-z0-9]{16,})"
)


def is_unknown(text: str) -> bool:
    """Whether a word is something else when it runs: variables, substitutions, templates, placeholders."""
    return "$" in text or "`" in text or "{{" in text or (text.startswith("<") and text.endswith(">"))


def is_placeholder(text: str) -> bool:
    """Whether somebody shall write something else here, as in `hf_YOUR_TOKEN_HERE`."""
    return _PLACEHOLDER.search(text) is not None


def secret_in(text: str) -> str | None:
    """The beginning of a key that stands in a text; None if there is none that looks like one."""
    found = _SECRET.search(text)
    if found is None or is_placeholder(re.sub(r"^(sk|hf|gsk)[-_]", "", found[1])):
        return None
    if not any(map(_is_random, re.split(r"[-_]", found[1]))):  # words, as in sk-synthetic-stream
        return None
    return f"{found[1][:6]}…"


def _is_random(text: str) -> bool:
    """Whether a text looks drawn by lot: long, of many letters, with digits or in both cases."""
    mixed = any(map(str.isdigit, text)) or (text.lower() != text and text.upper() != text)
    return len(text) >= 12 and len(set(text)) >= 8 and mixed


def part(word: Word, start: int, text: str) -> Word:
    """A part of a word, with its own place, as the value of `--flag=value`."""
    return Word(text, word.line, word.column + start)
