"""The memory plan: what goes where, printed before the KV cache is allocated, refused when it cannot work.

    limit ┌───────────────┐  CPU: a share of the free memory; CUDA: a share of the whole device, if free
          │ weights       │  exact
          │ activations   │  upper bound of one step, with logits and attention's temporary memory
          │ graphs        │  upper bound, on CUDA: what recorded steps of decode keep for themselves
          │ offload       │  on CPU, where the host's memory is the device's; else beside the limit
          │ KV cache      │  whole blocks of what is left
          └───────────────┘

Pure arithmetic: no torch, no system call. It does not know how memory is measured or allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.errors import MemoryBudgetError
from penstock.kernels.limits import workspace_bytes

from .graph_sizes import graph_bytes
from .model_config import ModelConfig

#: Default of --gpu-memory-utilization: of the whole device on CUDA, of the free memory on CPU.
DEFAULT_UTILIZATION = {"cpu": 0.5, "cuda": 0.92}
#: By default the KV cache holds at most this many times what max_num_seqs requests of max_model_len can use;
#: the rest of it would only serve prefix hits.
_ENOUGH = 4
#: Share of the free memory that an exact size leaves to everybody else. On CPU there is somebody: the API's
#: process, the system, the page cache of the weights.
_SPARED = {"cpu": 0.05, "cuda": 0.0}
#: Rows of prompt logits that may exist at one time beside the sampled ones.
_PROMPT_LOGITS_ROWS = 128
#: Bytes per logit of all copies that sampling makes: float32 logits, probabilities, a sort with its indices.
_BYTES_PER_LOGIT = 32


class Sizes(Protocol):
    """What a step's memory hangs on: a ModelConfig, or one rank of a model that is planned
    (fleet/sizing.py)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The plan. All sizes in bytes."""

    device: str
    available: int
    """Free before the model was loaded."""
    utilization: float | None
    """Share of memory that makes the limit; None when the KV cache's size was given."""
    limit: int
    """Weights, activations and KV cache stay within it."""
    weights: int
    activations: int
    kv_cache: int
    """num_blocks whole blocks."""
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    graphs: int = 0
    graph_rows: tuple[int, ...] = ()
    """Decoding requests of each graph."""
    offload: int = 0
    """Of the host's memory, for blocks of preempted requests: host_blocks whole ones."""

    @property
    def host_blocks(self) -> int:
        """Blocks that the host keeps."""
        return self.offload // (self.block_size * self.kv_bytes_per_token)

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def concurrency(self) -> float:
        """Requests of max_model_len that it holds at the same time."""
        return self.num_blocks / math.ceil(self.max_model_len / self.block_size)

    @property
    def free(self) -> int:
        """What is left of the available memory."""
        offload = self.offload if self.device == "cpu" else 0
        return self.available - self.weights - self.activations - self.graphs - self.kv_cache - offload

    def render(self) -> str:
        """The table, as aligned plain text."""
        if self.utilization is None:
            limit = "--kv-cache-memory-bytes"
        else:
            limit = f"--gpu-memory-utilization {self.utilization:g}"
        requests = f"{self.concurrency:,.1f} requests of {self.max_model_len:,} tokens"
        rows = [
            ("weights", self.weights, ""),
            ("activations", self.activations, f"at most, {self.max_num_batched_tokens:,} tokens per step"),
            *self._graphs(),
            ("KV cache", self.kv_cache, f"{self.tokens:,} tokens: {requests}"),
            (
                "",
                None,
                f"{self.num_blocks:,} blocks of {self.block_size}, "
                f"{format_size(self.kv_bytes_per_token)}/token",
            ),
            *self._offload(),
            ("limit", self.limit, limit),
            ("free", self.free, f"of {format_size(self.available)} available"),
        ]
        lines = [f"Memory ({self.device})"]
        for name, size, note in rows:
            lines.append(f"  {name:<12}{'' if size is None else format_size(size):>12}  {note}".rstrip())
        return "\n".join(lines)

    def _graphs(self) -> list[tuple[str, int, str]]:
        if not self.graphs:
            return []
        return [
            (
                "graphs",
                self.graphs,
                f"at most, {len(self.graph_rows)} of 1 to {max(self.graph_rows)} requests",
            )
        ]

    def _offload(self) -> list[tuple[str, int, str]]:
        if not self.offload:
            return []
        tokens = self.host_blocks * self.block_size
        where = "" if self.device == "cpu" else ", in the host's memory"
        return [("offload", self.offload, f"{tokens:,} tokens of preempted requests{where}")]


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of keys and values of one token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype_bytes


