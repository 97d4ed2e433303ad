"""Which table of operations a device gets: decided once, when an engine starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from penstock.core.errors import StartupError

from .operations import Operations
from .reference import reference_operations
from .torch_operations import torch_operations

#: What `--attention-backend` takes.
ATTENTION_BACKENDS = ("auto", "cpu", "torch", "reference")


def create_operations(
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str = "auto",
    quantized: bool = False,
    batch_invariant: bool | None = None,
) -> Operations:
    """The fastest table for tensors of `dtype` on `device`.

    On a CPU this may wait for a compiler, once per machine; without one a warning says what is lost.

    Args:
        attention: one of ATTENTION_BACKENDS, to find out whether a fast kernel is at fault. Any but "auto"
            replaces that entry alone.
        quantized: whether weights are to be quantised. That is worth a longer wait.
        batch_invariant: whether the bits of a row must depend on it alone; else they do where nothing is
            faster otherwise.

    Raises:
        StartupError: an attention backend that does not exist, or not here; no batch invariance here.
    """
    if attention not in ATTENTION_BACKENDS:
        raise StartupError(
            f"Unknown attention backend {attention!r}.",
            param="--attention-backend",
            advice=f"Choose one of {', '.join(ATTENTION_BACKENDS)}.",
        )
    if batch_invariant and attention in ("torch", "reference"):
        raise StartupError(
            f"The attention backend {attention!r} is not batch-invariant.",
            param="--batch-invariant",
            advice="Use --attention-backend auto, or leave out --batch-invariant.",
        )
    patient = quantized or attention == "cpu" or batch_invariant is True
    table = _fastest(device, dtype, patient, batch_invariant)
    if batch_invariant and not table.batch_invariant:
        raise _no_invariance(device, dtype)
    if attention in ("auto", table.name):
        return table
    if attention == "cpu":
        raise _no_cpu_attention(device, dtype)
    other = torch_operations if attention == "torch" else reference_operations
    return replace(table, attention=other(device, dtype).attention, stack=None, batch_invariant=False)


def _fastest(
    device: torch.device, dtype: torch.dtype, patient: bool, batch_invariant: bool | None
) -> Operations:
    """The compiled kernels where they exist; torch's operators everywhere."""
    plain = torch_operations(device, dtype)
    if not _has_kernels(device, dtype):
        return plain
    from .cpu.library import PATIENCE, WAIT_SECONDS, available
    from .cpu.operations import cpu_operations

    library = available(PATIENCE if patient else WAIT_SECONDS)
    return plain if library is None else cpu_operations(library, plain, batch_invariant)


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def _no_cpu_attention(device: torch.device, dtype: torch.dtype) -> StartupError:
    if not _has_kernels(device, dtype):
        return StartupError(
            f"The attention backend 'cpu' computes float32 and bfloat16, not {dtype} on {device}.",
            param="--attention-backend",
            advice="Use --attention-backend auto.",
        )
    return StartupError(
        "The CPU kernels are not available.",
        param="--attention-backend",
        advice="The log says why; --attention-backend torch does without.",
    )


def _no_invariance(device: torch.device, dtype: torch.dtype) -> StartupError:
    if not _has_kernels(device, dtype):
        return StartupError(
            f"{dtype} on {device} is not batch-invariant: torch's operators choose their sums by the batch.",
            param="--batch-invariant",
            advice="Use --device cpu with --dtype float32 or bfloat16, or leave out --batch-invariant.",
        )
    return StartupError(
        "Only the CPU kernels are batch-invariant, and they are not available.",
        param="--batch-invariant",
        advice="The log says why they are not; or leave out --batch-invariant.",
    )
