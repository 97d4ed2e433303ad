"""What machine this is: cores, instruction sets, memory, and two measured limits. Linux; guesses nothing.

The measurements take about 100 ms together: the bandwidth of reading memory (the limit of decode) and the
rate of matrix products (the limit of prefill). They are the prior of the cost model.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.core.cost import Coefficients
from penstock.files import shown
from penstock.kernels.capability import check_driver
from penstock.kernels.create import known_device

from . import driver
from .machine import memory

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device and its measured limits."""

    device: str
    """cpu or cuda."""
    name: str
    threads: int
    """CPU threads that compute; 0 on CUDA."""
    isa: str
    """The matrix instructions that this CPU has, or the compute capability."""
    memory_bytes: int
    """All of it."""
    available_bytes: int
    """What is free for the model and its cache."""
    bandwidth: float
    """Measured bytes/s of reading memory."""
    flops: float
    """Measured FLOP/s of a matrix product in the model's dtype."""

    def describe(self) -> str:
        """One line for the start-up log."""
        where = f"{self.name}, {self.threads} threads, {self.isa}" if self.device == "cpu" else self.name
        return (
            f"{where}; {self.available_bytes / 2**30:.1f} of {self.memory_bytes / 2**30:.1f} GiB free; "
            f"measured {self.bandwidth / 1e9:.1f} GB/s, {self.flops / 1e9:,.0f} GFLOP/s"
        )


def choose_device(wanted: str) -> torch.device:
    """The torch device for --device; raises StartupError if CUDA is wanted and absent."""
    from penstock.core.errors import StartupError

    if wanted == "auto":
        if torch.cuda.is_available():
            wanted = "cuda"
        else:
            if driver.is_there() and torch.version.cuda is not None:
                logger.warning(
                    "The machine has a driver for a GPU (%s), but torch can use none: this engine runs on "
                    "the CPU. --device cuda says why.",
                    driver.version() or "of unknown version",
                )
            return torch.device("cpu")
    if wanted == "cuda":
        _check_driver()
    if wanted == "cuda" and not torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise StartupError(
            "--device cuda: torch sees no CUDA device"
            + ("." if seen is None else f": CUDA_VISIBLE_DEVICES is {shown(seen)}."),
            param="--device",
            advice="Check nvidia-smi and that this torch is a CUDA build, or use --device cpu.",
        )
    return torch.device(wanted)


def _check_driver() -> None:
    """Raise StartupError, with the versions, where the driver or the GPU is too old for this torch."""
    runtime = torch.version.cuda
    if runtime is None:  # a build for CPUs, or for ROCm
        return
    there = torch.cuda.is_available()
    check_driver(
        runtime=runtime,
        driver_cuda=driver.newest_cuda(),
        driver=driver.version(),
        device=known_device(torch.device("cuda")) if there else None,
        compiled_for=tuple(torch.cuda.get_arch_list()) if there else (),
    )


def inspect_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """Look at the machine and measure it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        name, threads = properties.name, 0
        isa = f"compute capability {properties.major}.{properties.minor}"
    else:
        total, free = memory()
        name, threads, isa = cpu_name(), torch.get_num_threads(), cpu_isa()
    return Hardware(
        device=device.type,
        name=name,
        threads=threads,
        isa=isa,
        memory_bytes=total,
        available_bytes=free,
        bandwidth=_bandwidth(device),
        flops=_flops(device, multiplied_in(isa, dtype)),
    )


def prior(hardware: Hardware, weight_bytes: int, parameters: int, kv_bytes_per_token: int) -> Coefficients:
    """The roofline as a cost model: weights are read once, each token costs 2 FLOP per parameter, and each
    (query, key) pair reads one token's keys and values."""
    return Coefficients(
        fixed=weight_bytes / hardware.bandwidth + 1e-3,
        per_token=2.0 * parameters / hardware.flops + 1e-6,
        per_context=kv_bytes_per_token / hardware.bandwidth + 1e-12,
        per_sample=2e-5,
    )


def roofline(hardware: Hardware, weight_bytes: int, parameters: int) -> str:
    """What to expect at best, by the two limits that were measured: one line for the start-up log."""
    return (
        f"at best {hardware.bandwidth / weight_bytes:,.0f} tok/s for one request "
        f"({hardware.bandwidth / 1e9:.1f} GB/s over {weight_bytes / 1e9:.2f} GB of weights) and "
        f"{hardware.flops / (2 * parameters):,.0f} tok/s of prompts"
    )


def cpu_name() -> str:
    """As the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """Instruction sets that matter for matrix products."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        return platform.machine()
    known = {
        "amx_bf16": "AMX-BF16",
        "amx_int8": "AMX-INT8",
        "avx512_bf16": "AVX512-BF16",
        "avx512_vnni": "AVX512-VNNI",
        "avx512f": "AVX512",
        "avx2": "AVX2",
    }
    found = [title for key, title in known.items() if key in flags]
    return " ".join(found) or platform.machine()


def multiplied_in(isa: str, dtype: torch.dtype) -> torch.dtype:
    """What the kernels' products of this dtype compute in, as far as it decides their rate.

    An x86 processor without instructions for bfloat16 multiplies it in float32. torch's own product, which
    would be measured, is a naive loop there: sixty times as slow, and a second of every start.
    """
    lacks = "AVX" in isa and "BF16" not in isa
    return torch.float32 if dtype == torch.bfloat16 and lacks else dtype


def _bandwidth(device: torch.device) -> float:
    """Bytes/s of summing an array that is several times as large as the caches: 200 MB, 1 GB on CUDA."""
    count = 48 << 20 if device.type == "cpu" else 256 << 20
    data = torch.ones(count, dtype=torch.float32, device=device)
    return data.nbytes / _fastest(data.sum, device)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 512 if device.type == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / _fastest(lambda: a @ a, device)


def _fastest(work: object, device: torch.device, runs: int = 3) -> float:
    best = float("inf")
    for _ in range(runs + 1):  # the first one warms up
        started = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
