"""A compiler for the demo model's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import penstock.assets
from penstock.core.structured import StructuredOutputsParams
from penstock.grammar.compiler import Compiler, Matcher
from penstock.grammar.prepare import prepare
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary

pytest.importorskip("llguidance", reason="structured outputs need llguidance")

DEMO = Path(str(penstock.assets.__file__)).parent / "demo"
EOS = 2


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


@pytest.fixture(scope="session")
def compiler(demo: Tokenizer) -> Compiler:
    return Compiler(vocabulary(demo, demo.vocab_size, (EOS,)))


class Judge:
    """Whether texts match what is asked for, token by token."""

    def __init__(self, compiler: Compiler, tokenizer: Tokenizer, **asked: Any) -> None:
        self._tokenizer = tokenizer
        self._compiler = compiler
        grammar, self.skipped = prepare(StructuredOutputsParams(**asked))
        self.compiled = compiler.compile(grammar, steps=8)

    def matcher(self, text: str = "") -> Matcher | None:
        """Behind a text; None if its tokens are not allowed one after another."""
        matcher, ids = self.compiled.matcher(), self._tokenizer.encode(text, add_special_tokens=False)
        masks = self._compiler.masks(1)
        for count, token in enumerate(ids, start=1):
            matcher.fill(masks, 0)
            allowed = bool(masks[0, token >> 5] >> (token & 31) & 1)
            matcher.follow(ids[:count])
            if not allowed:
                return None  # what is forced is allowed in its canonical tokens only
            assert not matcher.error
        return matcher

    def takes(self, text: str) -> bool:
        """Whether the text matches, and may end there."""
        matcher = self.matcher(text)
        if matcher is None:
            return False
        return self.may_end(matcher)

    def may_end(self, matcher: Matcher) -> bool:
        """Whether what was followed matches as it is: the mask has the end, and the library says so."""
        masks = self._compiler.masks(1)
        matcher.fill(masks, 0)
        ends = bool(masks[0, 0] >> EOS & 1)
        assert ends == matcher._inner.is_accepting()
        return ends


@pytest.fixture(scope="session")
def judge(compiler: Compiler, demo: Tokenizer) -> Callable[..., Judge]:
    return lambda **asked: Judge(compiler, demo, **asked)
