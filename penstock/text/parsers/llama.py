"""Llama 3.x: JSON in the open.

{"name": "get_weather", "parameters": {"city": "Paris"}}
<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}
"""

from __future__ import annotations

import json
import re

from .forms import Form
from .machine import Run
from .tools import ENVELOPE, ToolParser, Tried, read_call

_HEAD = re.compile(r'\{\s*"(?:name|type|parameters|arguments)"\s*:')
_HEAD_START = re.compile(r'\{\s*(?:"[a-z]{0,10}(?:"\s*:?)?)?')


class Llama3Json(ToolParser):
    """An object with a name and parameters (or arguments), anywhere in the text. Other objects are text."""

    marks = ("<|python_tag|>", "{")
    form = Form(
        begin='{"name": "NAME", "parameters": ', end="}", separator="; ", trigger='{"name": ', sure=False
    )

    def _call(self) -> Tried:
        start = 0
        if self._buffer.startswith(self.marks[0]):
            start = yield from self._skip(len(self.marks[0]))
        while not (head := _HEAD.match(self._buffer, start)):  # most braces are no calls: they need not wait
            begun = _HEAD_START.match(self._buffer, start)
            if self._buffer[start:] and (begun is None or begun.end() < len(self._buffer)):
                return False
            if not (yield from self._more()):
                return False
        if self._trusted:
            while not (named := ENVELOPE.match(self._buffer, head.start())):
                if not (yield from self._more()):
                    return False
            if not (yield from self._streamed(json.loads(named[1]), named.end())):
                return False
            self._take((yield from self._behind(0, ("}",))))
            return True
        end = yield from self._value(head.start())
        call = None if end < 0 else read_call(self._buffer[head.start() : end], bare=True)
        if call is None:
            return False
        self._whole_call(*call, taken=end)
        return True

    def _after(self) -> Run:
        """Between calls stands a semicolon."""
        at = yield from self._skip(0)
        if (yield from self._starts_with(at, (";",))):
            behind = yield from self._skip(at + 1)
            if behind == len(self._buffer) or (yield from self._starts_with(behind, self.marks)):
                self._take(behind)
                return
        yield from super()._after()
