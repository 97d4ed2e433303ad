"""From the engine's events to what one client sees: text, logprobs and the reason of the end.

    Event ──▶ OutputProcessor.push ──▶ Delta
                ├─ Detokenizer   token ids → text, never half a character
                └─ StopChecker   ends the text at a stop string

It knows one sequence. It knows neither HTTP nor the engine: when a stop string ends the text early, it says
so in `Delta.stop_found`, and the caller aborts the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.plan import Event, TokenLogprob
from penstock.core.request import FinishReason
from penstock.core.sampling_params import SamplingParams

from .detokenizer import Detokenizer
from .stop import StopChecker
from .tokenizer import Tokenizer

#: What stands for minus infinity, which JSON cannot express (vLLM's value).
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class DecodedLogprob:
    """Log-probability of one token with its text."""

    token_id: int
    token: str
    """Text of the token alone; U+FFFD where it is no whole character."""
    logprob: float
    """Natural logarithm, at least LOWEST_LOGPROB."""
    rank: int
    """1 for the most probable token."""
    bytes: list[int]
    """The token's UTF-8 bytes, exact even for a part of a character."""
    top: list[DecodedLogprob] = field(default_factory=list)
    """The most probable tokens at this position, best first (their own `top` is empty)."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to a sequence."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    """New ids, the end-of-sequence or stop token included."""
    logprobs: tuple[DecodedLogprob, ...] | None = None
    """One for each of `token_ids`; None when the request did not ask."""
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error", once, in the delta that ends the sequence."""
    stop_reason: int | str | None = None
    """The stop string or the stop token id that ended it; None for end-of-sequence and other reasons."""
    stop_found: bool = False
    """A stop string ended the text in this delta: abort the request in the engine, if it still runs."""


class OutputProcessor:
    """One sequence's output. Feed every event of it, in order, to `push`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._keep_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._logprobs = params.logprobs is not None
        self.generated = 0
        """Tokens that belong to the output: up to and including the one that completed a stop string."""
        self.finish_reason: str | None = None
        """Set when the sequence has ended."""

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended, by a stop string or in the engine."""
        return self.finish_reason is not None

    def push(self, event: Event) -> Delta:
        """Digest one event. After the end of the sequence every delta is empty."""
        if self.finished:
            return Delta()
        text: list[str] = []
        taken, matched = 0, None
        by_token = event.finish is FinishReason.STOP  # its last token is the one that stopped it
        for i, token in enumerate(event.tokens):
            self.generated += 1
            taken = i + 1
            if by_token and taken == len(event.tokens) and not self._keep_stop_token:
                break
            emitted, matched = self._emit(self._detokenizer.push((token,)))
            text.append(emitted)
            if matched is not None:
                break
        if matched is None and event.finish is not None:
            emitted, matched = self._emit(self._detokenizer.flush())
            text.append(emitted)
            if matched is None and self._stop is not None:
                text.append(self._stop.flush())
        stop_reason: int | str | None = None
        if matched is not None:
            self.finish_reason, stop_reason = FinishReason.STOP.value, matched
        elif event.finish is not None:
            self.finish_reason, stop_reason = event.finish.value, event.stop_reason
        return Delta(
            text="".join(text),
            token_ids=event.tokens[:taken],
            logprobs=self._decode(event.logprobs[:taken]) if self._logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            stop_found=matched is not None,
        )

    def _emit(self, text: str) -> tuple[str, str | None]:
        if self._stop is None:
            return text, None
        return self._stop.push(text, search=self.generated > self._min_tokens)

    def _decode(self, logprobs: Sequence[TokenLogprob]) -> tuple[DecodedLogprob, ...]:
        return tuple(decode_logprob(self._tokenizer, entry) for entry in logprobs)


def decode_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> DecodedLogprob:
    """Give a logprob and its alternatives their texts and bytes."""
    top = [_decoded(tokenizer, token, value, rank) for rank, (token, value) in enumerate(entry.top, start=1)]
    return _decoded(tokenizer, entry.token, entry.logprob, entry.rank, top)


def decode_prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]
) -> list[dict[int, dict[str, float | int | str]] | None]:
    """vLLM's `prompt_logprobs`: None for the first prompt token, then one entry per token.

    Each entry maps token ids to `{"logprob", "rank", "decoded_token"}`: the prompt's own token first, then
    the most probable ones.
    """
    positions: list[dict[int, dict[str, float | int | str]] | None] = [None]
    for entry in logprobs:
        ranked = [(entry.token, entry.logprob, entry.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(entry.top, start=1)]
        position: dict[int, dict[str, float | int | str]] = {}
        for token, value, rank in ranked:
            position.setdefault(
                token,
                {
                    "logprob": max(value, LOWEST_LOGPROB),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token),
                },
            )
        positions.append(position)
    return positions


def _decoded(
    tokenizer: Tokenizer, token: int, logprob: float, rank: int, top: list[DecodedLogprob] | None = None
) -> DecodedLogprob:
    return DecodedLogprob(
        token_id=token,
        token=tokenizer.token_text(token),
        logprob=max(logprob, LOWEST_LOGPROB),
        rank=rank,
        bytes=list(tokenizer.token_bytes(token)),
        top=top or [],
    )
