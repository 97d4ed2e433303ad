"""The fuzzer by hand: a server, workers, progress, and a summary in JSON.

python -m tests.attack.fuzz --requests 1000000 --seed 1 --workers 2      a run
python -m tests.attack.fuzz --seed 1 --show 4711                         one case, as it goes out
python -m tests.attack.fuzz --seed 1 --first 4711 --requests 1           one case, sent
python -m tests.attack.fuzz --pooling …                                  the endpoints of a model that pools
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from penstock import assets
from tests.attack.harness import MB, attacked, processes
from tests.e2e.server import Server, eventually, serving

from .cases import make, make_pooling
from .drive import Report, blocks, run

FLAGS = (
    *("--max-model-len", "256", "--kv-cache-memory-bytes", "8MiB"),
    *("--dtype", "float32", "--disable-uvicorn-access-log"),
)
"""A small context bounds what one request may generate, a small cache makes them wait for each other, and
bfloat16 is slow on processors that have no instructions for it."""
DEMO = Path(assets.__file__).parent / "demo"
_BUG = re.compile(r"Traceback|CRITICAL|error [0-9a-f]{12} in .*")


def tiny(folder: Path) -> tuple[str, ...]:
    """Flags of a server whose model is the demo model's shape with next to no arithmetic: the fuzzer is after
    the server, and a million prompts of the demo model are hours of matrix products. Its random weights write
    what no trained model does: broken characters, special tokens, no end."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    config = json.loads((DEMO / "config.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "num_key_value_heads": 1}))
    return str(folder), "--load-format", "dummy", "--served-model-name", "demo"


def tiny_encoder(folder: Path) -> tuple[str, ...]:
    """Flags of a server whose model is a random encoder of a few words."""
    from tests.model.encoders import make_encoder, modules
    from tests.test_offline_pooling import with_tokenizer

    model = with_tokenizer(make_encoder(folder, "bert", files=modules("mean", normalize=True)))
    return str(model), "--served-model-name", "demo", "--dtype", "float32", "--disable-uvicorn-access-log"


def aftermath(server: Server) -> dict[str, int]:
    """What the log and the metrics say when all is over → how often; empty if nothing is wrong."""
    found: dict[str, int] = {}
    if server.process.poll() is not None:
        return {"the server has ended": 1}
    for line in server.log.splitlines():
        if bug := _BUG.search(line):
            said = re.sub("[0-9a-f]{12}", "…", bug[0])
            found[said] = found.get(said, 0) + 1
    try:  # whoever left pays until the engine has ended his request
        eventually(lambda: json.loads(server.get("/load")[1])["server_load"] == 0)
        eventually(lambda: _busy(server) == 0)
    except AssertionError:
        found["requests or blocks that nobody holds"] = 1
    if server.get("/health")[0] != 200:
        found["no health"] = 1
    return found


def _cpu(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy(server: Server) -> float:
    page = server.metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return sum(page.total(name) for name in names)


def main() -> int:
    """Fuzz as the flags say. Exit status 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.fuzz")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=16, help="connections of each worker")
    parser.add_argument("--demo", action="store_true", help="the demo model, not a tiny random one")
    parser.add_argument("--pooling", action="store_true", help="a tiny encoder, and what it is asked")
    parser.add_argument("--show", type=int, help="print the case of this number")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of a worker's server
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show is not None:
        case = (make_pooling if options.pooling else make)(options.seed, options.show)
        print(case)
        sys.stdout.flush()
        sys.stdout.buffer.write(case.wire()[:20_000] + b"\n")
        return 0
    if options.port is not None:
        mine = blocks(options.first, options.requests, options.worker, options.workers)
        maker = make_pooling if options.pooling else make
        for report in run(options.port, options.seed, mine, options.sessions, make=maker):
            print(msgspec.json.encode(report).decode(), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        if options.pooling:
            flags = tiny_encoder(Path(directory))
        else:
            model = ("demo",) if options.demo else tiny(Path(directory))
            flags = (*model, *FLAGS, "--batch-dir", str(Path(directory) / "batches"))
        with serving(*flags, log=log) as server:
            summary = _attack(server, options)
    print(json.dumps(summary, indent=2))
    return 1 if summary["findings"] or summary["aftermath"] else 0


def _attack(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    total = Report()
    begun = time.monotonic()
    cpu = {name: _cpu(pid) for name, pid in processes(server).items()}
    toll = attacked(server, lambda: _workers(server.port, options, total))
    seconds = time.monotonic() - begun
    cpu = {name: _cpu(pid) - cpu.get(name, 0.0) for name, pid in processes(server).items()}
    after = aftermath(server)
    return {
        "seed": options.seed,
        "requests": total.requests,
        "per second": round(total.requests / seconds),
        "served by the engine": total.served,
        "left early": total.left,
        "statuses": dict(sorted(total.statuses.items())),
        "5xx but full": sum(
            count for status, count in total.statuses.items() if status[:1] == "5" and status != "503"
        ),
        "hangs": total.hangs,
        "shapeless": sum(times for problem, times in total.times.items() if problem.startswith("shapeless")),
        "slowest answer": round(total.slowest, 3),
        "worst livez": round(toll.worst_livez, 3),
        "livez failed": toll.failed,
        "CPU seconds": {name: round(spent) for name, spent in cpu.items()},
        "memory above idle, MB": {name: round(size / MB) for name, size in toll.grown.items()},
        "memory kept, MB": {name: round(size / MB) for name, size in toll.kept.items()},
        "findings": {
            f"{problem} ({total.times[problem]} times)": [
                f"--seed {options.seed} --first {number} --requests 1" for number in numbers
            ]
            for problem, numbers in total.findings.items()
        },
        "aftermath": after,
    }


def _workers(port: int, options: argparse.Namespace, total: Report) -> None:
    lock = threading.Lock()
    told = [time.monotonic()]
    failed: list[str] = []

    def follow(worker: int) -> None:
        flags = ("seed", "first", "requests", "workers", "sessions")
        command = [sys.executable, "-m", "tests.attack.fuzz", "--port", str(port), "--worker", str(worker)]
        command += [f"--{name}={getattr(options, name)}" for name in flags]
        command += ["--pooling"] * options.pooling
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                with lock:
                    total.merge(msgspec.json.decode(line, type=Report))
                    if time.monotonic() - told[0] > 10:
                        told[0] = time.monotonic()
                        print(f"{total.requests:,} {dict(total.statuses)} {total.findings}", file=sys.stderr)
        if process.returncode:
            failed.append(f"worker {worker} ended with {process.returncode}")

    threads = [threading.Thread(target=follow, args=(worker,)) for worker in range(options.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError("; ".join(failed))


if __name__ == "__main__":
    raise SystemExit(main())
