"""Token ids to text, piece by piece: the text of a stream, never half a character.

It knows the tokens of one sequence. Its promise, for valid UTF-8:

    "".join(pushes) + flush() == decode(prompt + output)[len(decode(prompt)):]

Three ways lead there, chosen by how the tokenizer's pieces become text:

- byte level: a token is a string of bytes, and one incremental UTF-8 decoder reads the whole stream. Equal
  to decoding at once, also for invalid bytes.
- SentencePiece: the same, but only tokens like `<0xE2>` are bytes; a word between them ends a character.
  Invalid bytes become one U+FFFD each. (Decoding at once spoils every character of a run of byte tokens
  that is invalid anywhere; a stream has shown the good ones by then.)
- anything else: the difference of two decodings of the last few tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Any

from .tokenizer import Pieces, Tokenizer

_REPLACEMENT = "\ufffd"
_HELD_TOKENS = 16
"""A character that is incomplete after so many tokens will not be completed."""
_PROMPT_TOKENS = 64
"""Of a prompt, those that are looked at for its last tokens that are not special."""
_CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first output token is decoded with."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, so also the most tokens that one character can be cut into."""
_PER_BYTE = "penstock.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_each_byte)
_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence. Constant time per token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        shown: Collection[str] = (),
    ) -> None:
        """Start after `prompt_ids`, of which only the last few are looked at.

        shown: special tokens that are not skipped.
        """
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        if shown and self._skip:
            self._skip -= {tokenizer.token_id(token) for token in shown}
        if tokenizer.pieces is Pieces.OTHER:
            # what is to be skipped does not get there, but for the prompt
            prompt_ids = [id for id in prompt_ids[-_PROMPT_TOKENS:] if id not in self._skip]
            self._stream: _Stream = _Decoding(tokenizer, prompt_ids)
        elif tokenizer.pieces is Pieces.BYTE_LEVEL:
            self._stream = _ByteLevel(tokenizer)
        else:
            # The space of the first word is dropped only where no text stands before it
            first = tokenizer.drops_first_space and not any(
                id not in self._skip and tokenizer.token_bytes(id) for id in prompt_ids
            )
            self._stream = _SentencePiece(tokenizer, first)
        if tokenizer.pieces is not Pieces.OTHER:
            # A prompt may end in half a character, which the output then completes.
            for id in prompt_ids[-_LONGEST_CHARACTER:]:
                if id not in self._skip:
                    self._stream.add(id)

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        skip, add = self._skip, self._stream.add
        if len(ids) == 1:
            return "" if ids[0] in skip else add(ids[0])
        return "".join(add(id) for id in ids if id not in skip)

    def peek(self, id: int) -> str:
        """What `push` would return for this token, which does not come (yet)."""
        if id in self._skip:
            return ""
        state = self._stream.state
        text = self._stream.add(id)
        self._stream.state = state
        return text

    def flush(self) -> str:
        """What was held back, at the end of the stream: bytes that no longer become a character."""
        return self._stream.flush()


class _ByteLevel:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._decoder = _Utf8("replace")

    @property
    def state(self) -> Any:
        """All that `add` changes."""
        return self._decoder.getstate()

    @state.setter
    def state(self, state: Any) -> None:
        self._decoder.setstate(state)

    def add(self, id: int) -> str:
        return self._decoder.decode(self._bytes(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _SentencePiece:
    def __init__(self, tokenizer: Tokenizer, first: bool) -> None:
        self._bytes = tokenizer.token_bytes
        self._is_byte = tokenizer.is_byte
        self._decoder = _Utf8(_PER_BYTE)
        self._first = first
        """Whether nothing has come out yet and the first space is to be dropped."""

    @property
    def state(self) -> Any:
        """All that `add` changes."""
        return self._decoder.getstate(), self._first

    @state.setter
    def state(self, state: Any) -> None:
        decoder, self._first = state
        self._decoder.setstate(decoder)

    def add(self, id: int) -> str:
        data = self._bytes(id)
        if self._is_byte(id):
            return self._shown(self._decoder.decode(data))
        if not data:  # no such token: decoding ignores it
            return ""
        text = self._decoder.decode(b"", True)
        return self._shown(text + data.decode())

    def flush(self) -> str:
        return self._shown(self._decoder.decode(b"", True))

    def _shown(self, text: str) -> str:
        if self._first and text:
            self._first = False
            return text.removeprefix(" ")
        return text


class _Decoding:
    """Two decodings of a short window: with and without the new tokens.

    ids      ... p p p o o o n
                 ^prefix   ^read
    text of ids[prefix:] minus text of ids[prefix:read] is new, unless it ends in half a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._read = len(self._ids)
        self._shown = self._text(self._ids)

    @property
    def state(self) -> Any:
        """All that `add` changes."""
        return list(self._ids), self._read, self._shown

    @state.setter
    def state(self, state: Any) -> None:
        self._ids, self._read, self._shown = state

    def add(self, id: int) -> str:
        if not self._tokenizer.token(id):
            return ""
        self._ids.append(id)
        text = self._text(self._ids)
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._shown)
        if incomplete and len(self._ids) - self._read < _HELD_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._text(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        # what was new becomes the context of the next token
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._text(self._ids)
        return new

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, False)


_Stream = _ByteLevel | _SentencePiece | _Decoding
