"""The library behind the seam: llguidance compiles grammars and computes masks; nothing else here knows it.

    Vocabulary ─▶ Compiler ── compile(grammar) ─▶ Compiled ── matcher() ─▶ Matcher, one for each sequence

Its limits bound what a grammar may take, in work and in states, when it is compiled and in every step; what
exceeds them is an error of that grammar or that sequence alone.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import InvalidRequest, StartupError, brief
from penstock.core.structured import Grammar, GrammarKind

from .source import Tokens, source
from .vocabulary import Vocabulary

Masks = NDArray[np.int32]
"""[rows, words]: bit i of word w of a row says whether token 32·w + i is allowed."""

_MOST_MESSAGE = 400
MOST_SECONDS = 0.5
"""Of a processor's time, for one mask."""
_FAILED = "the grammar of the output failed: "
_LISTING = re.compile(r"^at \d+\(\d+\): |\n +\d+ \| .*", re.DOTALL)
"""Where in the library's text an error is, and those lines of it: only who has sent a grammar knows them."""
_NAMES = {
    GrammarKind.JSON: "the JSON schema",
    GrammarKind.REGEX: "the regular expression",
    GrammarKind.CHOICE: "the choice",
    GrammarKind.EBNF: "the grammar",
    GrammarKind.TAG: "the structural tag",
}


class Compiler:
    """Compiles grammars for one vocabulary. May be used from any thread; releases the GIL while it works."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes half a second for 150,000 tokens.

        Raises StartupError where the library is missing or cannot read the tokenizer.
        """
        # read when the library is first used: its masks of one batch are computed by threads of our own
        # choice
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        try:
            import llguidance
        except ImportError as error:
            raise StartupError(
                f"structured outputs need llguidance: {error}.",
                advice="Install it: pip install 'penstock[engine]'.",
            ) from None
        self.vocabulary = vocabulary
        self._library: Any = llguidance
        eos = sorted(vocabulary.eos_ids)
        try:
            self._tokenizer: Any = llguidance.LLTokenizer(vocabulary.tokenizer, eos_token=eos or None)
        except Exception as error:
            raise StartupError(f"structured outputs are not available: {brief(str(error), 400)}.") from None
        # the library takes added tokens in angle brackets for special ones, whatever the tokenizer says
        spoken = {text: id for text, id in vocabulary.spoken if self._tokenizer.is_special_token(id)}
        self._tokens = Tokens({**dict(vocabulary.special), **spoken}, frozenset(spoken.values()))
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=2_000,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=50_000,
            max_grammar_size=500_000,
            verbose_errors=False,
        )

    def compile(self, grammar: Grammar, steps: int = 1) -> Compiled:
        """Raises InvalidRequest, with the library's reason, for what cannot be compiled or is too large.

        Args:
            steps: of an output that are tried: more for whoever asks before an engine uses it.
        """
        if not self.vocabulary.eos_ids:
            raise InvalidRequest(
                "this model has no end-of-sequence token, which structured outputs end with.",
                param="structured_outputs",
            )
        name = _NAMES[grammar.kind]
        try:
            text = source(grammar, self._tokens)
        except ValueError as error:
            raise _refused(name, str(error)) from None
        matcher = self._library.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            said = matcher.get_error()
            raise _refused(name, said if grammar.kind is GrammarKind.EBNF else _LISTING.sub("", said))
        found = Compiled(grammar, matcher, tuple(matcher.get_grammar_warnings()), self)
        if why := self._tried(found, steps):
            raise _refused(name, why)
        return found

    def _tried(self, compiled: Compiled, steps: int) -> str:
        """What goes wrong in the first steps of an output that nobody has chosen; "" if nothing does.

        What a grammar takes is known only when it is used: the library builds its automata as an output needs
        them, and its limits do not bound the time of a step.
        """
        matcher, masks = compiled.matcher(), self.masks(1)
        draw = random.Random(0)
        output: list[int] = []
        for _ in range(steps):
            began = time.thread_time()
            matcher.fill(masks, 0)
            if matcher.error:
                return matcher.error.removeprefix(_FAILED)
            if matcher.ended:
                break
            allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
            output.append(int(allowed[draw.randrange(len(allowed))]))
            matcher.follow(output)
            if (seconds := time.thread_time() - began) > MOST_SECONDS:
                return f"a step of it takes {seconds:.1f} s"
        return ""

    @property
    def words(self) -> int:
        """Width of a mask."""
        return (self.vocabulary.size + 31) // 32

    @property
    def filled_words(self) -> int:
        """Of these, those that the library fills."""
        return (int(self._tokenizer.vocab_size) + 31) // 32

    def masks(self, rows: int) -> Masks:
        """Masks that allow nothing."""
        return np.zeros((rows, max(self.words, self.filled_words)), np.int32)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Compiled:
    """A grammar, ready for any number of sequences."""

    grammar: Grammar
    _prototype: Any
    warnings: tuple[str, ...]
    """What the library approximates."""
    compiler: Compiler

    def matcher(self) -> Matcher:
        """At the beginning of an output."""
        return Matcher(self._prototype.deep_copy(), self.compiler)


