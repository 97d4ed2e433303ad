"""Mistral: names before arguments, or a list, behind a token of its own.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]          up to tokenizer version 7
[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]add{"a": 1, "b": 2}        from version 11
[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}               version 11 to 13
"""

from __future__ import annotations

import re
from collections.abc import Callable
from secrets import choice
from string import ascii_letters, digits

from .forms import Form
from .tools import ToolParser, Tried, elements, read_arguments, read_call

_HEAD = re.compile(r"\s*(?P<name>[A-Za-z0-9_.-]+)(?:\[CALL_ID\](?P<id>[A-Za-z0-9]+))?(?:\[ARGS\])?\s*(?=\{)")
_HEAD_START = re.compile(r"\s*[A-Za-z0-9_.-]*(?:\[[A-Z_]*\]?[A-Za-z0-9]*)?(?:\[[A-Z]*\]?)?\s*")


class Mistral(ToolParser):
    """Ids have nine letters and digits: Mistral's templates refuse others in the history."""

    marks = ("[TOOL_CALLS]",)
    others = ("[CALL_ID]", "[ARGS]")
    form = Form(
        begin='{"name": "NAME", "arguments": ',
        end="}",
        separator=", ",
        before="[TOOL_CALLS] [",
        after="]",
        trigger="[TOOL_CALLS]",
        sure=False,
    )

    @classmethod
    def form_for(cls, has_token: Callable[[str], bool]) -> Form | None:
        """See ToolParser. Where a token for it is in the vocabulary, it stands between name and arguments."""
        if has_token("[ARGS]"):
            return Form(begin="[TOOL_CALLS]NAME[ARGS]", end="", trigger="[TOOL_CALLS]")
        return cls.form

    @staticmethod
    def new_id() -> str:
        """See ToolParser."""
        return "".join(choice(ascii_letters + digits) for _ in range(9))

    def _call(self) -> Tried:
        start = len(self.marks[0])
        at = yield from self._skip(start)
        if (yield from self._starts_with(at, ("[",))):
            return (yield from self._list(at))
        while not (head := _HEAD.match(self._buffer, start)):
            begun = _HEAD_START.match(self._buffer, start)
            if begun is not None and begun.end() < len(self._buffer):
                return False
            if not (yield from self._more()):
                return False
        if self._trusted:
            return (yield from self._streamed(head["name"], head.end()))
        end = yield from self._value(head.end())
        arguments = None if end < 0 else read_arguments(self._buffer[head.end() : end])
        if arguments is None:
            return False
        self._whole_call(head["name"], arguments, taken=end)
        return True

    def _list(self, at: int) -> Tried:
        """All calls in one list; if one of them is none, none is."""
        end = yield from self._value(at)
        calls = [] if end < 0 else [read_call(text) for text in elements(self._buffer[at:end])]
        found = [call for call in calls if call is not None]
        if not found or len(found) < len(calls):
            return False
        self._whole_calls(found, taken=end)
        return True
