"""docs/gpu.md: what compilers made of the kernels, and what limits them; written from kept results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from penstock.kernels.triton.registry import KERNELS

from . import roofline
from .compile import TARGETS, Compiled, load_results, reachable

HEAD = """\
# GPUs

What is known of the GPU path without a GPU. The tables are written by a command, from
[`benchmarks/results/gpu_kernels.json`](../benchmarks/results/gpu_kernels.json):

```console
$ pip install -e ".[engine,dev]"
$ python -m benchmarks.gpu.compile                    # what has changed since, for every GPU; and this page
$ python -m benchmarks.gpu.compile --triton DIR       # the same, with the Triton in a folder of its own
$ python -m benchmarks.gpu.compile --all              # everything again: half an hour of a core
$ python -m benchmarks.gpu.compile --page             # this page again
$ python -m benchmarks.gpu.run                        # on a GPU: is it right, how fast is it
```

**Nothing here was run on a GPU.** `benchmarks/gpu/run.py` checks the kernels against the specification there,
runs the engine, and prints its figures beside the targets, in under ten minutes and without network.

## Which numbers a device computes with

`penstock/kernels/capability.py` decides at the start, and says what differs from what the checkpoint has:

| device | capability | bfloat16 checkpoint | Triton's attention and products | fp8 | int8, int4 |
| --- | --- | --- | --- | --- | --- |
| V100 | 7.0 | float16 | no: torch's | no | restored to 16 bits for each product: less memory, less speed |
| T4 | 7.5 | float16 | no: torch's | no | likewise |
| A100 | 8.0 | bfloat16 | yes | no | Triton |
| A10, RTX 3090 | 8.6 | bfloat16 | yes | no | Triton |
| L4, L40S, RTX 4090 | 8.9 | bfloat16 | yes | yes | Triton |
| H100, H200 | 9.0 | bfloat16 | yes | yes | Triton |
| B200 | 10.0 | bfloat16 | yes | yes | Triton |
| RTX PRO 6000, RTX 5090 | 12.0 | bfloat16 | yes | yes | Triton |
| MI300X | gfx942 | bfloat16 | yes | no: its fp8 is of another kind | Triton |

- **fp8**: weights are rounded while they are read, a scale for each output channel; activations in each
  product, a scale for each token; torch's scaled product multiplies them. The output layer has int8 weights.
- **int8, int4**: as on a CPU (`penstock/kernels/quantization.py`); activations stay in 16 bits.
- `w8a8` is for CPUs.
- Checkpoints that are stored in fp8 (`quant_method` fp8 with blocks or one scale, compressed-tensors with a
  scale for each tensor, channel or block) are restored to 16 bits while they are read, on every device;
  `--quantization` then makes them small again, fp8 with a scale for each output channel.
- A driver that is too old for this torch's CUDA, and a torch without code for the device, are refused with
  the versions.

Before Ampere, Triton compiles `tl.dot` to single multiplications: no tensor cores, and thousands of bytes
spilled per thread (int8, a tile of 128 x 128, sm_75: 13,456 bytes with Triton 3.9). So what multiplies is
torch's there.
"""


COMPILED = """## What the compilers made of the kernels

For each kernel and architecture, over the configurations that a host may choose there (bfloat16, float16 and
float32): how many were compiled of how many there are, registers of a thread and shared memory of a program
(least to most), the most bytes that a thread spills, the tensor cores' instruction, and how many have loads
of 16 bytes.

Where registers are left, ptxas spills a few values so that one more program fits a multiprocessor; up to 32
bytes of a thread are no fault then. Any byte is one where registers have run out, and any register on AMD.

A test fails where a kernel or a configuration has changed, and was not compiled again
(`test_every_configuration_was_compiled_as_it_is`). Another one starts the hosts with shapes of published
models, and finds no kernel that is not among the configurations (`test_what_is_started_is_known`).

