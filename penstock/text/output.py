"""From the engine's events to what one client sees: text, logprobs and the reason of the end.

    Event ──▶ OutputProcessor.push ──▶ Pending
                ├─ Detokenizer     token ids → text, never half a character
                ├─ StopChecker     ends the text at a stop string
                └─ MessageParser   text → thought, text and calls, where the model's family is known

It knows one sequence. It knows neither HTTP nor the engine: when a stop string, or the only call that is
wanted, ends the text early, it says so in `Pending.stop_found`, and the caller aborts the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from penstock.core.plan import Event, TokenLogprob
from penstock.core.request_spec import FinishReason
from penstock.core.sampling_params import SamplingParams

from .detokenizer import Detokenizer
from .parsers.message import MessageParser
from .parsers.pieces import Piece, Text
from .stop import StopChecker, StopStrings
from .tokenizer import Tokenizer

#: What stands for minus infinity, which JSON cannot express (vLLM's value).
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class DecodedLogprob:
    """Log-probability of one token with its text."""

    token_id: int
    token: str
    """The text that it adds; "" for a part of a character, which comes whole with its last token, as in vLLM.
    The name of a special token that the text leaves out."""
    width: int
    """Characters that it adds to the text."""
    logprob: float | None
    """Natural logarithm, at least LOWEST_LOGPROB; None for the first token of a prompt."""
    rank: int
    """1 for the most probable token."""
    top: Sequence[DecodedLogprob] = ()
    """The most probable tokens at this position, best first (their own `top` is empty)."""


@dataclass(slots=True)
class Pending:
    """What a sequence has produced and nobody has taken yet. Who sends the output in parts takes each with
    `clear`; who wants it whole lets it grow."""

    pieces: list[str] = field(default_factory=list)
    """The text as the model wrote it, in pieces of which none is empty."""
    parsed: list[Piece] | None = None
    """What a parser made of it; None without one."""
    calls: int = 0
    """How many calls of tools have begun, those that were taken included."""
    cut: bool = False
    """Whether the last of them is not whole."""
    reasoning_tokens: int = 0
    """How many tokens were a thought's, those that were taken included."""
    token_ids: list[int] = field(default_factory=list)
    """The end-of-sequence or stop token included."""
    logprobs: list[DecodedLogprob] = field(default_factory=list)
    """One for each of `token_ids`, where the request asked for them."""
    parsed_before: list[int] = field(default_factory=list)
    """With a parser, for each of `logprobs` how many of `parsed` there were before its token."""
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error", once the sequence has ended."""
    stop_reason: int | str | None = None
    """The stop string or the stop token id that ended it; None for end-of-sequence and other reasons."""
    stop_found: bool = False
    """The text ended it, by a stop string or the only call wanted: the engine, which does not know, may still
    run."""

    @property
    def text(self) -> str:
        """The pieces together."""
        return "".join(self.pieces)

    @property
    def parts(self) -> list[Piece]:
        """What the text is made of; all of it is Text where there is no parser."""
        if self.parsed is not None:
            return self.parsed
        return [Text(self.text)] if self.pieces else []

    def clear(self) -> None:
        """Forget the output, which has been taken; how the sequence ended, and counts, stay."""
        self.pieces.clear()
        if self.parsed is not None:
            self.parsed = []
        self.token_ids.clear()
        self.logprobs.clear()
        self.parsed_before.clear()


