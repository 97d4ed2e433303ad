"""The base of the parsers of tool calls: text, and calls in it, of which each family has its own form.

    text ─▶ mark ─▶ head with the name ─▶ arguments, a JSON value ─▶ tail ─▶ text …
            └────────────── one call; what turns out to be none is text ──┘

A call is given out when all of it is there, since what has been sent to a client cannot be taken back, and a
call that breaks off is text. Where a grammar has made the model write whole calls (`trusted`), its parts are
given out as they come. White space between text and calls belongs to neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias
from uuid import uuid4

import msgspec

from .forms import Form
from .json_value import JsonScanner
from .machine import Machine, Run
from .pieces import Arguments, CallBegin, CallEnd, Piece

Tried: TypeAlias = Generator[None, None, bool]
"""An attempt to read a call at the beginning of the buffer; False, with nothing taken, where there is
none."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of its arguments; {} for a tool without."""
    description: str = ""
    strict: bool | None = None
    """Whether the arguments are to follow the schema in any case."""


def new_id() -> str:
    """An id as OpenAI's."""
    return f"call_{uuid4().hex[:24]}"


class ToolParser(Machine):
    """Splits an answer into Texts and calls."""

    marks: ClassVar[tuple[str, ...]] = ()
    """What calls begin with."""
    form: ClassVar[Form | None] = None
    """How a grammar writes them. None: those of `forced`, who also reads them."""
    forced: ClassVar[type[ToolParser] | None] = None
    others: ClassVar[tuple[str, ...]] = ()
    """What else calls are marked with."""
    thinking: bool = False
    """Whether the answer is inside of a thought: only where calls and thoughts are read in one."""

    def __init__(
        self,
        tools: Sequence[Tool] = (),
        *,
        trusted: bool = False,
        single: bool = False,
        ids: Callable[[], str] | None = None,
    ) -> None:
        """Start.

        Args:
            tools: those of the request.
            trusted: a grammar lets the model write nothing but whole calls.
            single: no second call: what follows the first one is left out.
            ids: makes the ids of calls.
        """
        self.calls = 0
        """How many have begun."""
        self._whole = 0
        self._closed = 0
        self._tools = {tool.name: tool for tool in tools}
        self._trusted = trusted
        self._single = single
        self._new_id = ids or self.new_id
        super().__init__()

    @classmethod
    def all_marks(cls) -> tuple[str, ...]:
        """See Machine."""
        return cls.marks + cls.others

    @classmethod
    def form_for(cls, has_token: Callable[[str], bool]) -> Form | None:
        """How a grammar writes calls of a model with this vocabulary."""
        return cls.form

    @staticmethod
    def new_id() -> str:
        """The id of a call."""
        return new_id()

    @property
    def satisfied(self) -> bool:
        """Nothing that follows will be given out."""
        return self._single and self._whole == 1

    @property
    def cut(self) -> bool:
        """Whether a call has begun and not ended."""
        return self.calls > self._closed

    def push(self, text: str) -> list[Piece]:
        """See Machine."""
        return [] if self.satisfied else super().push(text)

    def _run(self) -> Run:
        while True:
            mark = yield from self._until(self.marks, framed=True)
            if mark is None:
                return
            if (yield from self._call()):
                self._whole += 1
                yield from self._after()
                if self.satisfied:
                    return
            elif self._buffer:  # it is text, and what follows it is looked at anew
                self._say(self._framing + self._take(len(mark)))

    def _call(self) -> Tried:
        """Read one call, its mark first. May be several calls, where one mark stands before all of them."""
        raise NotImplementedError

    def _after(self) -> Run:
        """Behind a call: take white space, unless text follows it."""
        at = yield from self._skip(0)
        if at == len(self._buffer) or (yield from self._starts_with(at, self.marks)):
            self._take(at)

    # ---- what calls are put together from ----
    def _begin(self, name: str) -> None:
        self._out.append(CallBegin(self.calls, self._new_id(), name))
        self.calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._out.append(Arguments(self.calls - 1, text))

    def _end(self, taken: int) -> None:
        self._take(taken)
        self._out.append(CallEnd(self.calls - 1))
        self._closed += 1

    def _whole_call(self, name: str, arguments: str, taken: int) -> None:
        """A call that is all there, in so many characters."""
        self._begin(name)
        self._argue(arguments)
        self._end(taken)

    def _whole_calls(self, calls: Sequence[tuple[str, str]], taken: int) -> None:
        """Several that come together."""
        for name, arguments in calls[:1] if self._single else calls:
            self._whole_call(name, arguments, 0)
        self._take(taken)

    def _skip(self, at: int) -> Generator[None, None, int]:
        """Behind the white space at a place of the buffer."""
        while True:
            while at < len(self._buffer) and self._buffer[at].isspace():
                at += 1
            if at < len(self._buffer) or not (yield from self._more()):
                return at

    def _starts_with(self, at: int, texts: Sequence[str]) -> Generator[None, None, str | None]:
        """Which of the texts stands at a place of the buffer, if one does."""
        while True:
            rest = self._buffer[at:]
            may_come = [text for text in texts if text.startswith(rest) and text != rest]
            found = next(
                (text for text in sorted(texts, key=len, reverse=True) if rest.startswith(text)), None
            )
            if not may_come or not (yield from self._more()):
                return found

    def _behind(self, at: int, texts: Sequence[str]) -> Generator[None, None, int]:
        """Behind the one of the texts that stands at a place of the buffer, after white space, if one does;
        of its beginning, where the output is cut off in it."""
        start = yield from self._skip(at)
        if (found := (yield from self._starts_with(start, texts))) is not None:
            return start + len(found)
        rest = self._buffer[start:]
        return len(self._buffer) if rest and any(text.startswith(rest) for text in texts) else at

    def _find(self, text: str, at: int) -> Generator[None, None, int]:
        """Where a text begins, from a place of the buffer on; -1 where the output ends without it."""
        start = at
        while True:
            found = self._buffer.find(text, start)
            if found >= 0:
                return found
            start = max(at, len(self._buffer) - len(text) + 1)
            if not (yield from self._more()):
                return -1

    def _value(self, at: int) -> Generator[None, None, int]:
        """The end of the JSON value at a place of the buffer; -1 where there is none."""
        scanner = JsonScanner(at)
        while True:
            scanner.run(self._buffer)
            if scanner.done:
                return scanner.at
            if scanner.broken or not (yield from self._more()):
                return -1

    def _streamed(self, name: str, at: int) -> Tried:
        """A trusted call whose arguments begin at a place of the buffer: give them out as they come. What
        stands before them is taken, and so are they; False where the output ends in them."""
        self._take((yield from self._skip(at)))
        self._begin(name)
        scanner, sent = JsonScanner(), 0
        while True:
            scanner.run(self._buffer)
            self._argue(self._buffer[sent : scanner.at])
            sent = scanner.at
            if scanner.done or scanner.broken:
                self._end(sent)
                return True
            if not (yield from self._more()):
                self._argue(self._buffer[sent:])
                self._take(len(self._buffer))
                return False


