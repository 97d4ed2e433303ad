"""Memory of several engines on one device, decided together, before the first of them starts.

    limit ┌─────────────────────────────┐  the same share of the free memory that one engine alone would take
          │ processes, weights,         │  of each replica
          │ activations, graphs         │
          │ KV caches as they are given │
          │ KV caches that are shared   │  one request of max_model_len each; then the rest in proportion
          └─────────────────────────────┘  to what each could use

Each engine is then told its size (--kv-cache-memory-bytes): what is printed is what happens, in whatever
order they start. Pure arithmetic; see memory.py for one engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.errors import MemoryBudgetError

from .memory import DEFAULT_UTILIZATION, format_size

_SPARED = 0.05
"""Share of the free memory that is left to everybody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one replica of a model takes; bytes."""

    name: str
    replicas: int = 1
    process: int
    """Interpreter and libraries, of all its processes."""
    weights: int
    activations: int
    beside: int = 0
    """Graphs of decode; and on CPU what the host keeps of preempted requests."""
    least: int
    """KV cache of one request of the longest context."""
    most: int
    """KV cache beyond which there would be nothing but prefix hits."""
    block: int
    """KV cache comes in multiples of it."""
    given: int | None = None
    """KV cache as somebody has decided already."""

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.process + self.weights + self.activations + self.beside


@dataclass(frozen=True, slots=True)
class Shares:
    """The table: each replica's KV cache, and whether all of it fits."""

    device: str
    available: int
    limit: int
    needs: tuple[Need, ...]
    kv_caches: tuple[int, ...]
    """Of one replica, in the order of `needs`."""

    @property
    def total(self) -> int:
        """Everything, of all replicas."""
        return sum(
            need.replicas * (need.fixed + cache)
            for need, cache in zip(self.needs, self.kv_caches, strict=True)
        )

    def render(self) -> str:
        """The table, as aligned plain text."""
        width = max(5, *(len(need.name) for need in self.needs))
        more = any(need.beside for need in self.needs)
        heads = (
            "processes",
            "weights",
            "activations",
            *(("beside",) if more else ()),
            "KV cache",
            "replicas",
        )
        heads += ("all",)
        lines = [
            f"Memory ({self.device}), all models together",
            f"  {'model':<{width}}" + "".join(f"{head:>13}" for head in heads),
        ]
        for need, cache in zip(self.needs, self.kv_caches, strict=True):
            sizes = (need.process, need.weights, need.activations, *((need.beside,) if more else ()), cache)
            lines.append(
                f"  {need.name:<{width}}"
                + "".join(f"{format_size(size):>13}" for size in sizes)
                + f"{need.replicas:>13}{format_size(need.replicas * (need.fixed + cache)):>13}"
            )
        rest = width + 13 * (len(heads) - 1)
        lines.append(f"  {'all':<{rest}}{format_size(self.total):>13}")
        lines.append(
            f"  {'free':<{rest}}{format_size(self.available - self.total):>13}"
            f"  of {format_size(self.available)}"
        )
        return "\n".join(lines)


def share(needs: Sequence[Need], *, device: str, available: int, utilization: float | None = None) -> Shares:
    """Decide the size of each replica's KV cache.

    Args:
        available: free memory of the device, in bytes.
        utilization: the share of it that caches without a size of their own may fill up; None is the default
            of one engine.

    Raises:
        MemoryBudgetError: not even one request of the longest context each fits; with the table.
    """
    limit = int(available * (utilization or DEFAULT_UTILIZATION[device]))
    most = int(available * (1.0 - _SPARED))

    def table(caches: Sequence[int]) -> Shares:
        return Shares(device, available, limit, tuple(needs), tuple(caches))

    least = table([need.least if need.given is None else need.given for need in needs])
    if least.total > most:
        raise MemoryBudgetError(
            f"The models do not fit together: they take {format_size(least.total)} at least, and "
            f"{format_size(most)} of the {format_size(available)} that are free may be used.\n"
            f"{least.render()}",
            advice="Use fewer replicas, a smaller max_model_len or memory, quantization, or fewer models.",
        )
    open_ = [need for need in needs if need.given is None]
    wanted = sum(need.replicas * max(0, need.most - need.least) for need in open_)
    rest = max(0, limit - least.total)
    portion = min(1.0, rest / wanted) if wanted else 0.0
    return table(
        [
            need.given
            if need.given is not None
            else need.least + int(max(0, need.most - need.least) * portion) // need.block * need.block
            for need in needs
        ]
    )
