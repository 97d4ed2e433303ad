"""gpt-oss and its harmony format: an answer is messages, each with a header that says what it is.

<|channel|>analysis<|message|>I need the weather.<|end|>                                        a thought
<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>                            text
<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>   a call
<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>                the same
<|start|>assistant<|channel|>final<|message|>It rains.<|return|>                                text

<|start|>assistant is the prompt's before the first one. One parser reads thoughts, text and calls, as they
come in any order. Several messages of a kind are lines of it. The format is OpenAI's (docs/format.md of its
library); what a recipient means is vLLM's: a function with or without `functions.`, unless it is one of the
tools that gpt-oss was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Literal

from .forms import Form, Format
from .machine import Run
from .pieces import Text, Thought
from .reasoning import ReasoningParser
from .tools import Tool, ToolParser, Tried, read_arguments

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_TO = "to="
"""What an answer may begin with where the prompt has begun the header."""
_LONGEST_HEAD = 1024
_ROLE = "assistant"
_RECIPIENT = r"[A-Za-z0-9_.-]{1,256}"
_HEAD = re.compile(
    rf"(?:{re.escape(START)}{_ROLE})?"
    rf"\s{{0,8}}(?:to=(?P<before>{_RECIPIENT})\s{{0,8}})?"
    rf"{re.escape(CHANNEL)}(?P<channel>analysis|commentary|final)\b"
    rf"(?:\s{{1,8}}to=(?P<behind>{_RECIPIENT}))?"
    rf"\s{{0,8}}(?:{re.escape(CONSTRAIN)})?\s{{0,8}}[A-Za-z0-9_/+-]{{0,64}}\s{{0,8}}{re.escape(MESSAGE)}"
)
_BUILT_IN = ("assistant", "browser", "python", "container")
"""Recipients that are no function of the client's, and what begins with one of them and a dot."""
_THOUGHT = f"{CHANNEL}analysis{MESSAGE}"


class Harmony(ToolParser):
    """Splits an answer into Thoughts, Texts and calls. A header that is none, and what follows it, is text;
    so is a call of what is no function, or without an object of arguments."""

    marks = (START, CHANNEL)
    others = (MESSAGE, CONSTRAIN, *ENDS)
    form = Form(
        begin=f"{CHANNEL}commentary {_TO}functions.NAME {CONSTRAIN}json{MESSAGE}",
        end="",  # the token that ends a call ends the output
        separator=f"{ENDS[0]}{START}{_ROLE}",
        said=f"{CHANNEL}final{MESSAGE}",
        said_json=f"{CHANNEL}final {CONSTRAIN}json{MESSAGE}",
        aside=f"{CHANNEL}commentary{MESSAGE}",
    )

    def __init__(
        self,
        tools: Sequence[Tool] = (),
        *,
        trusted: bool = False,
        single: bool = False,
        ids: Callable[[], str] | None = None,
        thinking: bool = False,
        calling: bool = True,
    ) -> None:
        """Start.

        Args:
            tools, trusted, single, ids: as of every ToolParser.
            thinking: whether the answer begins inside of a thought.
            calling: False leaves calls in the text.
        """
        self.thinking = thinking
        self._calling = calling
        self._spoken: set[type[Text] | type[Thought]] = set()
        """Kinds that there was a message of."""
        self._fresh = True
        """Nothing of this message has been given out."""
        super().__init__(tools, trusted=trusted, single=single, ids=ids)

    def _run(self) -> Run:
        marks: tuple[str, ...] = (*self.marks, _TO)
        if self.thinking:
            yield from self._body(Thought)
            marks = self.marks
        while not self.satisfied:
            self._fresh = True
            at = yield from self._skip(0)
            mark = yield from self._starts_with(at, marks)
            if mark is not None:
                yield from self._message(at, mark)
            elif self._buffer[at:] or marks != self.marks:  # a message that the prompt has begun
                yield from self._body(Text)
            if not self._buffer.strip() and self._ended:
                return
            marks = self.marks

    def _message(self, at: int, mark: str) -> Run:
        """One that begins with a mark, at a place of the buffer."""
        head = yield from self._head(at)
        if head is None:
            self._say(self._take(at + len(mark)))
            yield from self._body(Text, whole=True)
            return
        to, name = _recipient(head), _function(head)
        if name is not None and self._calling:
            if (yield from self._called(name, head.end())):
                self._whole += 1
                return
            if not self._buffer:
                return
        before = self._take(head.end())
        if head["channel"] == "analysis" and name is None:
            yield from self._body(Thought)
        elif not to:
            yield from self._body(Text)
        else:
            self._say(before)
            yield from self._body(Text, whole=True)

    def _head(self, at: int) -> Generator[None, None, re.Match[str] | None]:
        """The header at a place of the buffer; None for what is none."""
        while not (head := _HEAD.match(self._buffer, at)):
            rest = self._buffer[at:]
            if len(rest) > _LONGEST_HEAD or any(mark in rest for mark in (MESSAGE, *ENDS)):
                return None
            if not (yield from self._more()):
                return None
        return None if head["before"] and head["behind"] else head

    def _body(self, kind: type[Text] | type[Thought], whole: bool = False) -> Run:
        """Give out a message up to its end, which is taken, or to the next header.

        whole: it was not understood: the rest of its header is text, and so is its end.
        """
        self.thinking = kind is Thought
        mark = yield from self._until((START, *ENDS) if whole else (*self.marks, *ENDS), kind)
        self.thinking = False
        if mark in ENDS:
            end = self._take(len(mark))
            if whole:
                self._say(end)

    def _called(self, name: str, at: int) -> Tried:
        """Read a call whose message begins at a place of the buffer."""
        if self._trusted:
            if not (yield from self._streamed(name, at)):
                return False
            self._take((yield from self._behind(0, ENDS)))
            return True
        end = begin = yield from self._skip(at)
        arguments: str | None = "{}"
        if not (yield from self._starts_with(begin, ENDS)):
            if (end := (yield from self._value(begin))) < 0:
                return False
            arguments = read_arguments(self._buffer[begin:end])
        behind = yield from self._skip(end)
        mark = yield from self._starts_with(behind, (*self.marks, *ENDS))
        if arguments is None or (mark is None and self._buffer[behind:]):
            return False
        self._whole_call(name, arguments, taken=behind + (len(mark) if mark in ENDS and mark else 0))
        return True

    def _say(self, text: str, kind: type[Text] | type[Thought] = Text) -> None:
        """See Machine. Messages of a kind are told apart by a line break, as in vLLM's whole answers."""
        if text and self._fresh:
            self._fresh = False
            if kind in self._spoken:
                super()._say("\n", kind)
            self._spoken.add(kind)
        super()._say(text, kind)


