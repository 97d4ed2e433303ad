"""System prompts in Python: text that changes before text that stays."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterable, Iterator, Sequence

from .python_names import Names, chain

LEAST = 40
"""Characters of text that stays, behind what changes, from which it is a loss: blocks have 16 tokens."""

_CALLS = re.compile(
    r"(^|\.)(now|utcnow|today|time|time_ns|monotonic|strftime|isoformat|ctime|uuid1|uuid4|random|randint|choice|token_hex|"
    r"getpid|gethostname)$"
)
_NAMES = re.compile(
    r"(^|_)(user|username|session|request|date|today|now|timestamp|query|question|uuid|customer|email|context|"
    r"documents|docs|chunks|history)($|_)",
    re.IGNORECASE,
)


def dynamic(nodes: Iterable[ast.AST], names: Names) -> Iterator[tuple[ast.AST, str]]:
    """System prompts whose beginning changes, and why."""
    for node in nodes:
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("instructions", "system", "system_prompt", "system_message"):
                    yield from _prompt(keyword.value, names)
        elif isinstance(node, ast.List):
            roles = [_role(item, names) for item in node.elts]
            for index, (item, role) in enumerate(zip(node.elts, roles, strict=True)):
                if role not in ("system", "developer") or not isinstance(item, ast.Dict):
                    continue
                content = _content(item)
                if content is None:
                    continue
                if "user" in roles[:index]:
                    yield content, "The system prompt stands behind the user's message."
                else:
                    yield from _prompt(content, names)


def _role(node: ast.expr, names: Names) -> str:
    value = names.value(node) if isinstance(node, ast.Dict) else None
    role = value.get("role") if isinstance(value, dict) else None
    return role if isinstance(role, str) else ""


def _content(node: ast.Dict) -> ast.expr | None:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "content":
            return value
    return None


def _prompt(node: ast.expr, names: Names) -> Iterator[tuple[ast.AST, str]]:
    parts = list(_parts(names.resolve(node), names))
    for index, part in enumerate(parts):
        if isinstance(part, str):
            continue
        if not _changes(part, names):
            continue
        rest = sum(len(each) for each in parts[index + 1 :] if isinstance(each, str))
        if rest >= LEAST:
            yield node, f"{ast.unparse(part)[:40]} stands before {rest} characters that stay."
        return


def _parts(node: ast.expr, names: Names, depth: int = 0) -> Iterator[str | ast.expr]:
    """A text in pieces: those that stay as strings, what is put in as expressions."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield str(value.value) if isinstance(value, ast.Constant) else getattr(value, "value", value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and depth < 50:
        yield from _parts(names.resolve(node.left), names, depth + 1)
        yield from _parts(names.resolve(node.right), names, depth + 1)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
        and isinstance(template := names.resolve(node.func.value), ast.Constant)
        and isinstance(template.value, str)
    ):
        yield from _formatted(template.value, node)
    else:
        yield node


def _formatted(template: str, call: ast.Call) -> Iterator[str | ast.expr]:
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    positional: Sequence[ast.expr] = call.args
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError:
        return
    number = 0
    for text, name, _, _ in pieces:
        yield text
        if name is None:
            continue
        first = re.split(r"[.\[]", name)[0]
        if first == "" or first.isdigit():
            index = int(first[:6]) if first else number
            number += 1
            if index < len(positional):
                yield positional[index]
        elif first in given:
            yield given[first]


def _changes(node: ast.expr, names: Names) -> bool:
    """Whether an expression differs from request to request, as far as its names tell."""
    node = names.resolve(node)
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and _CALLS.search(chain(each.func)):
            return True
        if isinstance(each, ast.Name) and not each.id.isupper():
            resolved = names.resolve(each)
            if resolved is not each:
                if isinstance(resolved, ast.Call) and _CALLS.search(chain(resolved.func)):
                    return True
                continue
            if _NAMES.search(each.id) and (each.id in names.parameters or "user" in each.id):
                return True
            if each.id in names.parameters and _NAMES.search(each.id):
                return True
        if (
            isinstance(each, ast.Attribute)
            and _NAMES.search(each.attr)
            and chain(each).partition(".")[0] in names.parameters
        ):
            return True
    return False
