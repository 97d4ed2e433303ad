"""The C interface of the compiled kernels: their structures, their functions, the threads that they run on.

Knows ctypes and torch's OpenMP runtime. What the kernels compute is told by csrc/*.h; which file to load, and
whether to trust it, by library.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

#: Names of OpenMP runtimes; each exports the GNU entry points.
_RUNTIMES = ("libgomp", "libomp", "libiomp5")
_ENTRY_POINTS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class AttentionArguments(ctypes.Structure):
    """struct Attention of csrc/attention.h, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in "q k v keys values out".split()),
        *((name, c_int64) for name in "q_token q_head k_token k_head v_token v_head".split()),
        *((name, c_void_p) for name in "starts lengths rows table_at tables slots units groups lots".split()),
        *((name, c_void_p) for name in "partials remaining scratch".split()),
        ("scratch_bytes", c_int64),
        *((name, c_int32) for name in "spans tokens num_units num_groups num_lots".split()),
        *((name, c_int32) for name in "kv_heads heads dim block_size window threads both".split()),
        ("scale", c_float),
    ]


class LinearArguments(ctypes.Structure):
    """struct Linear of csrc/linear.h, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in "x out bias weight scales zeros scratch".split()),
        *((name, c_int64) for name in "x_row out_row".split()),
        *((name, c_int32) for name in "rows columns depth kind group is_bf16 threads".split()),
        *((name, c_int32) for name in "adds parts gated".split()),
    ]


class DecoderLayer(ctypes.Structure):
    """struct DecoderLayer of csrc/decoder.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in "attention_norm mlp_norm head_norm".split()),
        *((name, ctypes.POINTER(LinearArguments)) for name in "qkv out gate_up down".split()),
    ]


class DecoderStep(ctypes.Structure):
    """struct DecoderStep of csrc/decoder.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in "x normed heads attended active wanted scratch cos sin".split()),
        *((name, c_void_p) for name in "layers attention caches".split()),
        *((name, c_int32) for name in "num_layers rows num_wanted hidden rotary is_bf16 threads".split()),
        ("eps", c_float),
    ]


class Library:
    """A loaded library.

    Attributes:
        path: its file.
        runtime: the file of the OpenMP runtime that it shares with torch.
        isa: the instructions that it was compiled for.
        multiplies_bf16, multiplies_integers: whether the processor has instructions for these products.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError if it cannot be loaded, or is not what it should be."""
        self.path = path
        _check_whole(path)
        self._handle = ctypes.CDLL(str(path))
        self.runtime, team = _openmp()
        self._function("penstock_init", None, [c_void_p] * 3)(*team)
        self.isa: str = self._function("penstock_isa", c_char_p, [])().decode()
        pointer = ctypes.POINTER(AttentionArguments)
        self.scratch_bytes = self._function("penstock_scratch_bytes", c_int64, [c_int] * 3)
        self.plan = self._allocating("penstock_plan", [pointer, c_void_p, c_int64, c_int64 * 4])
        self.attention = self._function("penstock_attention", None, [pointer, c_int])
        address, size, count, real = c_void_p, c_int64, c_int, c_float
        self.rms_norm = self._function(
            "penstock_rms_norm", None, [address, address, address, size, count, real, count, count]
        )
        self.norm_rotate = self._function(
            "penstock_norm_rotate",
            None,
            [address, size, address, address, address, size, count, count, count, real, count, count],
        )
        self.activate = self._function(
            "penstock_activate", None, [address, address, size, count, count, count, count, count]
        )
        linear = ctypes.POINTER(LinearArguments)
        self.linear = self._function("penstock_linear", None, [linear])
        self.decoder = self._allocating("penstock_decoder", [ctypes.POINTER(DecoderStep)])
        self.linear_scratch = self._function("penstock_linear_scratch", size, [count] * 4)
        self.restore = self._function("penstock_restore", None, [linear, address])
        self.pack_int8 = self._allocating(
            "penstock_pack_int8", [address, count, count, count, count, address]
        )
        self.pack_int4 = self._allocating(
            "penstock_pack_int4", [address, count, count, count, count, address, address, address]
        )
        self.strip_bytes = self._function("penstock_strip_bytes", size, [count] * 3)
        self.pack_strips = self._function(
            "penstock_pack_strips", None, [address, count, count, count, address]
        )
        self.multiplies_bf16 = bool(self._function("penstock_multiplies_bf16", count, [])())
        self.multiplies_integers = bool(self._function("penstock_multiplies_integers", count, [])())
        # their structures are in sampling.py
        self.sampling_scratch = self._function("penstock_sampling_scratch", size, [count, count])
        self.sample = self._function("penstock_sample", None, [address])
        self.logprobs = self._function("penstock_logprobs", None, [address])

    def _function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        function = getattr(self._handle, name)
        function.restype, function.argtypes = result, arguments
        return function

    def _allocating(self, name: str, arguments: list[Any]) -> Any:
        """A function that answers 1 where it found no memory; then MemoryError is raised."""
        function = self._function(name, c_int, arguments)
        function.errcheck = _check_memory
        return function


def _check_whole(path: Path) -> None:
    """Raises OSError for a file that was cut off, by a full disk perhaps: the loader would map what is not
    there, and touching that ends the process. An ELF file's table of sections is its last part."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        raise OSError("it is no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    if path.stat().st_size < table + size * count:
        raise OSError(f"it has been cut off at {path.stat().st_size} bytes")


def _check_memory(result: int, function: Any, arguments: Any) -> None:
    if result:
        raise MemoryError(f"{function.__name__} found no memory")


def _openmp() -> tuple[str, list[c_void_p]]:
    """(file, entry points) of the OpenMP runtime that torch has loaded.

    Calling that very runtime gives the process one pool of threads; a second one would fight with it for the
    cores. Raises OSError if there is none.
    """
    import torch  # late, so that the compiler can start before torch is imported

    home = str(Path(torch.__file__).parent)
    candidates = {line.split()[-1] for line in _maps() if Path(line.split()[-1]).name.startswith(_RUNTIMES)}
    candidates |= {
        str(path) for path in Path(home, "lib").glob("lib*omp*") if path.name.startswith(_RUNTIMES)
    }
    for path in sorted(candidates, key=lambda path: not path.startswith(home)):
        runtime = ctypes.CDLL(path)
        if all(hasattr(runtime, name) for name in _ENTRY_POINTS):
            return path, [ctypes.cast(getattr(runtime, name), c_void_p) for name in _ENTRY_POINTS]
    raise OSError("torch has loaded no OpenMP runtime with GNU entry points")


def _maps() -> list[str]:
    """Lines of the process's memory map that name a file."""
    try:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    except OSError:
        return []