class Matcher:
    """Follows one sequence's output."""

    __slots__ = ("_compiler", "_inner", "counted", "error")

    def __init__(self, inner: Any, compiler: Compiler | None) -> None:
        self._inner = inner
        self._compiler = compiler
        self.counted = 0
        """Tokens of the output that were taken in."""
        self.error = ""
        """Why it can say nothing more: the sequence is to fail."""

    def follow(self, tokens: Sequence[int], prompt_len: int = 0) -> None:
        """Take in what is new of a sequence's tokens: its prompt, which does not matter, and its output."""
        fresh = tokens[prompt_len + self.counted :]
        self.counted += len(fresh)
        if not fresh or self.error or self._inner.is_stopped():  # nothing is new, or it is behind the end
            return
        if not self._inner.consume_tokens(list(fresh)):
            self.error = f"{_FAILED}{self._said()}"

    def fill(self, masks: Masks, row: int) -> None:
        """Write which tokens may come next into a row. With an error, nothing may."""
        if self.error:
            masks[row] = 0
            return
        assert self._compiler is not None  # only one with an error has none
        words = self._compiler.filled_words
        self._inner.unsafe_compute_mask_ptr(masks[row].ctypes.data, 4 * words)
        if self._inner.is_error():
            self.error = f"{_FAILED}{self._said()}"
            masks[row] = 0

    def give_up(self, seconds: float, masks: Masks, row: int) -> None:
        """It took so long that it holds up everybody: its sequence is to fail."""
        self.error = f"{_FAILED}a step of it takes {seconds:.1f} s"
        masks[row] = 0

    @property
    def words(self) -> int:
        """Words of a mask that it fills."""
        return 0 if self._compiler is None else self._compiler.filled_words

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        return not self.error and bool(self._inner.is_stopped())

    def copy(self) -> Matcher:
        """Another one at the same place."""
        other = Matcher(None if self.error else self._inner.deep_copy(), self._compiler)
        other.counted, other.error = self.counted, self.error
        return other

    @classmethod
    def broken(cls, compiler: Compiler | None, error: str) -> Matcher:
        """One whose sequence is to fail."""
        matcher = cls(None, compiler)
        matcher.error = error
        return matcher

    def _said(self) -> str:
        return _first_line(str(self._inner.get_error())) or "it does not go on"


def _first_line(message: str) -> str:
    """Without the library's dump of its state, which may tell of other things."""
    said = message.split("\n<state>")[0].replace("<non-verbose/>", "").strip()
    if said.startswith("NoExtension"):
        return "no output can match it"
    return brief(said, _MOST_MESSAGE)


def _refused(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} cannot be compiled: {_first_line(why).rstrip('.')}.", param="structured_outputs"
    )
