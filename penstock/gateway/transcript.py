"""A stream's tokens, to go on with it at another engine, and how the bytes of two engines become one stream.

    first   : prompt 30 16                     counts and ids are remembered, comments taken out
            : tokens 5,9
            data: {HEAD"choices":[…]}          HEAD: its id, time and model
      ✂
    second  asked with generated_token_ids [5,9]
            data: {…"choices":[…"role"…]}      an opening, which the client has had
            : tokens 7
            data: {…"choices":[…]}             goes out with the first one's HEAD
            data: {…"usage":{…}}               … and with the tokens of both

What an engine held back when it broke (half a character, the beginning of a stop string) comes from the next
one, which begins behind the same tokens. Greedy or seeded, the text is what one engine would have made;
without a seed the rest is drawn anew, as the next token always is. Bytes are read as Penstock's server writes
them (server/answer.py, server/openai.py); a stream without these comments cannot go on.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from penstock.http.sse import END, event

from .envelope import Envelope
from .policy.retries import RETRIED_STATUS

_MOST = 1 << 20
"""Bytes of ids: more than 130,000 tokens. A stream that is longer does not go on elsewhere."""
_COMMENT = re.compile(rb"^: (?:tokens ([\d,]*)|prompt (\d{1,12}) (\d{1,12}))\n", re.MULTILINE)
_TOKENS = b": tokens "
_CHOICES = b'"choices":['
_USAGE = b'"choices":[],"usage":{'
_FINISHED = b'"finish_reason":"'
"""In JSON without spaces. In the text of an answer it cannot stand, where quotes are escaped."""
_ABORTED = b'"finish_reason":"abort"'
_FINGERPRINT = re.compile(rb'"system_fingerprint":("[^"]*")')
_OF_ONE_ENGINE = ("device_seconds", "queue_ms", "prefill_ms", "ttft_ms", "decode_ms")
"""Figures in a usage that say nothing of a stream that two engines wrote."""
_PREVENT = (
    *("tools", "functions", "response_format", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("logprobs", "prompt_logprobs", "logprob_token_ids", "echo", "use_beam_search"),
    *("generated_token_ids", "return_token_ids"),
)
"""Fields with which a stream ends where it breaks: what they ask for is made from the beginning."""


def can_go_on(envelope: Envelope) -> bool:
    """Whether another replica could go on with the answer to a request."""
    one = envelope.stream and envelope.choices == 1 and envelope.endpoint.usage_option
    return one and not envelope.asks_for(_PREVENT)


def is_final(failure: bytes) -> bool:
    """Whether an error event speaks of the request, which another replica would refuse as well."""
    try:
        error = msgspec.json.decode(failure)["error"]
        code = error.get("code")
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return False
    return isinstance(code, int) and 400 <= code < 500 and code not in RETRIED_STATUS


class Transcript:
    """Of one stream, through all of its attempts."""

    def __init__(self) -> None:
        self.count = 0
        """Tokens whose events the client has had."""
        self.prompt: tuple[int, int] | None = None
        """Its tokens, and those of them that were cached, as the first engine says; None: it says no ids."""
        self.finished = False
        """Whether the client knows why the answer ended: only the usage and the end can be missing."""
        self.aborted = False
        """Whether the engine has ended the answer because it ends itself; the client has not been told so."""
        self.differs = False
        """Whether an engine that went on is another version or device than the first one."""
        self._ids = bytearray()
        self._head = b""
        self._told = False
        """Whether the client has had the usage."""
        self._before = 0
        """Tokens of earlier attempts."""
        self._again = False
        self._is_new = False
        """Whether nothing has come of the present attempt."""
        self._speaks = True
        """Whether a token has."""

    @property
    def can_go_on(self) -> bool:
        """Whether all is known that another engine needs."""
        return self.prompt is not None and bool(self._head) and len(self._ids) <= _MOST

    @property
    def gained(self) -> int:
        """Tokens of the present attempt."""
        return self.count - self._before

    @property
    def ids(self) -> bytes:
        """The tokens so far, as the JSON of a list."""
        return b"[" + bytes(self._ids) + b"]"

    def next(self) -> None:
        """Another engine goes on."""
        self._before = self.count
        self._again, self._is_new, self._speaks, self.aborted = True, True, False, False

    def take(self, events: bytes) -> bytes:
        """What the client gets of whole events, which may be none."""
        if self.aborted:
            return b""
        if _FINISHED in events and (at := events.find(_ABORTED)) >= 0:
            # with what was held back, which the next engine will complete
            self.aborted = True
            start = events.rfind(b"\n\n", 0, at)
            events = events[: start + 2] if start >= 0 else b""
        if self._again:
            return b"".join(map(self._rewritten, _split(events)))
        if not self._head and (at := events.find(_CHOICES)) >= 0:
            self._head = events[events.rfind(b"\n", 0, at) + 1 : at]
        if events.startswith(_TOKENS) and b"\n: " not in events:  # one event, as most are
            ids, _, out = events[len(_TOKENS) :].partition(b"\n")
            self._add(ids)
        else:
            out = _COMMENT.sub(self._read, events)
        if self.finished or _FINISHED in out:
            self._notice(out)
        return out

    def ending(self, usage_wanted: bool) -> bytes:
        """What a client still has to get that knows why its answer ended."""
        if self._told or not usage_wanted or self.prompt is None:
            return END
        tokens, cached = self.prompt
        usage = {
            "prompt_tokens": tokens,
            "completion_tokens": self.count,
            "total_tokens": tokens + self.count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return self._head + _CHOICES + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n" + END

    def _read(self, comment: re.Match[bytes]) -> bytes:
        ids, tokens, cached = comment.groups()
        if ids is not None:
            self._add(ids)
        elif self.prompt is None:
            self.prompt = int(tokens), int(cached)
        return b""

    def _add(self, ids: bytes) -> None:
        self._speaks = True
        if ids:
            self.count += 1 + ids.count(b",")
            if len(self._ids) <= _MOST:
                self._ids += b"," + ids if self._ids else ids

    def _notice(self, events: bytes) -> None:
        self.finished |= _FINISHED in events
        if _USAGE in events:
            self._told = True

    def _rewritten(self, one: bytes) -> bytes:
        one = _COMMENT.sub(self._read, one)
        at = one.find(_CHOICES)
        if at < 0:  # [DONE], or a comment that keeps the connection alive
            return one
        if self._is_new:
            self._is_new = False
            self.differs |= _FINGERPRINT.findall(one) != _FINGERPRINT.findall(self._head)
        if not self._speaks:
            return b""
        self._notice(one)
        if b'"usage":{' in one:
            one = self._counted(one)
            at = one.find(_CHOICES)
        return self._head + one[at:]

    def _counted(self, one: bytes) -> bytes:
        """A usage of both: in the end, and in each chunk for those who ask for that."""
        chunk: dict[str, Any] = msgspec.json.decode(one.partition(b"data: ")[2])
        usage = chunk["usage"]
        usage["completion_tokens"] += self._before
        usage["total_tokens"] += self._before
        for name in _OF_ONE_ENGINE:
            usage.pop(name, None)
        if "prompt_tokens_details" in usage and self.prompt is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.prompt[1]}
        return event(msgspec.json.encode(chunk))


def _split(events: bytes) -> list[bytes]:
    """Whole events, one by one."""
    return [each + b"\n\n" for each in events.split(b"\n\n")[:-1]]
