"""Hermes and Qwen 2.5 / 3: JSON in tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import json

from .forms import Form
from .tools import ENVELOPE, ToolParser, Tried, read_call


class Hermes(ToolParser):
    """Several calls are several tags; the last end tag may be missing where the output ends."""

    marks = ("<tool_call>",)
    others = ("</tool_call>",)
    form = Form(
        begin='<tool_call>\n{"name": "NAME", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
        trigger="<tool_call>",
    )

    def _call(self) -> Tried:
        start = len(self.marks[0])
        if self._trusted:
            while not (head := ENVELOPE.match(self._buffer, start)):
                if not (yield from self._more()):
                    return False
            if not (yield from self._streamed(json.loads(head[1]), head.end())):
                return False
            at = yield from self._behind(0, ("}",))
            self._take((yield from self._behind(at, self.others)))
            return True
        end = yield from self._value(start)
        call = None if end < 0 else read_call(self._buffer[start:end])
        if call is None:
            return False
        self._whole_call(*call, taken=(yield from self._behind(end, self.others)))
        return True