def activation_bytes(
    config: Sizes,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    dtype_bytes: int,
    device: str,
) -> int:
    """Upper bound of what one step takes beside weights and KV cache.

    Per token: residual, normed input and output, the projections, their rotation and the attention's output,
    and the MLP's middle (gate and up apart where layers are computed one call after the other); and float32
    copies in norms.
    """
    per_token = _token_bytes(config, dtype_bytes)
    logits = max(max_num_seqs, _PROMPT_LOGITS_ROWS) * config.vocab_size * (dtype_bytes + _BYTES_PER_LOGIT)
    return (
        max_num_batched_tokens * per_token
        + logits
        + workspace_bytes(
            max_model_len=max_model_len,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype_bytes=dtype_bytes,
            device=device,
        )
    )


def encoder_bytes(config: Sizes, *, tokens: int, width: int) -> int:
    """Upper bound of what a step of an encoder takes beside weights and one layer's keys and values.

    Per token: residual and sums, the projections and the attention's output, the MLP's middle before and
    after its activation, and float32 of the last layer where it is pooled. width: bytes of an activation.
    """
    hidden, middle = config.hidden_size, config.intermediate_size
    return tokens * (width * (8 * hidden + 2 * middle) + 4 * 2 * hidden)


def graphs_bytes(
    config: Sizes, rows: Sequence[int], dtype_bytes: int, *, max_model_len: int, block_size: int
) -> int:
    """Upper bound of what the graphs of steps with so many decoding requests keep for themselves."""
    table = 4 * math.ceil(max_model_len / block_size)
    own = config.vocab_size * dtype_bytes + table
    return graph_bytes(rows, _token_bytes(config, dtype_bytes), own)


def _token_bytes(config: Sizes, dtype_bytes: int) -> int:
    """Activations of one token, at most."""
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    attention = 3 * hidden + (q + 2 * kv) + 3 * (q + kv) + 2 * q
    mlp = 3 * hidden + 3 * config.intermediate_size
    return (attention + mlp) * dtype_bytes + 2 * 4 * max(hidden, q + kv)


