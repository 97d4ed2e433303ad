"""Code of users in the sampler: classes named by --logits-processors, with vLLM's V1 interface.

    class MyProcessor:                                       # may subclass LogitsProcessor below, need not
        def __init__(self, vllm_config, device, is_pin_memory): …
        def update_state(self, batch_update): …              # who is in which row from now on
        def apply(self, logits) -> logits: …                 # [rows, V] float32
        def is_argmax_invariant(self) -> bool: …

What fits of vLLM's: `update_state` is called once before each `apply`, with None where the rows are those
of the last time; `params` is the request's Sampling, whose `extra_args` are the client's `vllm_xargs`; the
output's token list is one that grows. What does not: rows never move (`moved` is empty; a request that
comes to another row is added there again), `validate_params` is not called, rows of drafts are rows of
their own, and `vllm_config` has `max_num_seqs` and `vocab_size` only, also as
`scheduler_config.max_num_seqs` and `model_config.get_vocab_size()`.

They run after allowed_token_ids, bias and penalties, and before grammars, temperature and cuts. One that
raises fails the requests in whose company alone it raises."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.core.errors import StartupError, cause
from penstock.core.sampling_params import Sampling

from .state import SamplingState

AddedRequest = tuple[int, Sampling, list[int], list[int]]
"""(row, parameters, the prompt's token ids, the output's so far: a list that grows)"""


@dataclass(frozen=True, slots=True)
class BatchUpdate:
    """Who left and who came: first those who left, then those who came, who may take a row over."""

    batch_size: int
    removed: Sequence[int]
    """Rows."""
    added: Sequence[AddedRequest]
    moved: Sequence[Any] = ()


class LogitsProcessor(Protocol):
    """What a class has to have."""

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [rows, V], changed in place or not."""
        ...

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each `apply`."""
        ...

    def is_argmax_invariant(self) -> bool:
        """Whether a greedy request is none of its business."""
        ...


def load(names: Sequence[str]) -> tuple[type[Any], ...]:
    """The classes of `module:Class` names. Raises StartupError."""
    found = []
    for name in names:
        module, colon, path = name.partition(":")
        try:
            if not colon or not module or not path:
                raise ValueError("it is not module:Class")
            kind: Any = importlib.import_module(module)
            for part in path.split("."):
                kind = getattr(kind, part)
            missing = [
                each
                for each in ("apply", "update_state", "is_argmax_invariant")
                if not callable(getattr(kind, each, None))
            ]
            if not isinstance(kind, type) or missing:
                raise TypeError(f"it has no {', '.join(missing)}" if missing else "it is no class")
        except Exception as error:
            raise StartupError(
                f"--logits-processors {name} cannot be loaded: {cause(error)}.",
                param="--logits-processors",
                advice="Give module:Class, of a module that the engine can import (PYTHONPATH).",
            ) from error
        found.append(kind)
    return tuple(found)


class Processors:
    """The user's processors of one engine, made once.

    Args:
        kinds: classes, from `load`.
        device: where logits are.
    """

    def __init__(
        self, kinds: Sequence[type[Any]], device: torch.device, *, max_num_seqs: int, vocab_size: int
    ) -> None:
        facts = SimpleNamespace(
            max_num_seqs=max_num_seqs,
            vocab_size=vocab_size,
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
            model_config=SimpleNamespace(get_vocab_size=lambda: vocab_size),
        )
        self._made: list[LogitsProcessor] = []
        for kind in kinds:
            try:
                self._made.append(kind(facts, device, False))
            except Exception as error:
                name = f"{kind.__module__}:{kind.__qualname__}"
                raise StartupError(
                    f"--logits-processors {name} cannot be made: {cause(error)}.",
                    param="--logits-processors",
                ) from error
        self._rows: list[_Row] = []
        self._uncertain = 0
        """Rows that a processor may know of, after one has failed."""
        self._vocab_size = vocab_size

    def apply(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Let each of them change the logits [R, V] of these requests."""
        rows = [_Row(state) for state in states]
        update = self._update(rows)
        try:
            for processor in self._made:
                processor.update_state(update)
                logits = processor.apply(logits)
        except BaseException:
            self._forget(rows)
            raise
        if logits.shape != (len(rows), self._vocab_size):
            self._forget(rows)
            raise ValueError(f"a logits processor returned logits of shape {list(logits.shape)}.")
        self._rows = rows
        return logits

    def _forget(self, rows: list[_Row]) -> None:
        """They may have heard of these or not: next time, all leave and come anew."""
        self._uncertain = max(len(rows), len(self._rows), self._uncertain)
        self._rows = []

    def _update(self, rows: list[_Row]) -> BatchUpdate | None:
        before = self._rows
        removed = list(range(len(rows), len(before)))
        if self._uncertain:  # and nobody is known
            removed, self._uncertain = list(range(self._uncertain)), 0
        added: list[AddedRequest] = []
        for place, row in enumerate(rows):
            if place < len(before) and before[place].state is row.state:
                row.output = before[place].output
                row.follow()
            else:
                if place < len(before):
                    removed.append(place)
                row.follow()
                added.append((place, row.state.params, row.prompt, row.output))
        return BatchUpdate(len(rows), removed, added) if removed or added else None


class _Row:
    """One request in one row."""

    __slots__ = ("output", "state")

    def __init__(self, state: SamplingState) -> None:
        self.state = state
        self.output: list[int] = []

    @property
    def prompt(self) -> list[int]:
        return self.state.tokens[: self.state.prompt_len]

    def follow(self) -> None:
        """The output's list, as far as its tokens are known."""
        self.output += self.state.tokens[self.state.prompt_len + len(self.output) :]
