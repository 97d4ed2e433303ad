"""From exec to the first streamed token: the demo model, and the 0.6B shape with a warm page cache.

python -m benchmarks.startup [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from penstock.bench.startup import StartupBench, bench_startup, free_port, serve_command

from .checkpoint import write_checkpoint
from .common import MODELS, save


def run(repeats: int = 5) -> dict[str, Any]:
    """Medians and all runs of both models."""
    large = write_checkpoint(MODELS / "qwen3-0.6b", "qwen3-0.6b")
    result: dict[str, Any] = {}
    for name, model in (("demo", "demo"), ("qwen3-0.6b", str(large))):
        port = free_port()
        command = serve_command(model, ["--max-model-len", "2048"], port)
        result[name] = bench_startup(
            StartupBench(command=command, base_url=f"http://127.0.0.1:{port}", model=model, repeats=repeats)
        )
        del result[name]["command"]  # paths of this machine
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    result = run(parser.parse_args().repeats)
    save("startup", result)
    print(json.dumps({name: entry["runs"] for name, entry in result.items()}, indent=1))


if __name__ == "__main__":
    main()