_LONGEST_NAME = 256
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Call(msgspec.Struct):
    """As most families write a call."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


_CALL = msgspec.json.Decoder(_Call)


def read_call(text: str, *, bare: bool = False) -> tuple[str, str] | None:
    """(name, JSON of the arguments) of `{"name": …, "arguments": {…}}`, or None.

    bare: nothing else says that it is a call: the arguments must be there.
    """
    try:
        call = _CALL.decode(text)
        name, given = call.name, bytes(call.arguments) or bytes(call.parameters)
    except msgspec.ValidationError:
        return None
    except msgspec.DecodeError:  # control characters in strings
        try:
            loose = json.loads(text, strict=False)
            value = loose.get("arguments", loose.get("parameters")) if isinstance(loose, dict) else None
            given = b"" if value is None else dump(value).encode()
        except (ValueError, RecursionError):
            return None
        if not isinstance(loose, dict) or not isinstance(loose.get("name"), str):
            return None
        name = loose["name"]
    if not is_name(name) or (bare and not given):
        return None
    arguments = read_arguments(given.decode())
    return None if arguments is None else (name, arguments)


def is_name(text: str) -> bool:
    """Whether it may be a tool's: what a model makes up is the client's matter, unless it cannot be sent."""
    return 0 < len(text) <= _LONGEST_NAME and text.isprintable()


def dump(value: Any) -> str:
    """JSON of a value that was read. Raises ValueError for infinite numbers."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # half a surrogate pair is no text that can be sent, unless it is escaped
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value)


def elements(text: str) -> list[str]:
    """The texts of the values in a JSON list; [] for what is none."""
    try:
        return [bytes(each).decode() for each in msgspec.json.decode(text, type=list[msgspec.Raw])]
    except msgspec.DecodeError:
        pass
    try:
        found = json.loads(text, strict=False)
        return [dump(each) for each in found] if isinstance(found, list) else []
    except (ValueError, RecursionError):
        return []


def read_arguments(text: str) -> str | None:
    """JSON of an object as it is; {} for nothing; what is an object in a string, taken out. Else None."""
    text = text.strip()
    if text in ("", "null"):
        return "{}"
    if text.startswith('"'):
        try:
            text = msgspec.json.decode(text, type=str).strip()
        except msgspec.DecodeError:
            return None
    if not text.startswith("{"):
        return None
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        return text
    except msgspec.DecodeError:
        pass
    try:
        value = json.loads(text, strict=False)
        return dump(value) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


ENVELOPE = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
"""The head of a call as a grammar has it written: name first."""
