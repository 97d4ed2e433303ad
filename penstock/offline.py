"""Offline generation: the engine of `penstock serve` without a server.

    from penstock import LLM, SamplingParams

    llm = LLM("demo")
    for output in llm.generate(["A Pod is", "PagedAttention is"], SamplingParams(max_tokens=32)):
        print(output.outputs[0].text)

The same scheduler, executor, sampler and text layer; requests are batched continuously, results come back in
the order of the prompts. Names follow vLLM's LLM class.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

from penstock.core.errors import (
    BY_NAME,
    ContextLengthExceeded,
    InvalidRequest,
    PenstockError,
    RequestFailed,
    StartupError,
)
from penstock.core.plan import Event, Failure, TokenLogprob
from penstock.core.request_spec import Prompt as EnginePrompt
from penstock.core.request_spec import RequestSpec
from penstock.core.sampling_params import BeamSearchParams, SamplingParams
from penstock.core.structured import Grammar
from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.environment import prepare
from penstock.engine.messages import Abort, Add, ModelInfo
from penstock.grammar.prepare import prepare as prepare_grammar
from penstock.model.generation import generation_defaults
from penstock.text.bad_words import bad_words_ids
from penstock.text.beams import Beam, BeamSearch
from penstock.text.chat_template import ChatTemplate
from penstock.text.output import OutputProcessor, decode_prompt_logprobs, ranked
from penstock.text.parsers.reasoning import ReasoningParser
from penstock.text.thoughts import thought_limit
from penstock.text.tokenizer import Tokenizer

from .offline_pooling import PoolingMixin

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids} with an optional "cache_salt"."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 for the most probable token."""
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum of the tokens' logprobs, if they were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token its own entry and the most probable ones, by token id; if they were asked for."""
    finish_reason: str | None = None
    """stop, length or abort."""
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its completions."""

    request_id: str
    prompt: str | None
    """None when the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """The same for each prompt token, None for the first; if they were asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    device_seconds: float = 0.0
    """Share of the device's time, all completions together."""

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(slots=True)
class BeamSearchSequence:
    """One continuation that a beam search has found."""

    tokens: list[int]
    """Those of the prompt, and what was found; the ending one where it is included."""
    cum_logprob: float
    text: str
    """Of all tokens."""
    finish_reason: str
    """stop or length."""
    stop_reason: int | None = None
    """The token that ended it."""


