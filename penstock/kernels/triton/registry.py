"""Every kernel, with every way in which it can be compiled: data, for compilers ahead of time and checks.

    for kernel in KERNELS:                              a name, where its function is
        for configuration in kernel.configurations():   a signature, constants, warps and stages
            ASTSource(kernel.function(), configuration.signature,
                      constexprs=configuration.constants, attrs=configuration.attributes)

Hosts choose from the same data (`configurations` of their modules), so that what runs is what was compiled.
Needs no Triton, but for `function`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Types of activations that kernels are compiled for, by Triton's names.
ACTIVATION_TYPES = ("bf16", "fp16", "fp32")
#: Sizes of heads of the supported architectures' published models; any other works, compiled when it is met.
HEAD_DIMS = (64, 80, 96, 128, 256)

#: Shared memory per program of kinds of devices: Turing and AMD's have 64 KiB; Ada, small Ampere and consumer
#: Blackwell 99; A100 163; Hopper and newer data centre devices 227. Kernels that keep much of it have tiles
#: for each kind. The interpreter has none. A kind of its own are data centre Blackwells, whose tensor cores
#: add up in a memory of theirs: what is read from there takes registers all at once.
DEVICE_KINDS = {"interpreted": 0, "small": 1, "medium": 96 << 10, "large": 160 << 10, "largest": 220 << 10}
TENSOR_MEMORY = "tensor memory"


def device_kind(shared: int, capability: tuple[int, int] | None) -> str:
    """Of a device with so many bytes of shared memory per program; AMD's have no compute capability."""
    if capability is not None and capability[0] == 10:
        return TENSOR_MEMORY
    return [name for name, least in DEVICE_KINDS.items() if shared >= least][-1]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to compile a kernel."""

    label: str
    """What tells it from the kernel's others, for tables: "bf16 · head 128 · tile 16x64"."""
    signature: Mapping[str, str]
    """All arguments in order, with Triton's type: "*bf16", "i32", "fp32"; "constexpr" for constants."""
    constants: Mapping[str, Any]
    """Value of every constexpr argument."""
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    """Integers that are multiples of 16 at run time (pointers are, always)."""
    device_kind: str | None = None
    """The only kind of device (see device_kind) for which a host chooses it; None for all."""
    traits: Mapping[str, Any] = field(default_factory=dict)
    """What checks and tables want to know: "dtype", "head_dim", "rows" …"""

    @property
    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """The divisibility by 16 of pointers and integers, as Triton's ASTSource takes it."""
        return {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(self.signature.items())
            if kind.startswith("*") or name in self.divisible
        }


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of this room."""

    name: str
    module: str
    """Where its function is, below this room."""
    function_name: str
    host: str
    """The module, below this room, whose function `choices` lists its configurations."""
    choices: str
    multiplies: bool = False
    """Whether it has products (tl.dot) that are expected to use tensor cores for 16-bit types."""
    attends: bool = False
    """Whether it is started for attention alone, which is torch's where products have no tensor cores."""

    def function(self) -> Any:
        """The jitted function. Raises ImportError without Triton."""
        return getattr(importlib.import_module(f"{__package__}.{self.module}"), self.function_name)

    def configurations(self) -> Iterator[Configuration]:
        """All ways in which a host may start it."""
        choose: Callable[[], Iterator[Configuration]]
        choose = getattr(importlib.import_module(f"{__package__}.{self.host}"), self.choices)
        return choose()


KERNELS: tuple[Kernel, ...] = (
    Kernel("rms_norm", "norm_kernels", "rms_norm", "norms", "rms_norm_configurations"),
    Kernel("layer_norm", "norm_kernels", "layer_norm", "norms", "layer_norm_configurations"),
    Kernel("activation", "gate_kernels", "activation", "gates", "activation_configurations"),
    Kernel("gate", "gate_kernels", "gate", "gates", "gate_configurations"),
    Kernel("rotate", "rotation_kernels", "rotate", "rotation", "rotate_configurations"),
    Kernel("write_kv", "rotation_kernels", "write_kv", "rotation", "write_kv_configurations", attends=True),
    Kernel("attend", "attention_kernels", "attend", "attention", "attend_configurations", multiplies=True),
    Kernel("merge", "attention_kernels", "merge", "attention", "merge_configurations", attends=True),
    Kernel("part_maxima", "sampling_kernels", "part_maxima", "sampling", "maxima_configurations"),
    Kernel("part_masses", "sampling_kernels", "part_masses", "sampling", "masses_configurations"),
    Kernel("choose_by_id", "sampling_kernels", "choose_by_id", "sampling", "by_id_configurations"),
    Kernel("choose_in_order", "sampling_kernels", "choose_in_order", "sampling", "in_order_configurations"),
    Kernel(
        "quantized_product",
        "quantized_kernels",
        "quantized_product",
        "quantized",
        "product_configurations",
        multiplies=True,
    ),
    Kernel("sum_of_parts", "quantized_kernels", "sum_of_parts", "quantized", "sum_configurations"),
    Kernel("round_to_fp8", "quantized_kernels", "round_to_fp8", "quantized", "fp8_configurations"),
)