class GptOss(ReasoningParser):
    """Thoughts are messages of the channel `analysis`; there may be some between calls."""

    start = _THOUGHT
    end = f"{CHANNEL}final{MESSAGE}"
    together = Harmony

    @classmethod
    def whole(
        cls, tools: Sequence[Tool], *, trusted: bool, single: bool, thinking: bool, calling: bool
    ) -> Harmony:
        """See ReasoningParser."""
        return Harmony(tools, trusted=trusted, single=single, thinking=thinking, calling=calling)

    @classmethod
    def begins_thinking(cls, prompt: str, enabled: bool = True, continued: bool = False) -> bool:
        """See ReasoningParser. A model that is told nothing begins with a header."""
        if not continued:
            return prompt.rstrip().endswith(_THOUGHT)
        behind = prompt.rpartition(_THOUGHT)[2]
        return _THOUGHT in prompt and not any(mark in behind for mark in (START, CHANNEL, *ENDS))

    @classmethod
    def opening(cls, thinking: bool, header: Literal["", "said", "said_json"]) -> Format:
        """What stands before the grammar of an answer: thoughts, and a header, as a structural tag.

        Args:
            thinking: the first thought has begun.
            header: which one of the form's; "" where the grammar has it.
        """
        elements: list[Format] = [_thought("")] if thinking else []
        elements.append({"type": "star", "content": _thought(_THOUGHT)})
        if header:
            elements.append({"type": "const_string", "value": getattr(Harmony.form, header)})
        return {"type": "sequence", "elements": elements}

    @classmethod
    def all_marks(cls) -> tuple[str, ...]:
        """See Machine."""
        return Harmony.all_marks()


def _thought(begin: str) -> Format:
    end = f"{ENDS[0]}{START}{_ROLE}"
    return {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": end}


def _recipient(head: re.Match[str]) -> str:
    return head["before"] or head["behind"] or ""


def _function(head: re.Match[str]) -> str | None:
    """The name of the function that a message goes to; None where it goes to none."""
    name = _recipient(head).removeprefix("functions.")
    return name if name and name.split(".")[0] not in _BUILT_IN else None
