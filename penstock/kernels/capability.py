"""What a device can compute, from what is known of it before anything runs: pure rules, without torch.

    device            bfloat16   Triton   Triton's products   fp8      (NVIDIA: by compute capability)
    Pascal  6.x       no         no       no                  no
    V100    7.0       no         yes      no                  no
    T4      7.5       no         yes      no                  no
    A100    8.0       yes        yes      yes                 no
    L4      8.9       yes        yes      yes                 yes
    H100    9.0       yes        yes      yes                 yes
    B200    10.0      yes        yes      yes                 yes
    MI300X  gfx942    yes        yes      yes                 no: of another kind

bfloat16: CUDA C++ Programming Guide, "Arithmetic instructions": native from 8.0, emulated before.
Triton's products: Triton 3.6 and 3.9 compile tl.dot for 7.0 and 7.5 without tensor cores, and spill kilobytes
(docs/gpu.md). fp8: tensor cores take e4m3 from 8.9 on (PTX ISA, mma), and so torch asks for.

Who asks torch what device there is, tells it here as `Device`; the engine's start, the preview of its memory
and the rules of quantisation ask the same functions. Everything that is decided is said in `notes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import StartupError

BFLOAT16 = (8, 0)
FP8 = (8, 9)
TRITON = (7, 0)
PRODUCTS = (8, 0)
"""Least compute capabilities."""
LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""CUDA's major version → the oldest driver for Linux that runs programs of it. NVIDIA, "CUDA Compatibility",
table "Minor version compatibility": within one, an older driver runs what a newer one made."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a device says about itself."""

    type: str
    """cpu or cuda; ROCm's are "cuda" to torch."""
    name: str = ""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None on a CPU and on AMD."""
    architecture: str = ""
    """AMD's, as gfx942."""

    @property
    def is_amd(self) -> bool:
        return bool(self.architecture)

    def __str__(self) -> str:
        if self.type == "cpu":
            return "the CPU"
        what = self.architecture
        if self.capability is not None:
            what = f"compute capability {self.capability[0]}.{self.capability[1]}"
        return f"{self.name or 'the GPU'} ({what})" if what else self.name or "the GPU"


@dataclass(frozen=True, slots=True)
class Choice:
    """A type of numbers for activations, weights and KV cache, and what is to be said of it at the start."""

    dtype: str
    notes: tuple[str, ...] = ()


def has_bfloat16(device: Device) -> bool:
    """Whether products of bfloat16 are computed by the device itself. A CPU takes it in any case."""
    return device.capability is None or device.capability >= BFLOAT16


def has_fp8(device: Device) -> bool:
    """Whether the device multiplies float8_e4m3fn."""
    return device.type == "cuda" and device.capability is not None and device.capability >= FP8


def has_products(device: Device) -> bool:
    """Whether Triton's products (tl.dot) use the device's tensor cores."""
    return has_triton(device) and (device.is_amd or (device.capability or (0, 0)) >= PRODUCTS)


def has_triton(device: Device) -> bool:
    """Whether Triton compiles for the device; whether it is installed, and likes it, is another question."""
    if device.type != "cuda":
        return False
    return device.is_amd or (device.capability is not None and device.capability >= TRITON)


def resolve_dtype(wanted: str, checkpoint: str, device: Device) -> Choice:
    """The type to compute in.

    Args:
        wanted: as --dtype: auto, bfloat16, float16 or float32.
        checkpoint: the model's own, one of the last three.

    Raises:
        StartupError: bfloat16 was asked for, and the device has none.
    """
    if wanted == "bfloat16" and not has_bfloat16(device):
        raise StartupError(
            f"--dtype bfloat16: {device} has none; it needs {_at_least(BFLOAT16)}.",
            param="--dtype",
            advice="Use --dtype float16, or float32 where numbers become too large for it.",
        )
    if wanted != "auto":
        return Choice(wanted)
    if device.type == "cpu" and checkpoint == "float16":
        return Choice(
            "bfloat16", ("dtype bfloat16 instead of the checkpoint's float16: CPUs have no fast one",)
        )
    if checkpoint == "bfloat16" and not has_bfloat16(device):
        return Choice(
            "float16",
            (
                f"dtype float16 instead of the checkpoint's bfloat16, which {device} lacks; "
                "numbers beyond 65,504 overflow in it: should requests fail with non-finite logits, use "
                "--dtype float32",
            ),
        )
    return Choice(checkpoint)


