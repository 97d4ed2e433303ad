"""What devices can compute: a table of them, and the words for what they cannot."""

from __future__ import annotations

import pytest

from penstock.core.errors import StartupError
from penstock.kernels.capability import (
    LEAST_DRIVER,
    Device,
    check_driver,
    check_quantization,
    has_bfloat16,
    has_fp8,
    has_triton,
    resolve_dtype,
)

CPU = Device("cpu")
P100 = Device("cuda", "Tesla P100-PCIE-16GB", (6, 0))
V100 = Device("cuda", "Tesla V100-SXM2-32GB", (7, 0))
T4 = Device("cuda", "Tesla T4", (7, 5))
A100 = Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
A10 = Device("cuda", "NVIDIA A10G", (8, 6))
L4 = Device("cuda", "NVIDIA L4", (8, 9))
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
B200 = Device("cuda", "NVIDIA B200", (10, 0))
MI300X = Device("cuda", "AMD Instinct MI300X", None, "gfx942")
GPUS = [P100, V100, T4, A100, A10, L4, H100, B200, MI300X]
ALL = ("int8", "w8a8", "int4", "fp8")


@pytest.mark.parametrize(
    ("device", "bfloat16", "fp8", "triton", "auto"),
    [
        (CPU, True, False, False, "bfloat16"),
        (P100, False, False, False, "float16"),
        (V100, False, False, True, "float16"),
        (T4, False, False, True, "float16"),
        (A100, True, False, True, "bfloat16"),
        (A10, True, False, True, "bfloat16"),
        (L4, True, True, True, "bfloat16"),
        (H100, True, True, True, "bfloat16"),
        (B200, True, True, True, "bfloat16"),
        (MI300X, True, False, True, "bfloat16"),
    ],
    ids=lambda value: value.name or "cpu" if isinstance(value, Device) else str(value),
)
def test_devices(device: Device, bfloat16: bool, fp8: bool, triton: bool, auto: str) -> None:
    assert (has_bfloat16(device), has_fp8(device), has_triton(device)) == (bfloat16, fp8, triton)
    chosen = resolve_dtype("auto", "bfloat16", device)
    assert chosen.dtype == auto
    assert bool(chosen.notes) == (auto != "bfloat16")  # what is not the checkpoint's is told
    assert resolve_dtype("auto", "float32", device) == resolve_dtype("float32", "float16", device)


@pytest.mark.parametrize("device", [V100, T4])
def test_no_bfloat16_is_told_by_the_devices_name(device: Device) -> None:
    (note,) = resolve_dtype("auto", "bfloat16", device).notes
    assert str(device) in note
    assert "--dtype float32" in note
    with pytest.raises(
        StartupError, match=r"needs compute capability 8\.0 or more.*Use --dtype float16"
    ) as caught:
        resolve_dtype("bfloat16", "float16", device)
    assert str(device) in str(caught.value)
    assert resolve_dtype("float16", "bfloat16", device).notes == ()  # asked for


def test_float16_stays_on_a_gpu_and_is_bfloat16_on_a_cpu() -> None:
    assert resolve_dtype("auto", "float16", T4).dtype == "float16"
    assert resolve_dtype("auto", "float16", CPU).dtype == "bfloat16"
    assert len(resolve_dtype("auto", "float16", CPU).notes) == 1


