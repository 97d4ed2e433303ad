"""What names and expressions of a Python text are, where that can be known without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, Final


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = _Unknown()
"""A value that is not known."""
_MOST_DEPTH = 20
_CHANGES = frozenset("update pop setdefault append extend insert clear popitem add".split())
_LIBRARIES = frozenset(("requests", "httpx", "aiohttp"))
_SESSIONS = frozenset(("Session", "Client", "AsyncClient", "ClientSession"))


def chain(node: ast.expr) -> str:
    """`client.chat.completions.create` of an expression; what is no name in it is left out."""
    parts: list[str] = []
    current: ast.expr = node
    while True:
        if isinstance(current, ast.Attribute):
            parts.append(current.attr)
            current = current.value
        elif isinstance(current, ast.Call):
            current = current.func
        elif isinstance(current, ast.Name):
            parts.append(current.id)
            break
        else:
            break
    return ".".join(reversed(parts))


class Names:
    """The names of a text that are assigned once, and what is imported."""

    def __init__(self, nodes: Iterable[ast.AST]) -> None:
        self.parameters: set[str] = set()
        """Of functions, and what loops and `with` bind: they differ from time to time."""
        self._values: dict[str, ast.expr] = {}
        self._sessions: set[str] = set()
        self._from: dict[str, str] = {}
        bound: dict[str, int] = {}
        changed: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                bound[node.id] = bound.get(node.id, 0) + 1
            elif isinstance(node, ast.arg):
                bound[node.arg] = bound.get(node.arg, 0) + 2
                self.parameters.add(node.arg)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    self._from[alias.asname or alias.name.partition(".")[0]] = module or alias.name
            if (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                self._values[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                self._values[node.target.id] = node.value
            elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
                self.parameters |= {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}
            elif isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
                if _is_session(node.context_expr):
                    self._sessions.add(node.optional_vars.id)
            elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(
                node.ctx, ast.Store | ast.Del
            ):
                changed.add(chain(node.value).partition(".")[0])
            elif isinstance(node, ast.AugAssign):
                changed.add(chain(node.target).partition(".")[0])
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _CHANGES
            ):
                changed.add(chain(node.func).partition(".")[0])
        self._sessions |= {name for name, value in self._values.items() if _is_session(value)}
        self._sessions -= changed
        self._values = {
            name: value
            for name, value in self._values.items()
            if bound.get(name) == 1 and name not in changed
        }

    def imported(self, node: ast.expr, package: str) -> bool:
        """Whether the first name of an expression comes from a package."""
        module = self._from.get(chain(node).partition(".")[0], "")
        return module == package or module.startswith(package + ".")

    def resolve(self, node: ast.expr) -> ast.expr:
        """The expression that a name stands for, if it is assigned once; else the name."""
        for _ in range(_MOST_DEPTH):
            if not isinstance(node, ast.Name) or node.id not in self._values:
                break
            node = self._values[node.id]
        return node

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """A constant, a dict with unknown values as UNKNOWN (and `...` where more may come), or UNKNOWN."""
        node = self.resolve(node)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.value(node.operand, depth + 1) if depth < _MOST_DEPTH else UNKNOWN
            return -value if isinstance(value, int | float) else UNKNOWN
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and depth < _MOST_DEPTH:
            left, right = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
            small = isinstance(left, int) and isinstance(right, int) and abs(left) < 1 << 40 > abs(right)
            return left * right if small else UNKNOWN
        if isinstance(node, ast.Dict) and depth < _MOST_DEPTH:
            result: dict[str, Any] = {}
            for key, each in zip(node.keys, node.values, strict=True):
                name = self.value(key, depth + 1) if key is not None else "..."
                if isinstance(name, str):
                    result[name] = self.value(each, depth + 1) if name != "..." else UNKNOWN
                else:
                    result["..."] = UNKNOWN
            return result
        if isinstance(node, ast.Call) and chain(node.func) == "dict" and not node.args:
            return {keyword.arg or "...": self.value(keyword.value, depth + 1) for keyword in node.keywords}
        return UNKNOWN

    def text(self, node: ast.expr) -> str:
        """A string; what is put into it, and what is not known, as `$x`."""
        node = self.resolve(node)
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(
                str(part.value) if isinstance(part, ast.Constant) else "$x" for part in node.values
            )
        return "$x"

    def tail(self, node: ast.expr) -> str | None:
        """How a string ends: of f-strings and sums the last piece; None if that is not known."""
        for _ in range(_MOST_DEPTH):
            node = self.resolve(node)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                node = node.right
            elif isinstance(node, ast.JoinedStr) and node.values:
                node = node.values[-1]
            else:
                break
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    def is_bare_sender(self, node: ast.expr) -> bool:
        """Whether a call goes out with the headers that stand with it, and no others: `requests.post`, or a
        session that was made in this text without any."""
        first = chain(node).partition(".")[0]
        return first in self._sessions or self._from.get(first, "") in _LIBRARIES


def _is_session(node: ast.expr) -> bool:
    """Whether a session is made, without headers and the like."""
    if not isinstance(node, ast.Call) or chain(node.func).rpartition(".")[2] not in _SESSIONS:
        return False
    return not any(keyword.arg in (None, "headers", "auth", "cookies") for keyword in node.keywords)
