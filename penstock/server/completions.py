"""POST /v1/completions: the format of OpenAI's completions.

It knows OpenAI's completion fields and answers: prompts as text or token ids, one or many, echo, and logprobs
in the older shape. Running and streaming are the `pipeline`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from msgspec.json import encode

from penstock.core.errors import InvalidRequest
from penstock.core.sampling_params import SamplingParams
from penstock.engine.messages import ModelInfo
from penstock.text.output import DecodedLogprob, decode_prompt, decode_prompt_logprobs

from .gaps import gaps
from .generation import Choice, Generation
from .ignored import Ignored
from .limits import told_logprobs
from .logprobs import CompletionLogprobs, array
from .openai import OpenAIFormat, OpenAIWriter
from .params import beams, check_generate, sampling_params, text_or_ids
from .parsing import with_budget
from .pipeline import Ask, Told
from .protocol import CompletionRequest
from .state import State
from .work import IN_THREAD

_DEFAULT_MAX_TOKENS = 16
_MOST_SEQUENCES = 128
"""Of a prompt, as of `n`."""


class CompletionFormat(OpenAIFormat):
    """See Format."""

    shape = CompletionRequest
    prefix = "cmpl"
    prompt = "prompt"
    empty = "prompt must not be empty."

    async def ask(self, state: State, request: CompletionRequest, ignored: Ignored) -> Ask:
        """See Format."""
        check_generate(request, state.config, ignored)
        asked = request.max_tokens
        prompt_only = request.echo and asked == 0
        if prompt_only and request.logprob_token_ids:
            raise InvalidRequest(
                "logprob_token_ids is not supported with echo and max_tokens=0, which generate nothing.",
                param="logprob_token_ids",
            )
        params = sampling_params(
            state,
            request,
            max_tokens=1 if prompt_only else _DEFAULT_MAX_TOKENS if asked is None else asked,
            logprobs=request.logprobs,
            prompt_logprobs=_prompt_logprobs(request),
        )
        params = with_budget(params, state.config, state.tokenizer)
        inputs = await _checked_inputs(state, request)
        if request.suffix:
            inputs, params = await gaps(state, request, inputs, params)
        return Ask(
            inputs=inputs,
            params=_best_of(request, params),
            beams=beams(request, params),
            max_tokens=asked,
            limit="max_tokens",
            default=_DEFAULT_MAX_TOKENS,
            shows_prompt=request.echo,
            prompt_only=prompt_only,
            told=Told(
                logprobs=request.n * _told_logprobs(state, request),
                ids=request.n * request.return_token_ids,
                text=request.n * request.echo,
            ),
        )

    def writer(
        self, state: State, request: CompletionRequest, id: str, generation: Generation
    ) -> CompletionWriter:
        """See Format."""
        return CompletionWriter(state, request, id, generation)


class CompletionWriter(OpenAIWriter):
    """text_completion, whole and in chunks."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, state: State, request: CompletionRequest, id: str, generation: Generation) -> None:
        super().__init__(state, request, id)
        self._state = state
        self._request = request
        self._choices = generation.choices
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._per_prompt = len(self._choices) // generation.prompts
        """Sequences: n, or best_of."""
        self._unsent_prompt: set[int] = {choice.index for choice in generation.choices}

    @property
    def stream(self) -> CompletionWriter | None:
        """See Writer."""
        return self if self._streams else None

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        return self._answer(generation, map(self._choice, *self._told()), {})

    def opening(self, choice: Choice) -> bytes:
        """See Writer. The prompt's text (echo) goes with the first chunk."""
        return b""

    def chunks(self, choice: Choice) -> bytes:
        """See Writer."""
        pending = choice.pending
        request = self._request
        first = choice.index in self._unsent_prompt
        self._unsent_prompt.discard(choice.index)
        text = pending.text
        if first and request.echo:
            text = choice.prompt.text + text
        plain = pending.finish_reason is None and request.logprobs is None and not request.return_token_ids
        rest: dict[str, Any] | None = None
        if not plain:
            rest = {
                "logprobs": self._piece(choice, pending.logprobs, first),
                "finish_reason": pending.finish_reason,
                "stop_reason": pending.stop_reason,
            }
            if request.return_token_ids:
                rest["token_ids"] = pending.token_ids
                if first:
                    rest["prompt_token_ids"] = choice.prompt.ids
        usage = self._usage(choice, choice.generated)
        return self._form.chunk(choice.index, b'"text":' + encode(text), rest=rest, usage=usage)

    def _told(self) -> tuple[Sequence[Choice], Sequence[int]]:
        """The choices that are told, and their indices: of best_of, the n with the greatest mean logprob."""
        told: list[Choice] = []
        for start in range(0, len(self._choices), self._per_prompt):
            every = self._choices[start : start + self._per_prompt]
            if self._per_prompt > self._request.n:
                every = sorted(every, key=_mean_logprob, reverse=True)[: self._request.n]
            told += every
        return told, range(len(told))

    def _choice(self, choice: Choice, index: int) -> dict[str, Any]:
        request, output = self._request, choice.pending
        given = None if _prompt_logprobs(request) is None else self._prompt_logprobs_of(choice)
        return {
            "index": index,
            "text": (choice.prompt.text if request.echo else "") + output.text,
            "logprobs": self._piece(choice, output.logprobs, first=True),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "prompt_logprobs": None
            if given is None
            else array(decode_prompt_logprobs(self._state.tokenizer, choice.prompt.ids[0], given)),
            "token_ids": output.token_ids if request.return_token_ids else None,
            "prompt_token_ids": choice.prompt.ids if request.return_token_ids else None,
        }

    def _piece(self, choice: Choice, entries: Sequence[DecodedLogprob], first: bool) -> dict[str, Any] | None:
        request = self._request
        if request.logprobs is None:
            return None
        pieces = self._logprobs.get(choice.index)
        if pieces is None:
            top = -1 if request.logprob_token_ids else request.logprobs
            pieces = CompletionLogprobs(top, as_ids=self._state.tokens_as_ids(request))
            self._logprobs[choice.index] = pieces
        if not (first and request.echo):
            return pieces.piece(entries)
        prompt = choice.prompt
        given = self._prompt_logprobs_of(choice)
        read = decode_prompt(self._state.tokenizer, prompt.ids[0], given, prompt.text)
        return pieces.piece(chain(read, entries))

    def _prompt_logprobs_of(self, choice: Choice) -> Sequence[Any]:
        """The prompt's logprobs are computed once, by the first of its n choices."""
        leader = self._choices[choice.index - choice.index % self._per_prompt]
        return leader.prompt_logprobs or ()


