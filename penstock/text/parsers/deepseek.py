"""DeepSeek V3 and R1 (0528), and V3.1: tokens of their own around each call.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Paris"}
```<｜tool▁call▁end｜>
<｜tool▁call▁begin｜>…<｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>…

The last line is V3.1's.
"""

from __future__ import annotations

import re
from typing import ClassVar

from .forms import Form
from .machine import Run
from .tools import ToolParser, Tried, read_arguments

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_NAME = r"(?P<name>[A-Za-z0-9_.-]+)"


class DeepSeekV3(ToolParser):
    """Between the outer tokens, any number of calls."""

    marks = (CALLS, CALL)
    others = (CALLS_END, CALL_END, SEPARATOR)
    form = Form(
        begin=f"{CALL}function{SEPARATOR}NAME\n```json\n",
        end=f"\n```{CALL_END}",
        separator="\n",
        before=CALLS,
        after=CALLS_END,
        trigger=CALLS,
    )
    head: ClassVar[re.Pattern[str]] = re.compile(
        rf"(?:{CALLS}\s*)?{CALL}[a-z]*{re.escape(SEPARATOR)}{_NAME}\s*```(?:json)?\s*(?=\{{)"
    )
    tail: ClassVar[tuple[str, ...]] = ("```", CALL_END)
    _longest_head = 512
    """Characters; what has no end by then is no call."""

    def _call(self) -> Tried:
        while not (head := self.head.match(self._buffer)):
            if len(self._buffer) > self._longest_head or not (yield from self._more()):
                return False
        if self._trusted:
            if not (yield from self._streamed(head["name"], head.end())):
                return False
            end = 0
        else:
            end = yield from self._value(head.end())
            arguments = None if end < 0 else read_arguments(self._buffer[head.end() : end])
            if arguments is None:
                return False
        for part in self.tail:
            end = yield from self._behind(end, (part,))
        if self._trusted:
            self._take(end)
        else:
            self._whole_call(head["name"], arguments or "{}", taken=end)
        return True

    def _after(self) -> Run:
        self._take((yield from self._behind(0, (CALLS_END,))))
        yield from super()._after()


class DeepSeekV31(DeepSeekV3):
    """Name and arguments with a token between them."""

    head = re.compile(rf"(?:{CALLS}\s*)?{CALL}{_NAME}\s*{re.escape(SEPARATOR)}\s*(?=\{{)")
    tail = (CALL_END,)
    form = Form(begin=f"{CALL}NAME{SEPARATOR}", end=CALL_END, before=CALLS, after=CALLS_END, trigger=CALLS)
