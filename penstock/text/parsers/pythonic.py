"""Llama 3.2 and 4, ToolACE and others: a list of Python's calls.

[get_weather(city="Paris"), add(a=1, b=2)]
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from .llama import Llama3Json
from .tools import ToolParser, Tried, dump

_HEAD = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")
_HEAD_START = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*)?")
_PLAIN = re.compile(r"""[^"'\[\](){}]*""")
_STRING = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_CONSTANTS = {"true": True, "false": False, "null": None}
"""JSON's, which models write, too."""
_LONGEST = 1 << 20
"""Characters of a list that is parsed."""


class Pythonic(ToolParser):
    """The list may stand anywhere in the text; a token of Llama 4 before and behind it is left out."""

    marks = ("<|python_start|>[", "<|python_tag|>[", "[")
    forced = Llama3Json
    others = ("<|python_start|>", "<|python_tag|>", "<|python_end|>")

    def _call(self) -> Tried:
        start = self._buffer.index("[")
        while not _HEAD.match(self._buffer, start):
            begun = _HEAD_START.match(self._buffer, start)
            if begun is None or begun.end() < len(self._buffer) or not (yield from self._more()):
                return False
        walk = _Brackets(start)
        while not walk.run(self._buffer):
            if walk.broken or not (yield from self._more()):
                return False
        calls = read_calls(self._buffer[start : walk.at])
        if not calls:
            return False
        at = yield from self._skip(walk.at)
        closing = yield from self._starts_with(at, ("<|python_end|>",))
        self._whole_calls(calls, taken=walk.at if closing is None else at + len(closing))
        return True


class _Brackets:
    """Finds the bracket that closes a list."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.broken = False
        self._open: list[str] = []
        self._quote = ""

    def run(self, text: str) -> bool:
        """Go on with the text, which has grown; whether the list is closed, before `at`."""
        while self.at < len(text):
            if self._quote:
                body = _STRING[self._quote].match(text, self.at)
                self.at = body.end() if body else self.at
                if self.at >= len(text) or (text[self.at] == "\\" and self.at + 1 >= len(text)):
                    return False
                if text[self.at] == "\\":
                    self.at += 2
                    continue
                self._quote = ""
                self.at += 1
                continue
            plain = _PLAIN.match(text, self.at)
            self.at = plain.end() if plain else self.at
            if self.at >= len(text):
                return False
            character = text[self.at]
            self.at += 1
            if character in _STRING:
                self._quote = character
            elif character in _CLOSING:
                self._open.append(_CLOSING[character])
            elif not self._open or self._open.pop() != character:
                self.broken = True
                return False
            elif not self._open:
                return True
        return False


def read_calls(text: str) -> list[tuple[str, str]]:
    """(name, JSON of the arguments) of each call in a list of Python's; [] where one of them is none."""
    if len(text) > _LONGEST:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        return [_read(call) for call in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def literal(text: str) -> Any:
    """A value of Python's that JSON has, too. Raises ValueError."""
    if len(text) > _LONGEST:
        raise ValueError("too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None


def _read(call: ast.expr) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("no call with named arguments")
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("no named argument")
        arguments[keyword.arg] = _value(keyword.value)
    return _name(call.func), dump(arguments)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    raise ValueError("no name")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_value, node.values), strict=True))
    raise ValueError("no value that JSON has")