def _best_of(request: CompletionRequest, params: SamplingParams) -> SamplingParams:
    """Parameters of as many sequences as the best are chosen of. Raises InvalidRequest."""
    best_of, n = request.best_of, request.n
    if best_of is None or best_of == n:
        return params
    if best_of < n:
        raise InvalidRequest(
            f"best_of must be at least n, got best_of={best_of} with n={n}.", param="best_of"
        )
    if request.stream or request.use_beam_search:
        other = "stream" if request.stream else "use_beam_search"
        raise InvalidRequest(
            f"best_of is not possible with {other}.", param="best_of", advice="Leave it out, or set it to n."
        )
    if best_of > _MOST_SEQUENCES:
        raise InvalidRequest(f"best_of must be at most {_MOST_SEQUENCES}, got {best_of}.", param="best_of")
    told = params.logprobs if params.logprobs is not None else 0
    return params.with_(n=best_of, logprobs=told)


def _mean_logprob(choice: Choice) -> float:
    entries = choice.pending.logprobs
    return sum(entry.logprob or 0.0 for entry in entries) / max(len(entries), 1)


def _prompt_logprobs(request: CompletionRequest) -> int | None:
    if request.prompt_logprobs is None and request.echo:
        return request.logprobs
    return request.prompt_logprobs


def _told_logprobs(state: State, request: CompletionRequest) -> int:
    """Of each token of the prompt, in one choice."""
    vocab_size = state.engine.info.vocab_size
    echoed = told_logprobs(request.logprobs, vocab_size) if request.echo else 0
    return told_logprobs(_prompt_logprobs(request), vocab_size) + echoed


async def _checked_inputs(state: State, request: CompletionRequest) -> list[str | list[int]]:
    """`_inputs`, in a thread where there are many ids."""
    given = request.prompt if isinstance(request.prompt, list) else []
    size = len(given)
    if size <= IN_THREAD:  # else a loop over them would hold up everybody by itself
        size += sum(len(each) for each in given if isinstance(each, list))
    return await state.work.do(size, _inputs, request, state.engine.info)


def _inputs(request: CompletionRequest, info: ModelInfo) -> list[str | list[int]]:
    """The prompts of a request: texts or token ids. Raises InvalidRequest."""
    prompt = request.prompt
    if not prompt:  # vLLM's words; prompt_embeds are refused by name before they get here
        raise InvalidRequest("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    longest = info.max_model_len if request.truncate_prompt_tokens is None else None
    if isinstance(prompt, str) or not {int, float, bool}.isdisjoint(map(type, prompt)):
        return [text_or_ids(prompt, info.vocab_size, longest, "prompt")]
    return [text_or_ids(each, info.vocab_size, longest, f"prompt[{i}]") for i, each in enumerate(prompt)]