@pytest.mark.parametrize(
    ("scheme", "dtype", "device", "schemes", "words"),
    [
        (
            "fp8",
            "bfloat16",
            A100,
            ALL,
            r"is not for NVIDIA A100.*\(compute capability 8\.0\).*8\.9 or more.*int8",
        ),
        ("fp8", "bfloat16", MI300X, ALL, r"is not for AMD Instinct MI300X \(gfx942\)"),
        ("fp8", "bfloat16", CPU, ALL, r"needs a GPU"),
        ("fp8", "float16", H100, ALL, r"computes in bfloat16, not in float16.*--dtype bfloat16"),
        ("fp8", "bfloat16", H100, (), r"torch.*pip install"),
        ("w8a8", "bfloat16", H100, ALL, r"is implemented for CPU.*fp8"),
        ("int8", "float32", H100, ALL, r"not in float32"),
        ("int8", "float16", CPU, ALL, r"not in float16"),
        ("int4", "bfloat16", CPU, (), r"needs the CPU kernels"),
    ],
)
def test_what_cannot_be_quantised(
    scheme: str, dtype: str, device: Device, schemes: tuple[str, ...], words: str
) -> None:
    with pytest.raises(StartupError, match=rf"^--quantization {scheme} .*{words}") as caught:
        check_quantization(scheme, dtype, device, schemes)
    assert caught.value.param in ("--quantization", "--dtype")


@pytest.mark.parametrize("device", [CPU, *GPUS])
def test_none_goes_everywhere(device: Device) -> None:
    check_quantization("none", "float16", device, ())


@pytest.mark.parametrize(
    ("scheme", "dtype", "device"),
    [
        ("int8", "float16", T4),
        ("int4", "float16", T4),
        ("int4", "bfloat16", A100),
        ("fp8", "bfloat16", L4),
        ("fp8", "bfloat16", H100),
        ("int8", "bfloat16", MI300X),
        ("w8a8", "float32", CPU),
    ],
)
def test_what_can_be_quantised(scheme: str, dtype: str, device: Device) -> None:
    check_quantization(scheme, dtype, device, ALL)


@pytest.mark.parametrize(
    ("runtime", "driver_cuda", "fine"),
    [
        ("12.8", (12, 0), True),  # minor version compatibility
        ("12.8", (13, 0), True),
        ("13.0", (13, 2), True),
        ("13.0", (12, 9), False),
        ("12.6", (11, 8), False),
        ("14.1", (13, 0), False),  # a major version that came since
        ("12.8", None, True),
    ],
)
def test_drivers(runtime: str, driver_cuda: tuple[int, int] | None, fine: bool) -> None:
    def check() -> None:
        check_driver(runtime=runtime, driver_cuda=driver_cuda, driver="535.104.05")

    if fine:
        check()
        return
    assert driver_cuda is not None
    known = f"{driver_cuda[0]}.{driver_cuda[1]}"
    needed = LEAST_DRIVER.get(int(runtime[:2]), "a newer one")
    words = rf"driver 535\.104\.05 knows CUDA up to {known}, .*CUDA {runtime}.* needs driver {needed}"
    with pytest.raises(StartupError, match=words):
        check()


#: torch 2.11 to 2.13 for CUDA 12.8 and 13.0.
CUDA_12_8 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("device", "compiled_for", "fine"),
    [
        (V100, CUDA_12_8, True),
        (V100, CUDA_13, False),
        (P100, CUDA_12_8, False),
        (T4, CUDA_13, True),
        (L4, CUDA_13, True),  # sm_86 runs on 8.9
        (H100, CUDA_13, True),
        (H100, ("sm_80", "sm_86"), False),  # another major version
        (H100, ("sm_80", "compute_80"), True),  # the driver compiles it
        (H100, ("sm_90a",), True),
        (Device("cuda", "GB300", (10, 3)), ("sm_100a",), False),
        (Device("cuda", "GB300", (10, 3)), ("sm_100",), True),
        (MI300X, ("gfx90a",), True),  # not judged by these names
        (A100, (), True),
    ],
)
def test_code_for_the_device(device: Device, compiled_for: tuple[str, ...], fine: bool) -> None:
    def check() -> None:
        check_driver(runtime="12.8", driver_cuda=(13, 0), device=device, compiled_for=compiled_for)

    if fine:
        check()
        return
    with pytest.raises(StartupError, match="has no code for") as caught:
        check()
    assert str(device) in str(caught.value)
    assert ", ".join(compiled_for) in str(caught.value)
