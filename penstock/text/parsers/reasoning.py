"""Where a model's thought ends and its answer begins, for models that mark it in the text.

Whether an answer begins inside of a thought is what the prompt says that it ends with, and where it says
nothing, the family: `deepseek_r1` and `qwen3` do, as in vLLM. What stands in a thought is given as it is,
line breaks included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from .forms import Format
from .machine import Machine, Run
from .pieces import Thought
from .tools import Tool, ToolParser


class ReasoningParser(Machine):
    """Splits an answer into Thoughts and Texts."""

    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"

    def __init__(self, thinking: bool = True, interrupts: Sequence[str] = ()) -> None:
        """Start.

        Args:
            thinking: whether the answer begins inside of a thought.
            interrupts: marks that end a thought and belong to what follows: those of calls.
        """
        self.thinking = thinking
        self._interrupts = tuple(interrupts) if self.interruptible else ()
        super().__init__()

    together: ClassVar[type[ToolParser] | None] = None
    """Who reads thoughts, text and calls in one, where they do not come one after the other (`whole`)."""
    interruptible: ClassVar[bool] = False
    """Whether the models of the family call tools from within a thought, which ends it."""

    @classmethod
    def begins_thinking(cls, prompt: str, enabled: bool = True, continued: bool = False) -> bool:
        """Whether an answer to this prompt begins inside of a thought.

        Args:
            prompt: its text, as the chat template made it.
            enabled: False where the request turned thinking off (`enable_thinking`).
            continued: the prompt ends in the middle of an answer.
        """
        tail = prompt.rstrip()
        if tail.endswith(cls.start):
            return True
        if tail.endswith(cls.end):
            return False
        last_start, last_end = prompt.rfind(cls.start), prompt.rfind(cls.end)
        if continued and max(last_start, last_end) >= 0:
            return last_start > last_end
        return enabled and not continued

    @classmethod
    def whole(
        cls, tools: Sequence[Tool], *, trusted: bool, single: bool, thinking: bool, calling: bool
    ) -> ToolParser:
        """One of `together`.

        Args:
            tools, trusted, single: as of every ToolParser.
            thinking: the answer begins inside of a thought.
            calling: False leaves calls in the text.
        """
        raise NotImplementedError

    @classmethod
    def opening(cls, thinking: bool, header: Literal["", "said", "said_json"]) -> Format | None:
        """What stands before the grammar of an answer; None where that is a thought up to `end`, or nothing.

        Args:
            thinking: the answer begins inside of a thought.
            header: which header of the family's form; "" where the grammar has it.
        """
        return None

    @classmethod
    def all_marks(cls) -> tuple[str, ...]:
        """See Machine."""
        return cls.start, cls.end

    def _run(self) -> Run:
        while self.thinking:
            mark = yield from self._until((self.start, self.end, *self._interrupts), Thought)
            if mark is None:
                return
            if mark not in self._interrupts:
                self._take(len(mark))
            self.thinking = mark == self.start  # once more, or for the first time: it is one thought
        while True:
            self._say(self._take(len(self._buffer)))
            if not (yield from self._more()):
                return


class DeepSeekR1(ReasoningParser):
    """DeepSeek R1 and its distillations: `<think>` is in the prompt, or left out."""


class Qwen3(ReasoningParser):
    """Qwen3: `<think>` comes first, unless the template closed the thought already (`enable_thinking:
    false`)."""

    interruptible = True