def plan_memory(
    config: ModelConfig,
    *,
    weight_bytes: int,
    dtype_bytes: int,
    device: str,
    available_bytes: int,
    total_bytes: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    utilization: float | None = None,
    kv_cache_memory_bytes: int | None = None,
    max_model_len: int | None = None,
    graph_rows: Sequence[int] = (),
    offload_bytes: int = 0,
    host_bytes: int | None = None,
) -> MemoryBudget:
    """Decide the size of the KV cache.

    Args:
        weight_bytes: as loaded, CausalLM.weight_bytes.
        dtype_bytes: of one activation or KV element.
        device: "cpu" or "cuda".
        available_bytes: free memory before the weights were loaded.
        total_bytes: all memory of the device.
        utilization: share of memory to use; None is DEFAULT_UTILIZATION.
        kv_cache_memory_bytes: exact size instead; never cut.
        max_model_len: None is the model's context length, -1 the longest that fits.
        graph_rows: decoding requests of each graph that is to be captured.
        offload_bytes: of the host's memory, for preempted requests.
        host_bytes: what is free of it, beside a GPU; None where nobody has looked.

    Raises:
        MemoryBudgetError: one request of max_model_len does not fit, or not even the weights, or not
            kv_cache_memory_bytes; names the flag and the value that would fit. Also when max_model_len is
            over the model's context length.
    """
    wanted = config.context_length if max_model_len is None or max_model_len == -1 else max_model_len
    if wanted > config.context_length:
        raise MemoryBudgetError(
            f"--max-model-len {wanted} is longer than the model's context of {config.context_length} tokens.",
            param="--max-model-len",
            advice=f"Use --max-model-len {config.context_length} or less.",
        )
    per_token = kv_bytes_per_token(config, dtype_bytes)
    block_bytes = per_token * block_size
    graphs = graphs_bytes(config, graph_rows, dtype_bytes, max_model_len=wanted, block_size=block_size)
    offload = offload_bytes // block_bytes * block_bytes
    if offload_bytes and not offload:
        raise MemoryBudgetError(
            f"--kv-offloading-size: {format_size(offload_bytes)} hold not one block, of "
            f"{format_size(block_bytes)}.",
            param="--kv-offloading-size",
            advice="Give more, or leave it out.",
        )
    if device != "cpu" and host_bytes is not None and offload > host_bytes * (1.0 - _SPARED["cpu"]):
        most = host_bytes * (1.0 - _SPARED["cpu"]) / 2**30
        raise MemoryBudgetError(
            f"--kv-offloading-size: {format_size(offload)} of the host's memory are wanted, and "
            f"{format_size(host_bytes)} are free.",
            param="--kv-offloading-size",
            advice=f"Use --kv-offloading-size {math.floor(10 * most) / 10:g} or less.",
        )
    fixed = weight_bytes + graphs + (offload if device == "cpu" else 0)

    def activations(length: int) -> int:
        return activation_bytes(
            config,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=length,
            dtype_bytes=dtype_bytes,
            device=device,
        )

    def budget(length: int, share: float) -> MemoryBudget:
        """The plan for this context length, whether it works or not: num_blocks may even be negative."""
        beside = fixed + activations(length)
        if kv_cache_memory_bytes is not None:
            limit = beside + kv_cache_memory_bytes
        elif device == "cpu":
            limit = int(available_bytes * share)
        else:
            limit = min(int(total_bytes * share), available_bytes)
        blocks = (limit - beside) // block_bytes
        if kv_cache_memory_bytes is None:
            blocks = min(blocks, _ENOUGH * max_num_seqs * math.ceil(length / block_size))
        return MemoryBudget(
            device=device,
            available=available_bytes,
            utilization=share if kv_cache_memory_bytes is None else None,
            limit=limit,
            weights=weight_bytes,
            activations=activations(length),
            kv_cache=max(0, blocks) * block_bytes,
            kv_bytes_per_token=per_token,
            block_size=block_size,
            num_blocks=blocks,
            max_model_len=length,
            max_num_batched_tokens=max_num_batched_tokens,
            graphs=graphs,
            graph_rows=tuple(graph_rows),
            offload=offload,
        )

    spared = int(available_bytes * _SPARED[device])

    def largest(length: int) -> int:
        """Largest exact size that leaves the others their share; may be negative."""
        return available_bytes - spared - fixed - activations(length)

    def fits(length: int, share: float) -> bool:
        if kv_cache_memory_bytes is not None and kv_cache_memory_bytes > largest(length):
            return False
        return budget(length, share).num_blocks >= math.ceil(length / block_size)

    def roomy(blocks: int) -> bool:
        """Whether some exact size holds a request of so many blocks."""
        return blocks * block_bytes <= largest(min(blocks * block_size, wanted))

    def longest(share: float) -> int:
        """Longest context, in whole blocks, that fits; 0 for none."""
        most = math.ceil(wanted / block_size)
        return min(
            wanted, block_size * _most(lambda blocks: fits(min(blocks * block_size, wanted), share), most)
        )

    share = utilization or DEFAULT_UTILIZATION[device]
    if fits(wanted, share):
        return budget(wanted, share)
    shorter = longest(share)
    if max_model_len == -1 and shorter:
        return budget(shorter, share)
    plan = budget(wanted, share)
    advice = [f"--max-model-len {shorter}"] if shorter else []
    needed = math.ceil(wanted / block_size) * block_bytes
    if kv_cache_memory_bytes is not None:
        most = largest(wanted)
        if kv_cache_memory_bytes > most:
            if most >= needed:
                advice.append(f"--kv-cache-memory-bytes {most}")
            elif length := min(wanted, block_size * _most(roomy, math.ceil(wanted / block_size))):
                advice.append(f"--kv-cache-memory-bytes {largest(length)} with --max-model-len {length}")
            raise _too_large(plan, kv_cache_memory_bytes, spared, advice)
        if needed <= most:
            advice.append(f"--kv-cache-memory-bytes {needed}")
    else:
        shares = (n / 100 for n in range(1, 101) if n / 100 > share)
        larger = next((value for value in shares if fits(wanted, value)), None)
        if larger is not None:
            advice.append(f"--gpu-memory-utilization {larger:g}")
        elif not shorter and longest(1.0):
            advice.append(f"--gpu-memory-utilization 1 with --max-model-len {longest(1.0)}")
    raise _refusal(plan, needed, advice)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that fits, 0 for none. What fits, fits with less, too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _refusal(plan: MemoryBudget, needed: int, advice: list[str]) -> MemoryBudgetError:
    """What does not fit: `needed` bytes of KV cache for one request; and the flags that would help."""
    left = plan.limit - plan.weights - plan.activations - _more(plan)
    if left > 0:
        message = (
            f"--max-model-len {plan.max_model_len} needs {format_size(needed)} of KV cache for one request, "
            f"but {format_size(left)} of {format_size(plan.limit)} is left beside weights "
            f"({format_size(plan.weights)}) and activations ({format_size(plan.activations)}){_named(plan)}."
        )
    else:
        message = (
            f"The weights take {format_size(plan.weights)}, a step of {plan.max_num_batched_tokens} tokens "
            f"up to {format_size(plan.activations)}{_named(plan)}: of the "
            f"{format_size(plan.limit)} that may be used, nothing is left for the KV cache."
        )
    return MemoryBudgetError(message, param="--max-model-len", advice=_use(advice))


