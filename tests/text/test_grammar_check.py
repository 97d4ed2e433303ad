"""Grammars are tried in processes that are ended when they take too long; nobody else waits for them."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.core.structured import Grammar, GrammarKind
from penstock.grammar.vocabulary import Vocabulary
from penstock.text.grammar_check import GrammarCheck
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary
from tests.grammar.conftest import DEMO, EOS

pytest.importorskip("llguidance", reason="structured outputs need llguidance")


def words() -> Vocabulary:
    tokenizer = Tokenizer.from_directory(DEMO)
    return vocabulary(tokenizer, tokenizer.vocab_size, (EOS,))


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def test_one_that_explodes_is_refused_while_others_pass() -> None:
    async def scenario() -> None:
        check = GrammarCheck(words, seconds=0.5)
        try:
            assert await check.check(regex("a")) == ()
            bomb = asyncio.ensure_future(check.check(regex("(((a{90}){90}){90}){90}"), "field"))
            again = asyncio.ensure_future(check.check(regex("(((a{90}){90}){90}){90}"), "other"))
            for number in range(5):
                await check.check(regex(f"b{number}"))
            for waiting, field in ((bomb, "field"), (again, "other")):
                with pytest.raises(InvalidRequest, match=r"takes longer than 0\.5 s") as caught:
                    await waiting
                assert caught.value.param == field
            with pytest.raises(InvalidRequest, match="takes longer"):  # remembered
                await check.check(regex("(((a{90}){90}){90}){90}"))
            with pytest.raises(InvalidRequest, match="unclosed"):
                await check.check(regex("("))
            assert await check.check(regex("c")) == ()
        finally:
            check.close()

    asyncio.run(scenario())


def test_warnings_are_told() -> None:
    async def scenario() -> None:
        check = GrammarCheck(words)
        lenient = Grammar(GrammarKind.JSON, '{"oneOf": [{"maxLength": 3}, {"minLength": 2}]}', lenient=True)
        assert any("oneOf" in warning for warning in await check.check(lenient))
        check.close()

    asyncio.run(scenario())


def test_a_vocabulary_that_the_library_cannot_read() -> None:
    async def scenario() -> None:
        check = GrammarCheck(lambda: Vocabulary("{}", 1, (0,)))
        with pytest.raises(UnsupportedParameter, match="not available"):
            await check.check(regex("a"))
        check.close()

    asyncio.run(scenario())
