"""What becomes of a table whose kernels cannot be compiled: another one takes over, with one warning.

Compilers fail late: a kernel is compiled when it is first started with arguments of its kind. Until then
nothing of its work is done, so the other table can do it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from penstock.core.errors import cause
from penstock.kernels.attention import AttentionBackend, AttentionStep, ReservedStep, StepLayout
from penstock.kernels.launches import OF_THE_KERNEL, TRITON_ERROR

from .attention import TritonAttention, TritonStep

logger = logging.getLogger("penstock.kernels")

P = ParamSpec("P")
R = TypeVar("R")


class Fallback:
    """Whether a table's kernels still work."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, fast: Callable[P, R], plain: Callable[P, R]) -> Callable[P, R]:
        """`fast`, until a kernel cannot be compiled; then `plain`."""

        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            if not self.failed:
                try:
                    return fast(*args, **kwargs)
                except Exception as error:
                    self.take(error)
            return plain(*args, **kwargs)

        return either

    def take(self, error: Exception) -> None:
        """Fall back, with a warning, if this says that a kernel cannot be compiled; else raise it."""
        if not is_compile_failure(error):
            raise error
        if not self.failed:
            first = cause(error).strip().splitlines()[0]
            logger.warning("Triton's kernels cannot be used, torch's operators are slower: %s", first)
        self.failed = True


def is_compile_failure(error: Exception) -> bool:
    """Whether a kernel was not started, for what Triton, its compilers or its launcher say.

    Not errors of the device (they would come from any kernel), of memory, or of a caller's arguments.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return False
    text = str(error)
    if isinstance(error, RuntimeError) and "CUDA error" in text:
        return False
    if isinstance(error, RuntimeError) and TRITON_ERROR in text:
        return any(words in text for words in OF_THE_KERNEL)
    if isinstance(error, AssertionError):
        return "libcuda" in text  # the driver's library is not where Triton looks for it
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    # Triton's own errors; a RuntimeError of its passes, or of a C compiler that is missing; one that failed
    return (
        "triton" in modules or isinstance(error, (RuntimeError, OSError, ImportError)) or _is_process(error)
    )


def _is_process(error: Exception) -> bool:
    import subprocess

    return isinstance(error, subprocess.SubprocessError)


class GuardedAttention:
    """Triton's attention, and another backend for when it cannot be compiled."""

    name = "triton"

    def __init__(
        self, fallback: Fallback, fast: TritonAttention, plain: Callable[[], AttentionBackend]
    ) -> None:
        self._fallback = fallback
        self._fast = fast
        self._make_plain = plain
        self._plain: AttentionBackend | None = None

    @property
    def failed(self) -> bool:
        """Whether the other backend has taken over."""
        return self._fallback.failed

    def prepare(self, layout: StepLayout) -> AttentionStep:
        """A step of the backend that works."""
        if self.failed:
            return self.prepare_plain(layout)
        return GuardedStep(self, self._fast.prepare(layout), layout)

    def prepare_plain(self, layout: StepLayout) -> AttentionStep:
        """A step of the other backend."""
        if self._plain is None:
            self._plain = self._make_plain()
        return self._plain.prepare(layout)

    def reserve(self, rows: int, blocks: int) -> ReservedStep | None:
        """See ReservingBackend."""
        return None if self.failed else self._fast.reserve(rows, blocks)

    def take(self, error: Exception) -> None:
        """See Fallback."""
        self._fallback.take(error)


class GuardedStep:
    """One step, by the backend that works."""

    def __init__(self, backend: GuardedAttention, fast: TritonStep, layout: StepLayout) -> None:
        self.fast = fast
        self._backend = backend
        self._layout = layout
        self._plain: AttentionStep | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """See AttentionStep."""
        if not self._backend.failed:
            try:
                return self.fast(q, k, v, key_cache, value_cache, scale=scale, window=window)
            except Exception as error:
                self._backend.take(error)
        if self._plain is None:
            self._plain = self._backend.prepare_plain(self._layout)
        return self._plain(q, k, v, key_cache, value_cache, scale=scale, window=window)
