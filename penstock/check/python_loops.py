"""Loops around calls of models that nothing ends but the model's answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from .python_names import chain

_BOUND = re.compile(
    r"(?:^|_)(?:max|limit|budget|step|steps|turn|turns|attempt|attempts|deadline|remaining|retries|retry|iteration|"
    r"iterations|round|rounds|count|counter|timeout|elapsed|spent|cost|quota|tries|hops|depth|i|n)(?:$|_|s$)",
    re.IGNORECASE,
)
_WAITS = frozenset(
    "input prompt readline recv receive receive_text receive_json receive_bytes accept poll anext blpop "
    "brpop get_message consume getch wait_for_message ask_user".split()
)
_QUEUES = re.compile(
    r"queue|inbox|(^|_)q$|channel|pubsub|consumer|subscription|websocket|(^|_)ws$|sock", re.IGNORECASE
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def loops(nodes: Sequence[ast.AST], calls: Sequence[ast.Call]) -> Iterator[ast.stmt]:
    """Loops without an end of their own around one of these calls, or around a function of this text that
    makes one.

    People and queues end loops, too: one that waits for them is none. So does a loop whose normal way leads
    out of it (a retry).
    """
    if not calls:
        return
    wanted = set(map(id, calls))
    callers = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(id(each) in wanted for each in ast.walk(node))
    }
    for node in nodes:
        if isinstance(node, ast.While):
            endless = not _bounds(node.test)
        elif isinstance(node, ast.For | ast.AsyncFor):
            endless = isinstance(node.iter, ast.Call) and chain(node.iter.func) in (
                "itertools.count",
                "count",
            )
        else:
            continue
        if not endless:
            continue
        inside = [each for each in _within(node) if isinstance(each, ast.Call)]
        asks = any(
            id(each) in wanted
            or (
                isinstance(each.func, ast.Name | ast.Attribute)
                and chain(each.func).rpartition(".")[2] in callers
            )
            for each in inside
        )
        if asks and not any(map(_waits, inside)) and not _ends(node):
            yield node


def _within(loop: ast.While | ast.For | ast.AsyncFor) -> Iterator[ast.AST]:
    """Nodes that run in the loop; not those of functions that are defined in it."""
    stack: list[ast.AST] = [*loop.body, *([loop.test] if isinstance(loop, ast.While) else [])]
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, _FUNCTIONS):
            stack.extend(ast.iter_child_nodes(node))


def _waits(call: ast.Call) -> bool:
    name = chain(call.func)
    before, _, last = name.rpartition(".")
    return last in _WAITS or (
        last in ("get", "pop", "read", "next", "popleft") and _QUEUES.search(before) is not None
    )


def _bounds(test: ast.expr) -> bool:
    """Whether a condition counts: it compares sizes, or names a budget."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and any(
            isinstance(each, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for each in node.ops
        ):
            return True
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name and _BOUND.search(name):
            return True
    return False


def _ends(loop: ast.While | ast.For | ast.AsyncFor) -> bool:
    """Whether the body leaves the loop on its normal way, or under a condition that counts."""
    stack: list[tuple[ast.AST, bool]] = [(each, True) for each in loop.body]
    while stack:
        node, always = stack.pop()
        if isinstance(node, ast.Break | ast.Return | ast.Raise):
            if always:
                return True
            continue
        if isinstance(node, _FUNCTIONS):
            continue
        if isinstance(node, ast.If):
            counted = _bounds(node.test)
            stack += [(each, counted) for each in (*node.body, *node.orelse)]
        elif isinstance(node, ast.Try):
            stack += [(each, always) for each in (*node.body, *node.orelse, *node.finalbody)]
            stack += [(each, False) for handler in node.handlers for each in handler.body]
        elif isinstance(node, ast.With | ast.AsyncWith):
            stack += [(each, always) for each in node.body]
        elif isinstance(node, ast.Match):
            stack += [(each, False) for case in node.cases for each in case.body]
        elif isinstance(node, ast.For | ast.AsyncFor | ast.While):
            # a break in there ends the inner loop only
            stack += [(each, False) for each in node.body if not isinstance(each, ast.Break)]
    return False
