"""Whether grammars can be compiled, asked of processes that can be ended: nobody else's request waits for
one.

    check(grammar) ──▶ known? ──▶ a free worker (template_pool's kind of process) ──▶ warnings, or
    InvalidRequest

What was found is remembered, refusals too. The engine compiles what has passed with the same library, the
same vocabulary and the same limits, so that it takes about as long there, beside the engine's steps."""

from __future__ import annotations

import asyncio
import marshal
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from penstock.core.errors import InvalidRequest, PenstockError, Unavailable, UnsupportedParameter
from penstock.core.structured import Grammar
from penstock.grammar.vocabulary import Vocabulary

from .template_pool import Limits, Shelf, TemplateError, Worker
from .template_worker import REFUSED, TEXT

WORKERS = 2
"""Grammars that are tried at a time."""
SECONDS = 5.0
"""That one may take."""
_TO_START = 60.0
"""Seconds that a worker may take to learn a vocabulary: it begins to count when the process is there."""
_MOST_WAITING = 256
"""Requests that wait for a worker; more are sent away."""
_MOST_KNOWN = 1024
_MOST_CHARACTERS = 4 << 20
"""Of the grammars whose answers are remembered."""

Found = tuple[str, ...] | InvalidRequest
"""Warnings, or why it is refused."""


class GrammarCheck:
    """Of one model. Used from one event loop; processes are started when they are needed.

    Args:
        vocabulary: makes the model's.
        seconds: that a grammar may take.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], seconds: float = SECONDS) -> None:
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._learn: bytes | None = None
        self._free = Shelf()
        self._lock = threading.Lock()
        self._known: OrderedDict[Grammar, Found] = OrderedDict()
        self._characters = 0
        self._waiting: dict[Grammar, asyncio.Future[Found]] = {}
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar-check")

    async def check(self, grammar: Grammar, field: str = "structured_outputs") -> tuple[str, ...]:
        """Warnings of the library.

        Raises InvalidRequest, with `field` as what is at fault, where it cannot be compiled or takes too
        much, and Unavailable where too many wait."""
        found = self._known.get(grammar)
        if found is not None:
            self._known.move_to_end(grammar)
        else:
            found = await asyncio.shield(self._asked(grammar))
        if isinstance(found, InvalidRequest):
            raise type(found)(found.message, param=field, advice=found.advice)
        return found

    def close(self) -> None:
        """End the workers that are free, and start none."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._free.close()

    def _asked(self, grammar: Grammar) -> asyncio.Future[Found]:
        """The one answer that all wait for who have asked for the same."""
        waiting = self._waiting.get(grammar)
        if waiting is not None:
            return waiting
        if len(self._waiting) >= _MOST_WAITING:
            raise Unavailable("too many grammars of other requests are being compiled.", retry_after=1)
        waiting = asyncio.get_running_loop().run_in_executor(self._threads, self._try, grammar)
        self._waiting[grammar] = waiting
        waiting.add_done_callback(lambda done: self._remember(grammar, done))
        return waiting

    def _remember(self, grammar: Grammar, done: asyncio.Future[Found]) -> None:
        self._waiting.pop(grammar, None)
        if done.cancelled() or done.exception() is not None:
            return
        self._known[grammar] = done.result()
        self._characters += len(grammar.text)
        while len(self._known) > _MOST_KNOWN or (
            self._characters > _MOST_CHARACTERS and len(self._known) > 1
        ):
            gone, _ = self._known.popitem(last=False)
            self._characters -= len(gone.text)

    # ---- in a thread ----
    def _try(self, grammar: Grammar) -> Found:
        worker = self._take()
        keep = False
        try:
            settings = (grammar.whitespace, grammar.lenient, grammar.after, grammar.before)
            fields = (grammar.kind.value, grammar.text, *settings)
            kind, said, keep = worker.ask(marshal.dumps(fields), Limits(self._seconds))
        except TemplateError as error:
            return self._ended(error)
        finally:
            if keep:
                self._free.put(worker)
            else:
                worker.close()
        text = said.decode("utf-8", "replace")
        if kind == TEXT:
            return tuple(text.splitlines())
        if kind == REFUSED:
            return InvalidRequest(text)
        return self._ended(TemplateError("failed", text))

    def _ended(self, error: TemplateError) -> InvalidRequest:
        why = {
            "time": f"it takes longer than {self._seconds:g} s",
            "memory": "it takes more memory than a grammar may have",
        }.get(error.kind, f"the compiler failed ({error})")
        return InvalidRequest(
            f"the structure of the output cannot be compiled: {why}.",
            advice="Make it smaller: fewer alternatives, lower counts of repetition, less nesting.",
        )

    def _take(self) -> Worker:
        if (free := self._free.take()) is not None:
            return free
        with self._lock:
            if self._learn is None:
                it = self._vocabulary()
                self._learn = marshal.dumps((it.tokenizer, it.size, it.eos_ids, it.special, it.spoken))
        try:
            worker = Worker(f"{__package__}.grammar_worker")
        except OSError as error:
            failure: PenstockError = Unavailable(f"no process for grammars can be started: {error}.")
            raise failure from error
        try:
            kind, said, _ = worker.ask(self._learn, Limits(_TO_START))
        except TemplateError as error:
            worker.close()
            raise Unavailable(f"the process for grammars has ended ({error.kind}: {error}).") from None
        if kind != TEXT:
            worker.close()
            raise UnsupportedParameter(said.decode("utf-8", "replace"), param="structured_outputs")
        return worker
