"""The process that tries grammars before an engine gets them: one at a time, with limits of time and memory.

    python -m penstock.text.grammar_worker      started by grammar_check, which holds the other end of stdin

    request    seconds (float64)  length (uint64)  marshal(fields of a Vocabulary at first, then of Grammars)
    answer     kind (1 byte)  stays (1 byte)  length (uint64)  UTF-8: warnings by line, or why it is refused

The protocol is that of template_worker. A grammar that takes longer than its seconds ends the process by
SIGALRM, one that takes more memory by the allocator; whoever asked is told."""

from __future__ import annotations

import marshal
import os
import sys
from collections.abc import Callable
from typing import Any

from .template_worker import FAILED, NO_MEMORY, REFUSED, TEXT, confine, pages, serve

STEPS = 48
"""Of an output, that are tried with each grammar."""
MEMORY = 768 << 20
"""Bytes of address space beyond what the process has when it is ready."""
_KEEPS = 128 << 20
"""Bytes more than that, after a request, and the process is replaced."""


def _compiler(fields: tuple[Any, ...]) -> Any:
    from penstock.grammar.compiler import Compiler
    from penstock.grammar.vocabulary import Vocabulary

    return Compiler(Vocabulary(*fields))


def _try(compiler: Any, fields: tuple[Any, ...]) -> tuple[bytes, str]:
    """(kind, what to say)"""
    from penstock.core.errors import InvalidRequest
    from penstock.core.structured import Grammar, GrammarKind

    kind, *rest = fields
    try:
        compiled = compiler.compile(Grammar(GrammarKind(kind), *rest), steps=STEPS)
        return TEXT, "\n".join(compiled.warnings)
    except InvalidRequest as error:
        return REFUSED, str(error)
    except MemoryError:
        return NO_MEMORY, ""
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {str(error)[:500]}"


def _prepare() -> Callable[[bytearray], tuple[bytes, bytes, bool]]:
    """Learns the vocabulary that the first request has, and tries the grammars of the others."""
    compiler: Any = None
    idle = 0

    def answer(body: bytearray) -> tuple[bytes, bytes, bool]:
        nonlocal compiler, idle
        fields = marshal.loads(body)
        if compiler is not None:
            kind, text = _try(compiler, fields)
            stays = kind != NO_MEMORY and pages(1) - idle <= _KEEPS
        else:
            kind, text = TEXT, ""
            try:
                compiler = _compiler(fields)
            except Exception as error:
                kind, text = FAILED, str(error)
            idle = confine(MEMORY)
            stays = compiler is not None
        return kind, text.encode("utf-8", "replace"), stays

    return answer


if __name__ == "__main__":
    status = serve(_prepare)
    sys.stderr.flush()
    os._exit(status)  # nothing to tidy up
