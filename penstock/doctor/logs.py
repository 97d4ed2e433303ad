"""The error tables: what lines of a log mean, and what to do about it. Pure; bounded in time and memory.

A log is somebody else's: it may be binary, have colours, or one line of a gigabyte. Of a line the first 4,096
bytes are looked at, with patterns that take time in proportion to them; of each problem a few line numbers
and one excerpt are kept. Excerpts have no control characters: a terminal shows them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_LONGEST = 4096
"""Bytes of a line that are looked at."""
_EXCERPT = 240
"""Characters of a line that are shown."""
_KEPT = 5
"""Line numbers of each problem."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]{0,32}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)?|[@-Z\\^_])")


@dataclass(frozen=True, slots=True)
class Problem:
    """A row of the error tables."""

    id: str
    title: str
    pattern: re.Pattern[str]
    cause: str
    fixes: tuple[str, ...]
    severe: bool = True
    """Whether it ends an engine or keeps it from starting; else it slows it down."""


def _row(
    id: str, title: str, patterns: tuple[str, ...], cause: str, *fixes: str, severe: bool = True
) -> Problem:
    return Problem(id, title, re.compile("|".join(patterns), re.IGNORECASE), cause, fixes, severe)


#: In this order: a line is the first problem's that it fits. Wordings are vLLM's, torch's, Hugging Face's,
#: Kubernetes' and ours.
PROBLEMS = (
    _row(
        "kv-cache-too-small",
        "The KV cache is too small for the context",
        (
            r"larger than the maximum number of tokens that can be stored in KV cache",
            r"No available memory for the cache blocks",
            r"KV cache is needed, which is larger than the available KV cache memory",
            r"KV cache too small",
            r"of KV cache for one request",
            r"nothing is left for the KV cache",
        ),
        "What is left beside the weights does not hold one request of --max-model-len tokens.",
        "Lower --max-model-len to what requests need.",
        "Raise --gpu-memory-utilization (0.90, up to 0.95 where nothing else uses the device).",
        "Quantise the weights, or their cache (--kv-cache-dtype fp8 in vLLM).",
    ),
    _row(
        "startup-memory",
        "Another process has the device's memory",
        (r"Free memory on device .{0,80}is less than desired GPU memory util",),
        "The share that --gpu-memory-utilization asks for is not free when the engine starts.",
        "End what else is on the device (nvidia-smi shows it), or give the engine another one.",
        "Lower --gpu-memory-utilization to what is free.",
    ),
    _row(
        "cuda-oom",
        "CUDA out of memory",
        (
            r"CUDA out of memory",
            r"torch\.OutOfMemoryError",
            r"OutOfMemoryError: .{0,40}out of memory",
            r"CUDA error: out of memory",
            r"cublas_status_alloc_failed",
            r"out of memory in step \d",
            r"the device ran out of memory",
        ),
        "Weights, KV cache and activations together are more than the device's memory.",
        "At the start: reduce --max-model-len, quantise (AWQ, GPTQ; FP8 on H100 and L40S), or more devices "
        "with --tensor-parallel-size.",
        "Under load: lower --gpu-memory-utilization, 0.90 to 0.85, and watch nvidia-smi.",
        "Lower --max-num-seqs or --max-num-batched-tokens: activations grow with both.",
    ),
    _row(
        "tensor-parallel",
        "The tensor parallel size does not match",
        (
            r"tensor.parallel.size.{0,80}(?:does not match|must equal|greater than|exceeds)",
            r"World size .{0,40}is larger than the number of available GPUs",
            r"attention heads .{0,60}must be divisible by tensor parallel size",
            r"is not divisible by tensor parallel size",
            r"--tensor-parallel-size \d{1,9} is not implemented",
        ),
        "--tensor-parallel-size asks for devices that are not there, or does not divide the model's heads.",
        "Make it equal to the nvidia.com/gpu limit of the pod, and a divisor of the number of heads.",
    ),
    _row(
        "device-ordinal",
        "Invalid device ordinal",
        (r"invalid device ordinal", r"No CUDA GPUs are available", r"no NVIDIA driver on your system"),
        "The process asks for a device that its container, or CUDA_VISIBLE_DEVICES, does not have.",
        "Look whether nvidia-smi in the container shows devices numbered from 0 on, without a gap.",
        "Restart nvidia-device-plugin on the node, and the pod after it.",
        "Compare CUDA_VISIBLE_DEVICES and the nvidia.com/gpu limit with --tensor-parallel-size.",
    ),
    _row(
        "model-not-found",
        "The model or its tokenizer is not found",
        (
            r"is not a local folder and is not a valid model identifier",
            r"does not appear to have a file named",
            r"Can't load tokenizer for",
            r"Repository Not Found for url",
            r"RepositoryNotFoundError|GatedRepoError|LocalEntryNotFoundError",
            r"(?:no such file|permission denied).{0,120}(?:config\.json|tokenizer|safetensors|/models)",
            r"(?:config\.json|tokenizer[\w.]{0,20}|\.safetensors).{0,160}"
            r"(?:not found|no such file|cannot be found|is missing|permission denied|does not exist)",
            r"is neither a local directory nor",
            r"does not exist\. Give a local directory",
        ),
        "The path or the name of the model leads nowhere, or the process may not read it.",
        "Look at the mount: is the volume (PVC) at the path that --model names, with config.json in it?",
        "Look at the files' permissions for the user of the container; weights may be mounted read-only.",
        "A gated model of the hub needs HF_TOKEN in the environment.",
    ),
    _row(
        "shared-memory",
        "Shared memory is too small",
        (
            r"bus error",
            r"insufficient shared mem",
            r"unable to (?:open|allocate|write to) shared memory",
            r"No space left on device.{0,80}/dev/shm|/dev/shm.{0,80}No space left on device",
        ),
        "Processes of one engine exchange tensors in /dev/shm, of which containers have 64 MiB by default.",
        "Mount an emptyDir with medium: Memory at /dev/shm, of 8 GiB or more; with docker, --shm-size=8g.",
    ),
    _row(
        "oom-killed",
        "The kernel has killed it for memory",
        (
            r"OOMKilled",
            r"Out of memory: Killed process",
            r"oom-kill(?:er)?\b",
            r"memory cgroup out of memory",
            r"has ended: signal 9",
        ),
        "The pod, or the machine, ran out of main memory; loading takes the weights' size of it.",
        "Raise the pod's memory limit: about 20 GiB for 7B in FP16, 80 GiB for 70B.",
        "On a CPU, lower --kv-cache-memory-bytes or memory: in penstock.yaml.",
    ),
    _row(
        "health-timeout",
        "A health check gives up before the model is loaded",
        (
            r"(?:liveness|readiness|startup) probe failed",
            r"failed (?:liveness|readiness|startup) probe",
            r"health ?check.{0,60}(?:timed? ?out|timeout|failed)",
            r"is not ready (?:within|after) \d",
            r"has not answered /(?:readyz|livez|health) within",
        ),
        "Loading takes longer than the probe waits: 30 s for 7B, minutes for 70B.",
        "Give the pod a startupProbe with failureThreshold × periodSeconds over the longest load: 20 × 30 s "
        "is ten minutes, for 70B.",
        "Keep weights on a local disk or a cached volume.",
    ),
    _row(
        "connection-refused",
        "Connection refused",
        (r"connection refused", r"ConnectionRefusedError", r"ECONNREFUSED", r"connect call failed"),
        "Nobody listens there (yet): a server does not listen before its model is loaded.",
        "Wait for the readiness probe; loading can take several minutes.",
        "If it stays so: does the engine's log end in an error, and do host and port agree on both sides?",
        severe=False,
    ),
    _row(
        "preempted",
        "Requests are preempted",
        (
            r"is preempted by PreemptionMode",
            r"preempted [1-9]\d{0,8} requests?",
            r"not enough KV cache space",
        ),
        "The KV cache runs full, and requests that were under way are computed again.",
        "Raise --gpu-memory-utilization or --kv-cache-memory-bytes, or lower --max-num-seqs: "
        "penstock tune --live finds how far.",
        severe=False,
    ),
    _row(
        "slow-with-a-queue",
        "Requests wait while others run",
        (r"\bWaiting: [1-9]\d{0,8} reqs",),
        "Time to the first token is spent in the queue, not in computing.",
        "penstock tune --live finds the --max-num-seqs for your targets; penstock doctor URL shows what "
        "binds.",
        "Another replica, or a smaller or quantised model, if the KV cache is full at that setting.",
        severe=False,
    ),
    _row(
        "prefix-cache-misses",
        "The prefix cache is not hit",
        (r"Running: [1-9]\d{0,8} reqs.{0,120}prefix cache hit rate: [0-4](?:\.\d{1,4})?%",),
        "Prompts do not begin alike: dynamic text (a date, a name) stands before what is always the same.",
        "Put the system prompt and documents first, and what changes last; check that caching is enabled.",
        severe=False,
    ),
    _row(
        "removed-flag",
        "A flag is not known",
        (r"unrecognized arguments: --", r"unknown flag --", r"is not a flag here"),
        "The engine's version does not have it (--num-scheduler-steps and --swap-space left with V1).",
        "Take it out; penstock serve --help=vllm says what stands in its place.",
    ),
)


