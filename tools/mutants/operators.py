"""What is changed in a file: one small fault at a time, each at one place.

Most operators are those of mutmut (`mutmut.mutation.mutators`): operators, comparisons at their borders,
numbers, constants, keyword arguments, branches of a conditional expression. Some of ours go with them, as
mutmut has none: a statement that is left out, a branch that is never or always taken, an operand that is left
out, the smallest for the largest.

Left alone: what is no behaviour (annotations, docstrings, words of a message: strings with a space in them),
what nobody can call (`__all__`, `if TYPE_CHECKING`), what mypy finds (None in the place of a value, a missing
positional argument), and `strict=` of zip, an assertion.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation import mutators


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: of the file, relative to the repository.
        number: of the mutant in its file.
        function: qualified name of the innermost function or class around it, "" at the level of the module.
        lines: first and last of the innermost simple statement, or of the header of the compound one.
        body: first and last of that function.
    """

    path: str
    number: int
    function: str
    lines: tuple[int, int]
    body: tuple[int, int]


_Fault = tuple[Mutant, cst.CSTNode, cst.CSTNode, int | None]
"""(mutant, node, what stands there instead, where the node begins in the text if that is known)"""


@lru_cache(maxsize=4)
def _faults(root: Path, path: str) -> tuple[cst.Module, str, list[_Fault]]:
    text = (root / path).read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    visitor = _Visitor(path, text)
    wrapper.visit(visitor)
    return wrapper.module, text, visitor.found


def mutants_of(root: Path, path: str) -> list[Mutant]:
    """All of a file, in the order of the text."""
    return [fault[0] for fault in _faults(root, path)[2]]


def apply(root: Path, mutant: Mutant) -> tuple[str, str]:
    """The file with the fault, and the difference (its lines only, without numbers)."""
    module, before, found = _faults(root, mutant.path)
    _, node, replacement, offset = found[mutant.number]
    old = _code(node)
    if offset is not None and before.startswith(old, offset):
        source = before[:offset] + _code(replacement) + before[offset + len(old) :]
    else:
        source = cst.ensure_type(module.deep_replace(node, replacement), cst.Module).code
    changed = [
        line
        for line in difflib.unified_diff(before.splitlines(), source.splitlines(), lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    return source, "\n".join(line[0] + " " + line[1:].strip() for line in changed)


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str, text: str) -> None:
        super().__init__()
        self.found: list[_Fault] = []
        self._path = path
        self._starts = [0]
        for line in text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scopes: list[tuple[str, tuple[int, int]]] = []
        self._statements: list[tuple[int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Decorator)) or _says_nothing(node) or _asserts(node):
            return False
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._scopes.append((node.name.value, self._span(node)))
        if isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement, cst.Lambda)):
            self._statements.append(self._header(node))
        seen = set()
        for target, replacement in _faulty(node):
            code = _code(replacement)
            if code not in seen and code != _code(target):
                seen.add(code)
                self.found.append((self._mutant(), target, replacement, self._offset(target)))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, (cst.Annotation, cst.Decorator)) or _says_nothing(original_node):
            return
        if isinstance(original_node, (cst.FunctionDef, cst.ClassDef)):
            self._scopes.pop()
        if isinstance(original_node, (cst.SimpleStatementLine, cst.BaseCompoundStatement, cst.Lambda)):
            self._statements.pop()

    def _mutant(self) -> Mutant:
        name = ".".join(name for name, _ in self._scopes)
        lines = self._statements[-1] if self._statements else (1, 1)
        body = self._scopes[-1][1] if self._scopes else (0, 0)
        return Mutant(self._path, len(self.found), name, lines, body)

    def _offset(self, node: cst.CSTNode) -> int | None:
        if isinstance(node, cst.BaseStatement) or (place := self._place(node)) is None:
            return None
        parentheses = sum(len(_code(each)) for each in getattr(node, "lpar", ()))
        return self._starts[place.start.line - 1] + place.start.column - parentheses

    def _place(self, node: cst.CSTNode) -> CodeRange | None:
        return self.get_metadata(PositionProvider, node, None)

    def _span(self, node: cst.CSTNode) -> tuple[int, int]:
        place = self.get_metadata(PositionProvider, node)
        return place.start.line, place.end.line

    def _header(self, node: cst.CSTNode) -> tuple[int, int]:
        first, last = self._span(node)
        if isinstance(node, cst.BaseCompoundStatement) and isinstance(node.body, cst.BaseSuite):
            last = max(first, self._span(node.body)[0] - 1)
        return first, last


