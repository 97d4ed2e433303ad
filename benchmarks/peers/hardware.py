"""The limits of the machine, measured in a process of its own right before an engine starts.

    python -m benchmarks.peers.hardware      one line of JSON

The same two measurements that the engine prints at its start (`penstock.engine.hardware`): the bandwidth of
reading memory and the rate of a bfloat16 matrix product. Machines in a cloud change from minute to minute: a
share of a limit is only worth something next to a limit measured at the same time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from penstock.engine.environment import prepare

from .engines import CHECKOUT


def measure() -> dict[str, Any]:
    """bandwidth in bytes/s, flops in FLOP/s of bfloat16, isa, threads; in a process that ends afterwards."""
    command = [sys.executable, "-m", "benchmarks.peers.hardware"]
    environment = dict(os.environ)
    prepare(environment)  # large pages: what is read faster with them would pass for more than the limit
    out = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    import torch

    from penstock.engine.hardware import inspect_hardware

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tries = [dataclasses.asdict(inspect_hardware(torch.device("cpu"), torch.bfloat16)) for _ in range(3)]
    # A limit is what was reached once, not what was usual.
    hardware = tries[0] | {name: max(entry[name] for entry in tries) for name in ("bandwidth", "flops")}
    print(json.dumps({name: hardware[name] for name in ("name", "isa", "threads", "bandwidth", "flops")}))


if __name__ == "__main__":
    main()