@dataclass(slots=True)
class Match:
    """A problem that was found."""

    problem: Problem
    count: int = 0
    lines: list[int] = field(default_factory=list)
    """Numbers of the first lines, from 1."""
    excerpt: str = ""
    """Of the first one."""


def states(line: bytes) -> list[str]:
    """What stood in a line, one after the other where it was written over (progress bars): as it may be
    shown, without escapes and control characters."""
    text = _ESCAPES.sub("", line[:_LONGEST].decode("utf-8", "replace").rstrip("\r\n"))
    return [
        "".join(letter if letter.isprintable() else " " for letter in state) for state in text.split("\r")
    ]


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream, each cut to what is looked at; what is longer is skipped, and never kept."""
    rest = b""
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest += first[: _LONGEST - len(rest)]
        for other in others:
            yield rest
            rest = other[:_LONGEST]
    if rest:
        yield rest


def examine(chunks: Iterable[bytes]) -> tuple[list[Match], int]:
    """The problems of a log, severe ones and then the earliest first; and how many lines it has."""
    found: dict[str, Match] = {}
    number = 0
    for number, line in enumerate(lines(chunks), start=1):
        if (first := next(_problems(line), None)) is None:
            continue
        problem, text = first
        match = found.setdefault(problem.id, Match(problem))
        match.count += 1
        if len(match.lines) < _KEPT:
            match.lines.append(number)
        match.excerpt = match.excerpt or text.strip()[:_EXCERPT]
    return sorted(found.values(), key=lambda match: (not match.problem.severe, match.lines[0])), number


def _problems(line: bytes) -> Iterator[tuple[Problem, str]]:
    """What a line says, the first first, with the text that says it."""
    for text in states(line):
        for each in PROBLEMS:
            if each.pattern.search(text):
                yield each, text