def _code(node: cst.CSTNode) -> str:
    return _EMPTY.code_for_node(node)


_EMPTY = cst.Module([])


def _says_nothing(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.SimpleStatementLine):
        first = node.body[0]
        if isinstance(first, cst.Expr) and isinstance(first.value, cst.BaseString):
            return True  # a docstring
        return m.matches(first, m.Assign(targets=[m.AssignTarget(m.Name("__all__"))]))
    return m.matches(node, m.If(test=m.Name("TYPE_CHECKING")))


def _faulty(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    """(it or a part of it, what stands there instead)"""
    for kind, operator in _OPERATORS:
        if isinstance(node, kind):
            yield from ((node, replacement) for replacement in operator(node))
    if isinstance(node, (cst.If, cst.While)):  # never taken; taken always (a loop would have no end)
        yield node.test, cst.Name("False")
        if isinstance(node, cst.If):
            yield node.test, cst.Name("True")
    if (
        isinstance(node, cst.SimpleStatementLine)
        and len(node.body) == 1
        and m.matches(node.body[0], _LEFT_OUT)
    ):
        yield node.body[0], cst.Pass()


def _string(node: cst.SimpleString) -> Iterable[cst.CSTNode]:
    """Another string, where it is a name or a key; words of a message are no behaviour."""
    value = node.raw_value
    if " " in value or node.quote not in ('"', "'"):
        return
    yield node.with_changes(value=f"{node.prefix}{node.quote}XX{value}XX{node.quote}")


def _argument(node: cst.Call) -> Iterable[cst.CSTNode]:
    """Without a keyword argument."""
    for place, argument in enumerate(node.args):
        if argument.keyword is not None and not _asserts(argument):
            yield node.with_changes(args=[*node.args[:place], *node.args[place + 1 :]])


def _asserts(node: cst.CSTNode) -> bool:
    """`zip(…, strict=True)` says that lengths are equal: where they are, nothing changes without it."""
    return m.matches(node, m.Arg(keyword=m.Name("strict")))


def _operand(node: cst.BinaryOperation | cst.BooleanOperation) -> Iterable[cst.CSTNode]:
    """Without its right side, or its left one where they weigh the same."""
    if isinstance(node.operator, (cst.Add, cst.Subtract, cst.Multiply, cst.And, cst.Or)):
        yield node.left
    if isinstance(node.operator, (cst.And, cst.Or)):
        yield node.right


def _extreme(node: cst.Name) -> Iterable[cst.CSTNode]:
    other = {"min": "max", "max": "min", "any": "all", "all": "any"}.get(node.value)
    if other is not None:
        yield node.with_changes(value=other)


_LEFT_OUT = m.Expr(m.Call() | m.Await()) | m.AugAssign() | m.Del() | m.Assert()
"""Statements that may be left out."""
_REPLACED = {
    mutators.operator_string,
    mutators.operator_arg_removal,
    mutators.operator_assignment,
    mutators.operator_augmented_assignment,
}
_OPERATORS = [
    *((kind, each) for kind, each in mutators.mutation_operators if each not in _REPLACED),
    (cst.SimpleString, _string),
    (cst.Call, _argument),
    ((cst.BinaryOperation, cst.BooleanOperation), _operand),
    (cst.Name, _extreme),
]