def _more(plan: MemoryBudget) -> int:
    """What else is within the limit."""
    return plan.graphs + (plan.offload if plan.device == "cpu" else 0)


def _named(plan: MemoryBudget) -> str:
    """The same, in words that follow the others."""
    words = (
        f", and CUDA graphs ({format_size(plan.graphs)}; --enforce-eager does without)" if plan.graphs else ""
    )
    if offload := _more(plan) - plan.graphs:
        words += f", and --kv-offloading-size ({format_size(offload)})"
    return words


def _too_large(plan: MemoryBudget, size: int, spared: int, advice: list[str]) -> MemoryBudgetError:
    """An exact size that is not there: what takes the memory; and the flags that would help."""
    others = f", {format_size(spared)} for the rest of the machine" if spared else ""
    message = (
        f"--kv-cache-memory-bytes {size} ({format_size(size)}) is more than fits: of the "
        f"{format_size(plan.available)} that are free, the weights take {format_size(plan.weights)}, "
        f"a step of {plan.max_num_batched_tokens} tokens up to {format_size(plan.activations)}{_named(plan)}"
        f"{others}."
    )
    return MemoryBudgetError(message, param="--kv-cache-memory-bytes", advice=_use(advice))


def _use(advice: list[str]) -> str:
    return f"Use {' or '.join(advice)}." if advice else "Use a smaller model or dtype, or more memory."


def format_size(count: int) -> str:
    """1610612736 → '1.50 GiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
