"""The compiled kernels, loaded: their C interface, their threads, and whether they can be trusted here.

Knows ctypes, torch's OpenMP runtime and the self-test. What the kernels compute is told by csrc/*.h.

    available()      the library, or None: then one warning has said what is lost and how to get it
    start_build()    compile in the background, early in a process that will want the kernels

PENSTOCK_CPU_KERNELS=0 does without them, silently.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import threading
import time
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from . import build, prebuilt

logger = logging.getLogger("penstock.kernels")

#: Seconds that a start waits for a compiler which is still running: several times what it needs, once per
#: machine. Without the kernels, the engine would serve at half its speed for all its life.
WAIT_SECONDS = 60.0
#: The same, when the kernels were asked for by name.
PATIENCE = 300.0
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
        *((name, c_int32) for name in "kv_heads heads dim block_size window threads".split()),
        ("scale", c_float),
    ]


class LinearArguments(ctypes.Structure):
    """struct Linear of csrc/linear.h, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in "x out bias weight scales group_scales zeros scratch".split()),
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
        self.silu_mul = self._function(
            "penstock_silu_mul", None, [address, address, size, count, count, count]
        )
        linear = ctypes.POINTER(LinearArguments)
        self.linear = self._function("penstock_linear", None, [linear])
        self.decoder = self._allocating("penstock_decoder", [ctypes.POINTER(DecoderStep)])
        self.linear_scratch = self._function("penstock_linear_scratch", size, [count] * 4)
        self.restore = self._function("penstock_restore", None, [linear, address])
        self.pack_int8 = self._allocating(
            "penstock_pack_int8", [address, count, count, count, address, address]
        )
        self.pack_int4 = self._allocating(
            "penstock_pack_int4", [address, count, count, count, count, address, address, address]
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


class _State:
    """What this process knows about its library."""

    library: Library | None = None
    settled = False
    """Whether `library` is final."""
    builder: subprocess.Popen[bytes] | None = None
    lock = threading.Lock()
    """Of available(): weights are loaded by several threads."""


def enabled() -> bool:
    """False if the environment says to do without the kernels; asked once per process."""
    return os.environ.get("PENSTOCK_CPU_KERNELS", "1").lower() not in ("0", "false", "no", "off")


def start_build() -> None:
    """Have the library compiled in the background, unless one is there, unwanted or impossible."""
    if not enabled() or _State.settled or _State.builder is not None:
        return
    try:
        there = build.find_library() is not None or prebuilt.fitting()
        if not there and build.find_compiler() is not None:
            _State.builder = build.start_build()
    except (OSError, build.BuildError):
        pass  # available() tries again, and says what is wrong


def available(wait_seconds: float = WAIT_SECONDS) -> Library | None:
    """The library, compiled and checked; the answer is the same for the rest of the process.

    Waits at most so long for a compiler. None means that torch has to do; a warning has said why.
    """
    with _State.lock:
        if not _State.settled:
            try:
                _State.library = _load(wait_seconds) if enabled() else None
            except build.BuildError as error:
                _warn(error.reason, error.advice)
            except Exception as error:
                _warn(
                    f"{type(error).__name__}: {error}.",
                    "Please report this; PENSTOCK_CPU_KERNELS=0 hides it.",
                )
            _State.settled = True
    return _State.library


def loaded() -> Library | None:
    """The library if available() has found it; never compiles, loads or waits."""
    return _State.library


def _load(wait_seconds: float) -> Library:
    """The first that can be trusted: compiled for this very processor, compiled ahead, compiled now.

    Raises what is wrong with the last of them; of the others, a warning says it.
    """
    own, paths = build.find_library(), prebuilt.fitting()
    last = None
    if own is not None:  # to compile again would only make the same again
        *paths, last = own, *paths
    for path in paths:
        try:
            return _checked(path)
        except Exception as error:
            logger.warning("CPU kernels: %s is not used. %s: %s.", path, type(error).__name__, error)
    return _checked(last or _compiled(wait_seconds))


def _checked(path: Path) -> Library:
    """Raises what is wrong with it."""
    library = Library(path)
    from .self_test import check

    check(library)
    return library


def _compiled(wait_seconds: float) -> Path:
    """Compile in the background, or go on waiting for what start_build began."""
    build.target()  # says at once what makes a build impossible
    if _State.builder is None:
        _State.builder = build.start_build()
    _wait(wait_seconds)
    path = build.find_library()
    if path is None:
        raise build.BuildError("The compiler left no library.", "Run python -m penstock.kernels.cpu.build.")
    return path


def _wait(seconds: float) -> None:
    """Until the background build is done. Raises BuildError if it failed, or needs longer."""
    builder = _State.builder
    if builder is None:
        return
    started = time.monotonic()
    logger.info("compiling the CPU kernels for this machine, once")
    try:
        _, complaint = builder.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        if builder.stderr is not None:
            builder.stderr.close()  # nobody will ask how it ended
        waited = time.monotonic() - started
        raise build.BuildError(
            f"They are still being compiled after {waited:.0f} s.", "They will be there at the next start."
        ) from error
    _State.builder = None
    if builder.returncode:
        raise build.BuildError(complaint.decode(errors="replace").strip(), "")


def _warn(reason: str, advice: str) -> None:
    logger.warning(
        "No CPU kernels: all runs through torch's operators, at about half the speed. %s %s",
        reason,
        advice,
    )
