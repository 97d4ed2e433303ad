"""Which table of operations a device gets: decided once, when an engine starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from penstock.core.errors import StartupError

from .capability import Device, has_products
from .operations import Operations
from .quantized_linear import with_quantized_linear
from .reference import reference_operations
from .torch_operations import torch_operations
from .triton import launch

#: What `--attention-backend` takes.
ATTENTION_BACKENDS = ("auto", "cpu", "triton", "torch", "reference")


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
    if batch_invariant and attention in ("triton", "torch", "reference"):
        raise StartupError(
            f"The attention backend {attention!r} is not batch-invariant.",
            param="--batch-invariant",
            advice="Use --attention-backend auto, or leave out --batch-invariant.",
        )
    if attention == "triton" and (why := why_no_triton(device, dtype)):
        raise StartupError(
            f"The attention backend 'triton' {why}.",
            param="--attention-backend",
            advice="Use --attention-backend auto.",
        )
    patient = quantized or attention == "cpu" or batch_invariant is True
    table = _fastest(device, dtype, patient, batch_invariant, interpreted=attention == "triton")
    if device.type == "cuda":
        table = with_quantized_linear(table, known_device(device))
    if batch_invariant and not table.batch_invariant:
        raise _no_invariance(device, dtype)
    if attention in ("auto", table.name):
        return table
    if attention == "cpu":
        raise _no_cpu_attention(device, dtype)
    if attention == "triton":
        raise StartupError(
            "Triton's kernels cannot be compiled here.",
            param="--attention-backend",
            advice="The log says why; --attention-backend torch does without.",
        )
    other = torch_operations if attention == "torch" else reference_operations
    return replace(table, attention=other(device, dtype).attention, stack=None, batch_invariant=False)


def _fastest(
    device: torch.device,
    dtype: torch.dtype,
    patient: bool,
    batch_invariant: bool | None,
    *,
    interpreted: bool = False,
) -> Operations:
    """The compiled kernels where they exist; torch's operators everywhere.

    interpreted: whether Triton's kernels are wanted on a CPU, too.
    """
    plain = torch_operations(device, dtype)
    if (device.type == "cuda" or interpreted) and why_no_triton(device, dtype) is None:
        from .triton.operations import triton_operations

        table = triton_operations(plain)
        if table is not None and device.type == "cuda" and not has_products(known_device(device)):
            # what multiplies in Triton is slower there than torch's operators, by far (docs/gpu.md)
            return replace(table, attention=plain.attention, stack=None)
        return table or plain
    if not _has_kernels(device, dtype):
        return plain
    from .cpu.library import PATIENCE, WAIT_SECONDS, available
    from .cpu.operations import cpu_operations

    library = available(PATIENCE if patient else WAIT_SECONDS)
    return plain if library is None else cpu_operations(library, plain, batch_invariant)


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels are not for this device, in words that follow its name; None if they are."""
    if not launch.installed():
        return "needs Triton, which is not installed (pip install triton)"
    if device.type == "cpu":
        interpreted = launch.interpreted()
        return (
            None if interpreted else "needs a GPU; on a CPU it runs for tests alone, with TRITON_INTERPRET=1"
        )
    if device.type != "cuda":
        return f"is not for {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {dtype}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        least = (8, 0) if dtype == torch.bfloat16 else (7, 0)
        if capability < least:
            return (
                f"needs compute capability {least[0]}.{least[1]} for {dtype}, "
                f"and {device} has {capability[0]}.{capability[1]}"
            )
    return None


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


def known_device(device: torch.device) -> Device:
    """What the rules of kernels/capability.py ask for."""
    if device.type != "cuda":
        return Device(device.type)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("cuda", properties.name, None, properties.gcnArchName.partition(":")[0])
    return Device("cuda", properties.name, (properties.major, properties.minor))
