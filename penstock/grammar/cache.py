"""Grammars that are ready, in the engine's process: compiled beside its steps, kept within bounds.

    start(grammar) ─▶ a thread compiles it ─▶ ready(grammar) ─▶ matcher(grammar), for each of its sequences

What a request needs stays while somebody holds its Compiled; of the others, those that were used last stay.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from penstock.core.errors import PenstockError
from penstock.core.structured import Grammar

from .compiler import Compiled, Compiler, Matcher

MOST_KEPT = 256
"""Compiled grammars that nobody needs now."""
MOST_CHARACTERS = 4 << 20
"""Of their texts together; compiled ones take some hundred bytes for each."""


class Grammars:
    """Of one vocabulary. May be used from any thread.

    Args:
        make: makes the compiler, when the first grammar comes.
    """

    def __init__(self, make: Callable[[], Compiler]) -> None:
        self._make = make
        self._compiler: Compiler | None = None
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._recent: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._characters = 0
        self._alive: weakref.WeakValueDictionary[Grammar, Compiled] = weakref.WeakValueDictionary()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @property
    def compiler(self) -> Compiler:
        """Made at first use. Raises StartupError."""
        with self._making:
            if self._compiler is None:
                self._compiler = self._make()
            return self._compiler

    def ready(self, grammar: Grammar) -> Compiled | None:
        """The compiled one, if it is there."""
        with self._lock:
            found = self._alive.get(grammar)
            if found is not None:
                self._keep(grammar, found)
            return found

    def start(self, grammar: Grammar) -> Future[Compiled]:
        """Have it compiled in a thread. The result raises as `compile` does."""
        return self._threads.submit(self.compile, grammar)

    def compile(self, grammar: Grammar) -> Compiled:
        """Compile it, unless that was done. Raises InvalidRequest, or StartupError without the library."""
        if (found := self.ready(grammar)) is not None:
            return found
        found = self.compiler.compile(grammar)
        with self._lock:
            found = self._alive.setdefault(grammar, found)
            self._keep(grammar, found)
        return found

    def matcher(self, grammar: Grammar) -> Matcher:
        """For one sequence, at the beginning of its output. Where there is none, one that says why."""
        try:
            return self.compile(grammar).matcher()
        except PenstockError as error:
            return Matcher.broken(self._compiler, str(error))

    def warm(self) -> None:
        """Make the compiler now, in the thread: it holds the GIL for a while (half a second for 150,000
        tokens), and whoever made it at the first need would halt everybody's steps for so long.

        For the demo's 2,048 tokens it takes 60 to 70 ms of processor time, of 3.4 s of a start, most of it
        beside the reading of weights: too little to wait for the first request with it.
        """

        def make() -> None:
            with contextlib.suppress(PenstockError):  # whoever needs it hears of it
                _ = self.compiler

        self._threads.submit(make)

    def close(self) -> None:
        """Compile nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _keep(self, grammar: Grammar, compiled: Compiled) -> None:
        """As the one used last; others go."""
        if grammar not in self._recent:
            self._characters += len(grammar.text)
        self._recent[grammar] = compiled
        self._recent.move_to_end(grammar)
        while len(self._recent) > MOST_KEPT or (self._characters > MOST_CHARACTERS and len(self._recent) > 1):
            gone, _ = self._recent.popitem(last=False)
            self._characters -= len(gone.text)
