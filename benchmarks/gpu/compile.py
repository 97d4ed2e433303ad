"""Compile the GPU kernels ahead of time, for GPUs that are not here, and look at what the compilers made.

    python -m benchmarks.gpu.compile                         what has changed since, with the installed Triton
    python -m benchmarks.gpu.compile --triton .tools/triton-3.6             the same, with another one
    python -m benchmarks.gpu.compile --all                   everything again (half an hour of a core)
    python -m benchmarks.gpu.compile --page                  docs/gpu.md from what was kept

Every kernel of penstock/kernels/triton/registry.py, in every configuration that a host may choose on that
device: types that it does not have, and products where Triton has no tensor cores, are not chosen. Needs no
GPU. From PTX and cubin (amdgcn on AMD): shared memory against the architecture's limit, registers and spills,
instructions of tensor cores, the width of loads. Kept in benchmarks/results/gpu_kernels.json, by version of
Triton, each beside a hash of the kernel's source and its configuration (sources.py): a test fails where one
has changed and was not compiled again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from penstock.kernels.capability import Device, has_bfloat16, has_products
from penstock.kernels.triton.quantized import SHARED_MEMORY
from penstock.kernels.triton.registry import KERNELS, Configuration, Kernel, device_kind

from .sources import key

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_kernels.json"
PAGE = ROOT / "docs" / "gpu.md"
SECONDS = 120
"""Of one compilation, at most."""
_REGISTERS = 1 << 16
"""Of a multiprocessor. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""
_FEW = 32
"""Bytes of a thread that are no fault where registers are left: ptxas spills some values so that one more
program fits a multiprocessor."""
_BATCH = 20
"""Results that are written down together: so many are lost when the command is stopped."""


@dataclass(frozen=True, slots=True)
class Target:
    """An architecture that kernels are compiled for."""

    name: str
    devices: str
    shared: int
    """Bytes that one program may have."""
    known: Device

    @property
    def backend(self) -> tuple[str, int | str, int]:
        """For Triton's GPUTarget."""
        if self.known.is_amd:
            return "hip", self.name, 64
        return "cuda", int(self.name.removeprefix("sm_")), 32


TARGETS = {
    name: Target(name, devices, shared, Device("cuda", devices, capability, "" if capability else name))
    for name, devices, capability, shared in (
        ("sm_75", "T4", (7, 5), 64 << 10),
        ("sm_80", "A100", (8, 0), SHARED_MEMORY["sm_80"]),
        ("sm_86", "A10, RTX 3090", (8, 6), SHARED_MEMORY["sm_86"]),
        ("sm_89", "L4, L40S, RTX 4090", (8, 9), SHARED_MEMORY["sm_89"]),
        ("sm_90", "H100, H200", (9, 0), SHARED_MEMORY["sm_90"]),
        ("sm_100", "B200", (10, 0), SHARED_MEMORY["sm_100"]),
        ("sm_120", "RTX PRO 6000, RTX 5090", (12, 0), SHARED_MEMORY["sm_120"]),
        ("gfx942", "MI300X", None, SHARED_MEMORY["gfx942"]),
    )
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one configuration for one architecture."""

    label: str
    key: str = ""
    """What was compiled: sources.key."""
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    """Bytes of a thread; on AMD, registers."""
    units: str = ""
    """wgmma, mma or mfma; empty without products."""
    widest: int = 0
    """Bytes of a thread's widest load from global memory."""
    faults: tuple[str, ...] = ()


def chosen(kernel: Kernel, configuration: Configuration, target: Target) -> bool:
    """Whether a host may choose this configuration on that device."""
    traits = configuration.traits
    attends = kernel.attends or traits.get("write", False)
    if (kernel.multiplies or attends) and not has_products(target.known):
        return False
    if traits.get("dtype") == "bf16" and not has_bfloat16(target.known):
        return False
    if configuration.device_kind not in (None, device_kind(target.shared, target.known.capability)):
        return False
    return target.name in traits.get("targets", (target.name,))


def reachable(kernel: Kernel, target: Target) -> list[Configuration]:
    """All that a host may choose there."""
    return [each for each in kernel.configurations() if chosen(kernel, each, target)]


def sample(kernel: Kernel, target: Target, most: int | None) -> list[Configuration]:
    """All configurations, or `most` of them, spread over those of the type that most models are computed in
    there; over all, if there are none."""
    every = reachable(kernel, target)
    if most is None or len(every) <= most:
        return every
    name = "bf16" if has_bfloat16(target.known) else "fp16"
    first = [each for each in every if each.traits["dtype"] == name] or every
    step = max(1.0, (len(first) - 1) / max(1, most - 1))
    places = sorted({min(len(first) - 1, round(number * step)) for number in range(most)})
    return [first[place] for place in places]


Results = dict[str, dict[str, dict[str, list[Compiled]]]]
"""By version of Triton, target and kernel."""


def load_results() -> Results:
    """What was kept."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {
        version: {
            target: {
                kernel: [Compiled(*row[:-1], tuple(row[-1])) for row in rows] for kernel, rows in by.items()
            }
            for target, by in targets.items()
        }
        for version, targets in kept.items()
    }


def save_results(results: Results) -> None:
    """One line for each row."""
    text = json.dumps(
        {
            version: {
                target: {kernel: [astuple(row) for row in rows] for kernel, rows in by.items()}
                for target, by in targets.items()
            }
            for version, targets in results.items()
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )
    RESULTS.write_text(text.replace("],[", "],\n[") + "\n")


def stale(
    kept: dict[str, dict[str, list[Compiled]]],
    kernel: Kernel,
    target: Target,
    configurations: list[Configuration],
) -> list[Configuration]:
    """Those of these that were not compiled as they are now."""
    known = {row.key for row in kept.get(target.name, {}).get(kernel.name, ())}
    return [each for each in configurations if key(kernel, each) not in known]


# ---- what a compiler made, from its text ----

_PTX_LOAD = re.compile(r"\bld\.global(?:\.[A-Za-z0-9:_]+)*?(?:\.v(\d))?\.[bufs](\d+)\b")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global.*?,\s*0x([0-9a-f]+)\s*,")
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte|sbyte)")
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}


def loads(text: str) -> dict[int, int]:
    """Bytes → how many load instructions of them, in PTX or AMD's assembly."""
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in _PTX_LOAD.findall(text)]
    sizes += [int(size, 16) for size in _PTX_COPY.findall(text)]
    sizes += [_AMD_BYTES.get(name, 1) for name in _AMD_LOAD.findall(text)]
    return dict(Counter(sizes))


