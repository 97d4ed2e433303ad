"""The error tables against logs of every kind: the lines that engines write, and what nobody should write."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.doctor.logs import PROBLEMS, examine, states
from penstock.doctor.report import match_lines

#: Lines as they were written: (text, id).
LINES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total", "cuda-oom"),
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB", "cuda-oom"),
    ("RuntimeError: CUDA error: out of memory", "cuda-oom"),
    ("out of memory in step 12 with 3 requests; steps are computed in parts of 4", "cuda-oom"),
    (
        "ValueError: The model's max seq len (131072) is larger than the maximum number of tokens "
        "that can be stored in KV cache (79392). Try increasing `gpu_memory_utilization`",
        "kv-cache-too-small",
    ),
    ("ValueError: No available memory for the cache blocks. Try increasing `gpu_mem", "kv-cache-too-small"),
    (
        "(EngineCore pid=7) ... (16.00 GiB KV cache is needed, which is larger than the available KV cache "
        "memory (5.20 GiB).",
        "kv-cache-too-small",
    ),
    (
        "penstock serve: --max-model-len 4096 needs 1.00 GiB of KV cache for one request, but",
        "kv-cache-too-small",
    ),
    (
        "ValueError: Free memory on device (3.1/79.1 GiB) on startup is less than desired GPU memory util",
        "startup-memory",
    ),
    ("OSError: Can't load tokenizer for '/models/qwen'. If you were trying to load it", "model-not-found"),
    ("OSError: /models/x does not appear to have a file named config.json.", "model-not-found"),
    ("OSError: nope/nope is not a local folder and is not a valid model identifier", "model-not-found"),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/models/q/config.json'", "model-not-found"),
    ("PermissionError: [Errno 13] Permission denied: '/models/q/tokenizer.json'", "model-not-found"),
    ("penstock serve: nope/nope is neither a local directory nor a repository on Hugging", "model-not-found"),
    (
        "ValueError: Total number of attention heads (32) must be divisible by tensor parallel size (3).",
        "tensor-parallel",
    ),
    (
        "ValueError: World size (4) is larger than the number of available GPUs (1) in this node",
        "tensor-parallel",
    ),
    ("Tensor parallel size does not match", "tensor-parallel"),
    ("RuntimeError: CUDA error: invalid device ordinal", "device-ordinal"),
    ("torch.cuda.CudaError: invalid device ordinal", "device-ordinal"),
    (
        "Warning  Unhealthy  3m  kubelet  Startup probe failed: Get http://10.0.0.7:8000/health",
        "health-timeout",
    ),
    ("Liveness probe failed: HTTP probe failed with statuscode: 503", "health-timeout"),
    ("Health check timeout", "health-timeout"),
    ("curl: (7) Failed to connect to localhost port 8000: Connection refused", "connection-refused"),
    (
        "aiohttp.ClientConnectorError: [Errno 111] Connect call failed ('127.0.0.1', 8000)",
        "connection-refused",
    ),
    ("    Reason:       OOMKilled", "oom-killed"),
    ("[123.4] Memory cgroup out of memory: Killed process 42 (python3)", "oom-killed"),
    (
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared mem",
        "shared-memory",
    ),
    ("WARNING scheduler.py:1057] Sequence group 0 is preempted by PreemptionMode.RECOMPUTE", "preempted"),
    (
        "Avg prompt throughput: 1.3 tokens/s, Running: 3 reqs, Waiting: 50 reqs, GPU KV cache usage: 1.2%",
        "slow-with-a-queue",
    ),
    (
        "Engine 000: Running: 8 reqs, Waiting: 0 reqs, GPU KV cache usage: 9.0%, Prefix cache hit rate: 0.0%",
        "prefix-cache-misses",
    ),
    ("vllm: error: unrecognized arguments: --num-scheduler-steps 10", "removed-flag"),
    ("penstock serve: --swap-space is not a flag here: vLLM removed it with swapping.", "removed-flag"),
]


@pytest.mark.parametrize(("line", "id"), LINES)
def test_a_line_is_known(line: str, id: str) -> None:
    (match,), count = examine([b"INFO: starting\n" + line.encode() + b"\n" + line.encode()])
    assert (match.problem.id, match.count, match.lines, count) == (id, 2, [2, 3], 3)
    assert match.problem.cause
    assert match.problem.fixes


def test_every_row_has_a_line() -> None:
    assert {id for _, id in LINES} == {problem.id for problem in PROBLEMS}
    assert len({problem.id for problem in PROBLEMS}) == len(PROBLEMS)


@pytest.mark.parametrize(
    "line",
    [
        "INFO 11-22 [core.py:45] Initializing a V1 LLM engine (v0.32.0) with config: model='m', "
        "tensor_parallel_size=1, max_seq_len=4096, gpu_memory_utilization=0.92",
        'INFO:     127.0.0.1:5000 - "GET /health HTTP/1.1" 200 OK',
        "penstock: engine ready: LlamaForCausalLM, bfloat16 on cpu; inspect 0.1 s",
        "Memory (cpu)",
        "Avg prompt throughput: 12.3 tokens/s, Running: 3 reqs, Waiting: 0 reqs, GPU KV cache usage: 1.2%",
        "Engine 000: Running: 0 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.0%, Prefix cache hit rate: 0.0%",
        "Engine 000: Running: 3 reqs, Waiting: 0 reqs, KV cache usage: 1.2%, Prefix cache hit rate: 41.0%",
        "Preempted 0 requests",
    ],
)
def test_an_ordinary_line_is_no_problem(line: str) -> None:
    assert examine([line.encode()]) == ([], 1)


def test_severe_ones_come_first() -> None:
    matches, _ = examine([b"Connection refused\nfine\nCUDA out of memory\n"])
    assert [match.problem.id for match in matches] == ["cuda-oom", "connection-refused"]
    text = "\n".join(match_lines(matches, 3))
    assert "CUDA out of memory (line 3)" in text
    assert text.count("Cause: ") == 2


def test_colours_and_bars_are_taken_away() -> None:
    line = b"\x1b[31m\x1b]0;title\x07loading 10%\rloading 20%\rCUDA out of memory\x1b[0m\x00\x9b2J"
    (match,), _ = examine([line])
    assert match.excerpt.startswith("CUDA out of memory")
    assert all(letter.isprintable() for letter in match.excerpt)


def test_what_was_written_over_is_looked_at_too() -> None:
    (match,), _ = examine([b"loading 10%\rCUDA out of memory\rloading 20%\n"])
    assert (match.problem.id, match.excerpt) == ("cuda-oom", "CUDA out of memory")


def huge(total: int) -> Iterator[bytes]:
    """One line of so many bytes."""
    for _ in range(total >> 16):
        yield b"\x1b[" * (1 << 15)
    yield b"\nCUDA out of memory\n"


def test_a_line_without_an_end_takes_neither_memory_nor_time() -> None:
    import tracemalloc

    tracemalloc.start()
    matches, count = examine(huge(1 << 28))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ([match.lines for match in matches], count) == ([[2]], 2)
    assert peak < 2 << 20


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: str(problem.id))
def test_no_pattern_blows_up(problem: object) -> None:
    """The CPU time of the longest line that is looked at, made of what patterns repeat."""
    pattern: re.Pattern[str] = problem.pattern  # type: ignore[attr-defined]
    for unit in ("tokenizer", "config.json", "tensor parallel size ", "health check ", "a", " ", "\x1b["):
        text = states(unit.encode() * 4096)[-1]
        began = time.process_time()
        assert pattern.search(text) is None
        assert time.process_time() - began < 1.0


@given(st.lists(st.binary(max_size=300), max_size=30))
def test_lines_are_counted_however_they_come(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    matches, count = examine(chunks)
    assert (matches, count) == examine([whole])
    assert count == whole.count(b"\n") + (not whole.endswith(b"\n") and whole != b"")
    assert all(line.isprintable() for match in matches for line in [match.excerpt])


@given(st.text(max_size=500))
def test_what_is_shown_is_printable(text: str) -> None:
    assert all(state.isprintable() for state in states(text.encode("utf-8", "surrogatepass")))