@dataclass(slots=True)
class BeamSearchOutput:
    """The best continuations of one prompt, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Sequence:
    """One completion under way."""

    request: RequestOutput
    output: CompletionOutput
    processor: OutputProcessor


class LLM(PoolingMixin):
    """A model, loaded and ready: to generate, or to embed, classify and score (`offline_pooling`).

    Args:
        model: local directory, Hugging Face id, or "demo".
        settings: any field of EngineConfig: dtype, max_model_len, kv_cache_memory_bytes, seed, …

    Raises:
        StartupError: the model cannot be served; the message says why and what would work.
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        unknown = sorted(settings.keys() - {entry.name for entry in fields(EngineConfig)})
        if unknown:
            raise StartupError(
                f"LLM has no option {unknown[0]!r}.",
                param=unknown[0],
                advice="Options are the engine flags of penstock serve --help, with underscores.",
            )
        # nobody waits for single tokens: prompts take all of a step that they can
        config = EngineConfig(**{"model": model, "max_num_mixed_prefill_tokens": 0, **settings})
        prepare(os.environ)  # takes effect as far as torch has not been used yet
        self._policy = config.scheduling_policy
        self._engine = build_engine(config)
        path = Path(self._engine.info.path)
        self._tokenizer = Tokenizer.from_directory(path)
        self._template = ChatTemplate.from_tokenizer(self._tokenizer)
        self._defaults = generation_defaults(config.generation_config, path).sampling
        self._numbers = count()

    @property
    def _info(self) -> ModelInfo:
        return self._engine.info

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile what an output is to match. Raises InvalidRequest where that cannot be done."""
        held = self._engine.loop.held
        if held is not None:
            held.compile(grammar)

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate uses when no parameters are given: the model's own defaults."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. Results are in the order of the prompts.

        Args:
            prompts: one prompt or several: text, token ids, or vLLM's dictionaries.
            sampling_params: for all prompts, or one per prompt.
            use_tqdm: show a progress bar when standard error is a terminal.
            priority: one per prompt, lower first; needs scheduling_policy="priority".

        Raises:
            InvalidRequest: a prompt or parameter can never work; nothing was generated.
            RequestFailed: a request failed in the engine.
        """
        if self._info.pooling is not None:
            raise InvalidRequest(
                f"The model does not generate text: it is loaded for {', '.join(self._info.pooling.tasks)}.",
                param="model",
                advice="Use embed, classify, score or encode.",
            )
        every = _prompts(prompts)
        params = self._params(sampling_params, len(every))
        if priority is not None and len(priority) != len(every):
            raise InvalidRequest(f"{len(every)} prompts need as many priorities, got {len(priority)}.")
        if priority is not None and any(priority) and self._policy != "priority":
            raise InvalidRequest(
                f"priority has no effect under scheduling_policy={self._policy!r}.",
                param="priority",
                advice='Make the LLM with scheduling_policy="priority".',
            )
        specs: list[RequestSpec] = []
        sequences: dict[str, _Sequence] = {}
        requests = []
        for index, (prompt, chosen) in enumerate(zip(every, params, strict=True)):
            text, ids, salt = self._encode(prompt)
            request = RequestOutput(str(next(self._numbers)), text, ids, [])
            requests.append(request)
            spec = self._spec(request, chosen, priority[index] if priority else 0, salt)
            specs.append(spec)
            for name in spec.ids:
                output = CompletionOutput(len(request.outputs))
                request.outputs.append(output)
                sequences[name] = _Sequence(request, output, OutputProcessor(self._tokenizer, ids, chosen))
        with _Progress(len(sequences), use_tqdm) as progress:
            for event in self._run(specs):
                if self._take(event, sequences[event.request]):
                    progress.advance()
        return requests

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several.

        Args:
            tools: functions that the model is told of, in OpenAI's form. What it makes of them is in the
            text, as in
                vLLM: `penstock.text.parsers` reads it.
        """
        conversations: Sequence[Any] = (
            [messages] if messages and isinstance(messages[0], Mapping) else messages
        )
        template = (
            ChatTemplate.from_tokenizer(self._tokenizer, chat_template) if chat_template else self._template
        )
        prompts = [
            self._tokenizer.encode(
                template.render(
                    conversation,
                    **{
                        "add_generation_prompt": add_generation_prompt,
                        "continue_final_message": continue_final_message,
                        **({"tools": list(tools)} if tools else {}),
                        **(chat_template_kwargs or {}),
                    },
                ),
                add_special_tokens=False,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The most probable continuations of each prompt, found together (`penstock.text.beams`).

        Raises InvalidRequest for a prompt that can never work, and RequestFailed.
        """
        searches: list[BeamSearch] = []
        salts: list[str] = []
        eos_ids = () if params.ignore_eos else self._engine.info.eos_ids
        asked = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            logprobs=min(2 * params.beam_width, self._engine.info.vocab_size),
        )
        for prompt in _prompts(prompts):
            text, ids, salt = self._encode(prompt)
            room = self._spec(RequestOutput("", text, ids, []), asked.with_(max_tokens=None), 0, salt)
            searches.append(
                BeamSearch(
                    ids,
                    width=params.beam_width,
                    max_tokens=min(params.max_tokens, room.prompts[0].max_tokens),
                    length_penalty=params.length_penalty,
                    eos_ids=eos_ids,
                    include_stop=params.include_stop_str_in_output,
                )
            )
            salts.append(salt)
        while running := [each for each in zip(searches, salts, strict=True) if not each[0].done]:
            specs = [
                RequestSpec(
                    id=str(next(self._numbers)),
                    prompts=tuple(EnginePrompt(ids, 1) for ids in search.asks),
                    sampling=asked.sampling,
                    cache_salt=salt,
                )
                for search, salt in running
            ]
            found: dict[str, TokenLogprob] = {}
            for event in self._run(specs):
                if event.failure is not None:
                    raise _failed(event)
                if event.logprobs:
                    found[event.request] = event.logprobs[0]
            for (search, _), spec in zip(running, specs, strict=True):
                search.take([found[id] for id in spec.ids])
        return [BeamSearchOutput([self._found(s, beam, params) for beam in s.best()]) for s in searches]

    def _found(self, search: BeamSearch, beam: Beam, params: BeamSearchParams) -> BeamSearchSequence:
        tokens = [*search.prompt, *beam.tokens]
        return BeamSearchSequence(
            tokens,
            beam.logprob,
            self._tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens),
            "length" if beam.stop_reason is None else "stop",
            beam.stop_reason,
        )

    def close(self) -> None:
        """Free the model's memory."""
        self._engine.close()

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise InvalidRequest(f"{count} prompts need as many sampling_params, got {len(given)}.")
        return given

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int], str]:
        """(text if there is one, token ids, cache salt)"""
        salt = ""
        if isinstance(prompt, Mapping):
            unknown = sorted(prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"})
            if unknown or not {"prompt", "prompt_token_ids"} & prompt.keys():
                raise InvalidRequest(
                    "a prompt dictionary needs 'prompt' or 'prompt_token_ids', and takes 'cache_salt'; "
                    f"got {sorted(prompt)}.",
                    param="prompts",
                )
            salt = str(prompt.get("cache_salt") or "")
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), [int(token) for token in prompt["prompt_token_ids"]], salt
            prompt = str(prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt), salt
        return None, [int(token) for token in prompt], salt

    def _spec(self, request: RequestOutput, params: SamplingParams, priority: int, salt: str) -> RequestSpec:
        """The engine's request for one prompt and its n sequences."""
        info, ids = self._engine.info, request.prompt_token_ids
        if params.bad_words:
            params = params.with_(bad_words_ids=bad_words_ids(self._tokenizer, params.bad_words))
        if params.thinking_token_budget is not None and params.thought is None:
            limit = thought_limit(self._tokenizer, params.thinking_token_budget, ReasoningParser)
            params = params.with_(thought=limit)
        params.verify(info.vocab_size, -1)
        outside = next((token for token in ids if not 0 <= token < info.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(
                f"the prompt contains token id {outside}; the vocabulary has ids 0 to {info.vocab_size - 1}."
            )
        room = info.max_model_len - len(ids)
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens; the context, with the output, is {info.max_model_len}."
            )
        asked = params.structured_outputs
        return RequestSpec(
            id=request.request_id,
            grammar=None if asked is None else prepare_grammar(asked)[0],
            prompts=(EnginePrompt(tuple(ids), min(room, params.max_tokens or room)),),
            sampling=params.sampling,
            n=params.n,
            priority=priority,
            cache_salt=salt,
        )

    def _run(self, specs: Iterable[RequestSpec]) -> Iterator[Event]:
        loop = self._engine.loop
        try:
            for spec in specs:
                yield from loop.handle(Add(spec))
            while loop.has_work:
                if loop.held is not None and not loop.can_step:
                    loop.held.wait()
                yield from loop.step()
        except KeyboardInterrupt:  # it may have come anywhere
            loop.reset()
            raise
        finally:
            if loop.has_work:  # failed, or nobody wants the rest: leave nothing behind for the next call
                loop.handle(Abort(loop.unfinished))
                while loop.has_work:
                    loop.step()

    def _take(self, event: Event, sequence: _Sequence) -> bool:
        """Add an event to its sequence; whether it was the last."""
        if event.failure is not None:
            raise _failed(event)
        delta = sequence.processor.push(event)
        output, request = sequence.output, sequence.request
        output.text += delta.text
        output.token_ids += delta.token_ids
        if delta.logprobs:
            output.logprobs = [*(output.logprobs or []), *_logprobs(map(ranked, delta.logprobs))]
            new = event.logprobs[: len(delta.token_ids)]
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(e.logprob for e in new)
        if event.prompt_logprobs is not None:
            first = request.prompt_token_ids[0]
            decoded = decode_prompt_logprobs(self._tokenizer, first, event.prompt_logprobs)
            request.prompt_logprobs = [None, *_logprobs(decoded)]
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        if output.index == 0:
            request.num_cached_tokens = event.cached
        if event.finish is not None:
            request.device_seconds += event.device_seconds
            return True
        if delta.stop_found:  # its last event comes at once, or with the step that is under way
            for last in self._engine.loop.handle(Abort((event.request,))):
                return self._take(last, sequence)
        return False


def _failed(event: Event) -> PenstockError:
    failure = event.failure or Failure("unknown")
    return BY_NAME.get(failure.type, RequestFailed)(
        f"request {event.request} failed: {failure.cause}", param=failure.param, advice=failure.advice
    )


def _logprobs(positions: Iterable[Mapping[int, Any] | None]) -> list[dict[int, Logprob]]:
    """vLLM's shape: token id → Logprob, the token itself first."""
    return [
        {token: Logprob(**entry) for token, entry in position.items()}
        for position in positions
        if position is not None
    ]


def _prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    every: list[Any] = list(prompts)
    if every and all(isinstance(token, Integral) for token in every):
        return [every]
    return every


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar: Any = None
        if wanted and total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("requests", total=total)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        if self._bar:
            self._bar.advance(self._task)