class OutputProcessor:
    """One sequence's output. Feed every event of it, in order, to `push`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stops: StopStrings | None = None,
        parser: MessageParser | None = None,
    ) -> None:
        """Start after `prompt_ids`.

        Args:
            stops: those of `params` compiled, by whoever has several sequences.
            parser: of this sequence. Special tokens that it reads are in the text, whatever `params` say.
        """
        self._tokenizer = tokenizer
        self._parser = parser
        shown = () if parser is None else parser.marks
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens, shown)
        included = params.include_stop_str_in_output
        self._stop = StopChecker(stops or params.stop, included) if params.stop else None
        self._keep_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._logprobs = params.logprobs is not None
        self._thought = 0
        self.generated = 0
        """Tokens that belong to the output: up to and including the one that completed a stop string."""
        self.finished = False
        """Whether the sequence has ended, by a stop string or in the engine."""

    def resume(self, tokens: Sequence[int]) -> bool:
        """Take in what was generated and told elsewhere; what follows goes on from there, in the middle of a
        character or of a stop string as well. False if the output was already whole."""
        self.push(Event("", tuple(tokens)))
        return not self.finished

    def push(self, event: Event, into: Pending | None = None) -> Pending:
        """Append what one event adds to `into`, or to a new Pending; returns it. After the end of the
        sequence nothing is added."""
        pending = Pending() if into is None else into
        if self._parser is not None and pending.parsed is None:
            pending.parsed = []
        if self.finished:
            return pending
        taken, matched = 0, None
        by_token = event.finish is FinishReason.STOP  # its last token is the one that stopped it
        for token in event.tokens:
            self.generated += 1
            if self._logprobs and taken < len(event.logprobs):
                pending.logprobs.append(
                    decode_logprob(self._tokenizer, self._detokenizer, event.logprobs[taken])
                )
                if pending.parsed is not None:
                    pending.parsed_before.append(len(pending.parsed))
            taken += 1
            if by_token and taken == len(event.tokens) and not self._keep_stop_token:
                break
            thinking = self._parser is not None and self._parser.thinking
            matched = self._emit(self._detokenizer.push((token,)), pending)
            if self._parser is not None:
                self._thought += thinking and self._parser.thinking
                if self._parser.satisfied:
                    break
            if matched is not None:
                break
        if matched is None and event.finish is not None:
            matched = self._emit(self._detokenizer.flush(), pending)
            if matched is None and self._stop is not None and (held := self._stop.flush()):
                self._give(held, pending)
        pending.token_ids += event.tokens[:taken]
        satisfied = self._parser is not None and self._parser.satisfied
        if matched is not None or (satisfied and event.finish in (None, FinishReason.LENGTH)):
            self.finished = True
            pending.finish_reason, pending.stop_reason = FinishReason.STOP.value, matched
            pending.stop_found = True
        elif event.finish is not None:
            self.finished = True
            pending.finish_reason, pending.stop_reason = event.finish.value, event.stop_reason
        if self._parser is not None and pending.parsed is not None:
            if self.finished:
                pending.parsed += self._parser.finish()
            pending.calls, pending.cut = self._parser.calls, self._parser.cut
            pending.reasoning_tokens = self._thought
        return pending

    def _emit(self, text: str, pending: Pending) -> str | None:
        """Give out text, as far as it cannot begin a stop string; returns the one that it completes."""
        matched = None
        if self._stop is not None:
            text, matched = self._stop.push(text, search=self.generated > self._min_tokens)
        if text:
            self._give(text, pending)
        return matched

    def _give(self, text: str, pending: Pending) -> None:
        pending.pieces.append(text)
        if self._parser is not None and pending.parsed is not None:
            pending.parsed += self._parser.push(text)


def decode_logprob(tokenizer: Tokenizer, stream: Detokenizer, entry: TokenLogprob) -> DecodedLogprob:
    """Give a logprob and its alternatives the texts that each would add to `stream`."""
    top = [
        _decoded(tokenizer, stream, token, value, rank)
        for rank, (token, value) in enumerate(entry.top, start=1)
    ]
    return _decoded(tokenizer, stream, entry.token, entry.logprob, entry.rank, top)


def decode_prompt(
    tokenizer: Tokenizer, first: int, logprobs: Iterable[TokenLogprob], text: str | None = None
) -> Iterator[DecodedLogprob]:
    """The tokens of a prompt, of which the model gives no logprob to the `first`.

    text: the prompt as it was given; where it does not begin with the first token, the tokenizer has added
    that (a beginning of sequence), and it takes no place.
    """
    stream = Detokenizer(tokenizer, (), skip_special_tokens=False)
    name = tokenizer.token_text(first)
    if text is not None and first in tokenizer.special_ids and not text.startswith(name):
        yield DecodedLogprob(first, name, 0, None, 0)
    else:
        shown = stream.push((first,))
        yield DecodedLogprob(first, shown, len(shown), None, 0)
    for entry in logprobs:
        yield decode_logprob(tokenizer, stream, entry)
        stream.push((entry.token,))


def decode_prompt_logprobs(
    tokenizer: Tokenizer, first: int, logprobs: Iterable[TokenLogprob]
) -> Iterator[dict[int, dict[str, float | int | str]] | None]:
    """vLLM's `prompt_logprobs`: None for the first prompt token, then one entry per token.

    Each entry maps token ids to `{"logprob", "rank", "decoded_token"}`: the prompt's own token first, then
    the most probable ones.
    """
    return map(ranked, decode_prompt(tokenizer, first, logprobs))


def ranked(entry: DecodedLogprob) -> dict[int, dict[str, float | int | str]] | None:
    """vLLM's shape of one position: the token itself first, then the most probable ones."""
    if entry.logprob is None:
        return None
    position: dict[int, dict[str, float | int | str]] = {}
    for each in (entry, *entry.top):
        shown: dict[str, float | int | str] = {
            "logprob": each.logprob or 0.0,
            "rank": each.rank,
            "decoded_token": each.token,
        }
        position.setdefault(each.token_id, shown)
    return position


def _decoded(
    tokenizer: Tokenizer,
    stream: Detokenizer,
    token: int,
    logprob: float,
    rank: int,
    top: Sequence[DecodedLogprob] = (),
) -> DecodedLogprob:
    text = stream.peek(token)
    return DecodedLogprob(
        token_id=token,
        token=tokenizer.token_text(token) if not text and token in tokenizer.special_ids else text,
        width=len(text),
        logprob=max(logprob, LOWEST_LOGPROB),
        rank=rank,
        top=top,
    )