_UNITS = {
    "tcgen05": r"\btcgen05\.mma",
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
}
"""Best first."""


def units(text: str) -> str:
    """The tensor cores' instruction, the best one that occurs."""
    found = (name for name, pattern in _UNITS.items() if re.search(pattern, text))
    return next(found, "")


def faults(kernel: Kernel, configuration: Configuration, target: Target, made: Compiled) -> tuple[str, ...]:
    """What is wrong with what was made."""
    found = []
    if made.shared > target.shared:
        found.append(f"{made.shared} bytes of shared memory, of {target.shared}")
    most = min(255, _REGISTERS // (32 * configuration.num_warps))
    if made.spilled > (_FEW if made.registers <= most - 8 and not target.known.is_amd else 0):
        found.append(f"{made.spilled} {'registers' if target.known.is_amd else 'bytes'} spilled")
    if kernel.multiplies and configuration.traits.get("dtype") != "fp32":
        if not made.units:
            found.append("no tensor cores")
        rows = configuration.traits.get("tile", (0, 0))[0]
        best = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(target.name, made.units)
        if rows >= 64 and configuration.num_warps >= 4 and made.units != best:
            found.append(f"{made.units or 'no units'} for a tile of {rows} rows, not {best}")
    if kernel.name == "attend" and made.widest < 16:
        found.append("no loads of 16 bytes")
    return tuple(found)


# ---- compiling: in a process that has the Triton that was asked for ----


def compile_one(kernel: Kernel, configuration: Configuration, target: Target) -> Compiled:
    """Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        kernel.function(),
        dict(configuration.signature),
        constexprs=dict(configuration.constants),
        attrs=configuration.attributes,
    )
    options: dict[str, Any] = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    options["enable_fp_fusion"] = True
    made = triton.compile(source, target=GPUTarget(*target.backend), options=options)
    text = made.asm["amdgcn" if target.known.is_amd else "ptx"]
    registers, spilled = _amd_usage(text) if target.known.is_amd else _cuda_usage(made.asm["cubin"])
    result = Compiled(
        configuration.label,
        key(kernel, configuration),
        registers,
        made.metadata.shared,
        spilled,
        units(text),
        max(loads(text), default=0),
    )
    return replace(result, faults=faults(kernel, configuration, target, result))


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread, by cuobjdump, which Triton brings. These kernels keep nothing
    on the stack but what has no register. How many registers are in use says little of that: ptxas may give
    up with most of them free."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump said {said.stdout[:200]!r}")
    return int(found[1]), int(found[2])


def _amd_usage(text: str) -> tuple[int, int]:
    """(vector registers, spilled ones) of a lane."""
    count, spilled = (re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
    return int(count[1]) if count else 0, int(spilled[1]) if spilled else 0


class _TooLong(Exception):
    pass


def _late(*_: object) -> None:
    raise _TooLong


def compile_all(
    targets: Sequence[str], kernels: Sequence[str], most: int | None, *, again: bool
) -> Iterator[dict[str, Any]]:
    """Results as plain data, one by one; a compilation that fails, or takes SECONDS, is a result, too.

    again: also what was kept, and has not changed since.
    """
    import triton

    kept = load_results().get(triton.__version__, {})
    signal.signal(signal.SIGALRM, _late)
    for name in targets:
        target = TARGETS[name]
        for kernel in KERNELS:
            if kernels and kernel.name not in kernels:
                continue
            wanted = sample(kernel, target, most)
            if not again:
                wanted = stale(kept, kernel, target, wanted)
            for configuration in wanted:
                started = time.process_time()
                signal.alarm(SECONDS)
                try:
                    made = compile_one(kernel, configuration, target)
                except _TooLong:
                    made = _failed(configuration, f"took more than {SECONDS} s")
                except Exception as error:  # of Triton's passes, LLVM, ptxas: that is what is looked for
                    first = (str(error).strip().splitlines() or [""])[0]
                    made = _failed(configuration, f"{type(error).__name__}: {first[:200]}")
                finally:
                    signal.alarm(0)
                seconds = time.process_time() - started
                yield {"target": name, "kernel": kernel.name, "cpu": seconds, **asdict(made)}


def _failed(configuration: Configuration, why: str) -> Compiled:
    return Compiled(configuration.label, faults=(f"not compiled: {why}",))


def run_worker(
    triton: Path | None,
    targets: Sequence[str],
    kernels: Sequence[str],
    most: int | None,
    *,
    again: bool = True,
) -> tuple[str, list[dict[str, Any]]]:
    """(Triton's version, results), by a process with that Triton; kernels must not be interpreted in it."""
    first, *made = stream_worker(triton, targets, kernels, most, again=again)
    return first["triton"], made


def stream_worker(
    triton: Path | None,
    targets: Sequence[str],
    kernels: Sequence[str],
    most: int | None,
    *,
    again: bool,
) -> Iterator[dict[str, Any]]:
    """The same one by one, as they are made: Triton's version first."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    before = [str(triton)] if triton else []
    after = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join([*before, str(ROOT), *after])
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, "-m", "benchmarks.gpu.compile", "--worker", "--target", *targets]
    command += ["--kernel", *kernels] if kernels else []
    command += ["--most", str(most)] if most else []
    command += ["--all"] * again
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        yield from (json.loads(line) for line in worker.stdout if line.startswith("{"))
    if worker.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {worker.returncode}")


def keep(version: str, made: Sequence[dict[str, Any]], targets: Sequence[str]) -> None:
    """Write results down, in the place of those of the same label; what no host chooses any more goes."""
    results = load_results()
    mine = results.setdefault(version, {})
    for name in targets:
        by = {kernel: {row.label: row for row in rows} for kernel, rows in mine.get(name, {}).items()}
        for row in made:
            if row["target"] == name:
                fields = {field: row[field] for field in Compiled.__dataclass_fields__}
                by.setdefault(row["kernel"], {})[row["label"]] = Compiled(**fields)
        mine[name] = {}
        for kernel in KERNELS:
            labels = [each.label for each in reachable(kernel, TARGETS[name])]
            rows = [by[kernel.name][label] for label in labels if label in by.get(kernel.name, {})]
            if rows:
                mine[name][kernel.name] = rows
    save_results(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--triton", type=Path, metavar="DIR", help="a folder that another Triton lies in")
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", choices=[kernel.name for kernel in KERNELS], default=[])
    parser.add_argument(
        "--most", type=int, metavar="N", help="configurations of a kernel for a device, at most"
    )
    parser.add_argument(
        "--all", action="store_true", help="also what was compiled, and has not changed since"
    )
    parser.add_argument(
        "--page", action="store_true", help="write docs/gpu.md from the results that are kept"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        import triton

        print(json.dumps({"triton": triton.__version__}), flush=True)
        for result in compile_all(
            arguments.target,
            arguments.kernel,
            arguments.most,
            again=arguments.all,
        ):
            print(json.dumps(result), flush=True)
        return
    for target in () if arguments.page else arguments.target:
        rows = stream_worker(
            arguments.triton,
            [target],
            arguments.kernel,
            arguments.most,
            again=arguments.all,
        )
        version, made = next(rows)["triton"], list[dict[str, Any]]()
        keep(version, made, [target])  # what no host chooses any more goes, whatever is compiled
        while some := list(itertools.islice(rows, _BATCH)):
            keep(version, some, [target])
            made += some
        wrong = [row for row in made if row["faults"]]
        seconds = sum(row["cpu"] for row in made)
        print(
            f"Triton {version}, {target}: {len(made)} compiled in {seconds:.0f} s, {len(wrong)} with faults"
        )
        for row in wrong:
            print(f"  {row['kernel']} {row['label']}: {'; '.join(row['faults'])}")
    from .page import render

    PAGE.write_text(render())


if __name__ == "__main__":
    main()