Not among them, and compiled when they are met: heads and rotations of other sizes than published models have,
vocabularies of over 524,288 tokens, rows whose length is no multiple of 16, and blocks of another size than a
power of two (but for bfloat16 heads of 128).
"""


def render() -> str:
    """The whole page."""
    kept = load_results()
    lines = [HEAD, COMPILED]
    for version in sorted(kept, key=lambda text: [int(part) for part in text.split(".")]):
        lines += [f"### Triton {version}", ""]
        lines += list(_table(kept[version]))
        lines += ["", *_faulty(kept[version]), ""]
    lines += ["## What limits a step", ""]
    lines += [f"- {source}" for source in roofline.SOURCES]
    lines += [
        "",
        f"All layers together, in bfloat16. Who decodes has {roofline.CONTEXT:,} tokens before it. A time is",
        "the longer of bytes over bandwidth and FLOP over rate, in microseconds; a step adds them up, as if",
        "nothing overlapped, and launches cost nothing.",
        "",
    ]
    for title, shape in roofline.MODELS.items():
        for words, tokens, prompt in roofline.LOADS:
            lines += [f"### {title}: {words}", "", *_step(shape, tokens, prompt), ""]
    lines += ["### Decode with quantised weights, at best", "", *_schemes(), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(kept: dict[str, dict[str, list[Compiled]]]) -> Iterator[str]:
    yield "| kernel | for | compiled | registers | shared memory | spilled | tensor cores | 16-byte loads |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |"
    for kernel in KERNELS:
        for target in TARGETS.values():
            there = reachable(kernel, target)
            if not there:
                continue
            made = [row for row in kept.get(target.name, {}).get(kernel.name, ()) if row.registers]
            units = sorted({row.units for row in made if row.units})
            yield (
                f"| {kernel.name} | {target.name} | {len(made)} of {len(there)} | "
                f"{_range(row.registers for row in made)} | "
                f"{_range(row.shared for row in made)} of {target.shared:,} | "
                f"{max((row.spilled for row in made), default=0):,} | {', '.join(units) or '–'} | "
                f"{sum(row.widest >= 16 for row in made)} of {len(made)} |"
            )


def _faulty(kept: dict[str, dict[str, list[Compiled]]]) -> list[str]:
    every = [
        (target, kernel, row) for target, by in kept.items() for kernel, rows in by.items() for row in rows
    ]
    wrong = [
        f"- {target} {kernel} {row.label}: {'; '.join(row.faults)}"
        for target, kernel, row in every
        if row.faults
    ]
    if not wrong:
        return [f"No faults in {len(every):,}."]
    return [f"What is not as it should be, in {len(wrong)} of {len(every):,}:", "", *wrong]


def _range(values: Iterable[int]) -> str:
    every = sorted(values)
    if not every:
        return "–"
    return f"{every[0]:,}" if every[0] == every[-1] else f"{every[0]:,}–{every[-1]:,}"


def _step(shape: str, tokens: int, prompt: bool) -> Iterator[str]:
    names = [limit.name for limit in roofline.LIMITS]
    yield f"| kernel | MB | GFLOP | {' | '.join(f'{name}, µs' for name in names)} |"
    yield f"| --- | ---: | ---: | {' | '.join('---:' for _ in names)} |"
    works = list(roofline.step(shape, tokens, prompt))
    for work in works:
        times = " | ".join(f"{work.seconds(limit) * 1e6:,.1f}" for limit in roofline.LIMITS)
        yield f"| {work.kernel} | {work.bytes / 1e6:,.1f} | {work.flops / 1e9:,.1f} | {times} |"
    moved, flops = sum(work.bytes for work in works), sum(work.flops for work in works)
    sums = [sum(work.seconds(limit) for work in works) for limit in roofline.LIMITS]
    times = " | ".join(f"**{seconds * 1e6:,.0f}**" for seconds in sums)
    yield f"| **all** | **{moved / 1e6:,.0f}** | **{flops / 1e9:,.0f}** | {times} |"
    rates = " | ".join(f"{tokens / seconds:,.0f}" for seconds in sums)
    yield f"| tokens per second | | | {rates} |"


def _schemes() -> Iterator[str]:
    yield "Tokens per second of one request, at best; int4 has 4.19 bits with scales and zeros."
    yield ""
    names = [limit.name for limit in roofline.LIMITS]
    yield f"| model | weights | {' | '.join(names)} |"
    yield f"| --- | --- | {' | '.join('---:' for _ in names)} |"
    for title, shape in roofline.MODELS.items():
        for name, bits in (("bfloat16", 16.0), ("int8, fp8", 8.0), ("int4", 4 + 24 / 128)):
            works = list(roofline.step(shape, 1, False, bits))
            rates = [1 / sum(work.seconds(limit) for work in works) for limit in roofline.LIMITS]
            yield f"| {title} | {name} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |"