def check_quantization(scheme: str, dtype: str, device: Device, schemes: tuple[str, ...]) -> None:
    """Whether weights can be quantised so, there.

    Args:
        scheme: as --quantization; "none" always can.
        dtype: of activations.
        schemes: that the device's table of operations multiplies with.

    Raises:
        StartupError: with the reason, and with what to do.
    """
    if scheme == "none":
        return
    if device.type == "cpu":
        if dtype == "float16":
            raise _refuse(
                "computes in bfloat16 or float32 on a CPU, not in float16",
                "Use --dtype bfloat16.",
                scheme,
                "--dtype",
            )
        if scheme == "fp8":
            raise _refuse("needs a GPU: no CPU multiplies fp8", "Use int8 or w8a8.", scheme)
        if scheme not in schemes:
            raise _refuse(
                "needs the CPU kernels, which are not there",
                "The log says why; most often a C++ compiler is missing (apt-get install g++).",
                scheme,
            )
        return
    if scheme == "fp8" and not has_fp8(device):
        raise _refuse(
            f"is not for {device}: fp8 products need {_at_least(FP8)}",
            "Use int8 or int4, which keep activations as they are.",
            scheme,
        )
    if dtype == "float32":
        raise _refuse(
            "computes in bfloat16 or float16 on a GPU, not in float32", "Use --dtype auto.", scheme, "--dtype"
        )
    if scheme == "fp8" and dtype != "bfloat16":
        raise _refuse(f"computes in bfloat16, not in {dtype}", "Use --dtype bfloat16.", scheme, "--dtype")
    if scheme == "w8a8":
        raise _refuse(
            "is implemented for CPU, not for GPUs", "Use int8, or fp8 where the GPU has it.", scheme
        )
    if scheme not in schemes and scheme == "fp8":
        raise _refuse(
            "needs scaled products, which this torch does not have",
            "Install a torch for CUDA (pip install --upgrade torch), or use int8.",
            scheme,
        )


def check_driver(
    *,
    runtime: str,
    driver_cuda: tuple[int, int] | None,
    driver: str = "",
    device: Device | None = None,
    compiled_for: tuple[str, ...] = (),
) -> None:
    """Whether this driver runs this torch on this device.

    Args:
        runtime: CUDA's version that torch was compiled with (torch.version.cuda), as 12.8.
        driver_cuda: newest CUDA that the driver knows (cuDriverGetVersion), as (12, 4); None if it says none.
        driver: its own version, as 535.104.05, for the message.
        device: if one is visible.
        compiled_for: torch's architectures (torch.cuda.get_arch_list()), as sm_80 and compute_90.

    Raises:
        StartupError: with both versions.
    """
    major = int(runtime.partition(".")[0])
    needed = LEAST_DRIVER.get(major, "a newer one")
    own = f"driver {driver}" if driver else "the driver"
    if driver_cuda is not None and driver_cuda[0] < major:
        raise StartupError(
            f"--device cuda: {own} knows CUDA up to {driver_cuda[0]}.{driver_cuda[1]}, and this torch was "
            f"compiled with CUDA {runtime}, which needs driver {needed} or newer.",
            param="--device",
            advice=f"Update the driver, or install a torch for CUDA {driver_cuda[0]}.",
        )
    if device is None or device.capability is None or not compiled_for:
        return
    if not _runs(device.capability, compiled_for):
        raise StartupError(
            f"--device cuda: this torch (CUDA {runtime}) has no code for {device}; it has "
            f"{', '.join(compiled_for)}.",
            param="--device",
            advice="Install a torch that has it (for CUDA 12.6: 5.0 to 9.0), or use another GPU.",
        )


def _runs(capability: tuple[int, int], compiled_for: tuple[str, ...]) -> bool:
    """Whether code for one of these runs there: sm_XY on its own major version from that minor on;
    compute_XY, which the driver compiles, on all later ones.
    A letter behind it, as in sm_90a, ties code to one capability."""
    for name in compiled_for:
        kind, _, digits = name.partition("_")
        exact = not digits.isdigit()
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        if kind not in ("sm", "compute") or not digits.isdigit() or len(digits) < 2:
            continue
        made = int(digits[:-1]), int(digits[-1])
        if capability == made:
            return True
        if exact:
            continue
        if kind == "compute" and capability >= made:
            return True
        if kind == "sm" and capability[0] == made[0] and capability >= made:
            return True
    return False


def _at_least(capability: tuple[int, int]) -> str:
    return f"compute capability {capability[0]}.{capability[1]} or more"


def _refuse(why: str, advice: str, scheme: str, param: str = "--quantization") -> StartupError:
    return StartupError(f"--quantization {scheme} {why}.", param=param, advice=advice)
