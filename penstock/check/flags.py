"""Which flags there are: of vLLM 0.32, of `penstock` itself, and those that are no more.

`tables/vllm-0.32.txt` is what `vllm serve --help=all` lists; `tables/penstock.txt` is made from our parsers
(`python -m penstock.cli.flags_page --table`). A line of both is a kind and names; lines `[words]` begin the
flags of a sub-command.

    switch --enforce-eager          no value; there is a --no-enforce-eager, too
    flag   --json                   no value, and no twin
    value  --max-model-len          one value
    values --lora-modules           one or more
    maybe  --hf-token               none or one
    value  --dtype {auto,float16}   one of these
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from penstock.core.near import nearest

VLLM_VERSION = "0.32"

REMOVED: Mapping[str, str] = {
    "--num-scheduler-steps": "drop it: the V1 engine schedules every step, and does so while the device "
    "works (--async-scheduling, on by default)",
    "--swap-space": "drop it: the V1 engine recomputes preempted requests through their cached prefix; "
    "--kv-offloading-size keeps KV blocks in the host's memory",
    "--multi-step-stream-outputs": "use --stream-interval to send several tokens in one piece",
    "--preemption-mode": "drop it: preemption always recomputes",
    "--use-v2-block-manager": "drop it: there is one block manager",
    "--guided-decoding-backend": "use --structured-outputs-config '{\"backend\": …}'",
    "--max-num-partial-prefills": "use --long-prefill-token-threshold to bound one prompt's share of a step",
    "--max-long-partial-prefills": "use --long-prefill-token-threshold",
    "--disable-log-requests": "drop it: requests are not logged by default (--enable-log-requests does)",
    "--max-seq-len-to-capture": "use --max-cudagraph-capture-size",
    "--max-context-len-to-capture": "use --max-cudagraph-capture-size",
    "--worker-use-ray": "use --distributed-executor-backend ray",
    "--engine-use-ray": "drop it",
    "--disable-async-output-proc": "use --no-async-scheduling",
    "--speculative-model": "use --speculative-config '{\"model\": …}' or --spec-model",
    "--num-speculative-tokens": "use --speculative-config '{\"num_speculative_tokens\": …}' or --spec-tokens",
    "--enable-chunked-context": "use --enable-chunked-prefill, which is the default",
    "--device": "drop it: the platform is found from what is installed",
    "--num-lookahead-slots": "drop it: it follows from --speculative-config",
    "--lora-extra-vocab-size": "drop it: adapters with tokens of their own are not supported",
    "--long-lora-scaling-factors": "drop it",
    "--rope-scaling": "use --hf-overrides '{\"rope_scaling\": …}'",
    "--rope-theta": "use --hf-overrides '{\"rope_theta\": …}'",
    "--cuda-graph-sizes": "use --cudagraph-capture-sizes",
    "--enable-reasoning": "drop it: --reasoning-parser NAME is enough",
    "--task": "use --runner generate or pooling, and --convert",
    "--kv-cache-size": "use --kv-cache-memory-bytes",
    "--context-length": "that is SGLang's name: use --max-model-len",
    "--mem-fraction-static": "that is SGLang's name: use --gpu-memory-utilization",
    "--max-running-requests": "that is SGLang's name: use --max-num-seqs",
    "--max-total-tokens": "that is TGI's and SGLang's name: use --max-model-len",
    "--model-path": "that is SGLang's name: give the model as the first argument",
}
"""Flags that vLLM had or others have → what to write instead."""

RANGES: Mapping[str, tuple[float, float, str]] = {
    # vLLM's own bounds (ge, gt, le of the fields in vllm/config/*.py), narrowed to what can be meant
    "--gpu-memory-utilization": (0.01, 1.0, "is a share of the device's memory, as 0.90"),
    "--tensor-parallel-size": (1, 1024, "is a number of devices"),
    "--pipeline-parallel-size": (1, 1024, "is a number of devices"),
    "--data-parallel-size": (1, 4096, "is a number of engines"),
    "--max-num-seqs": (1, 1_000_000, "is a number of sequences"),
    "--max-num-batched-tokens": (1, 100_000_000, "is a number of tokens"),
    "--port": (0, 65535, "is a TCP port"),
    "--cpu-offload-gb": (0, 100_000, "is a number of GiB"),
    "--max-loras": (1, 100_000, "is a number of adapters"),
    "--api-server-count": (1, 1024, "is a number of processes"),
    "--shutdown-timeout": (0, 1_000_000, "is a number of seconds"),
}
"""Flag → least, most, and what it is."""

SIZES = frozenset({"--max-model-len", "--max-num-batched-tokens", "--kv-cache-memory-bytes"})
"""Flags that read 8k and 8K, too."""


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of one program."""

    owner: str
    """As messages call it."""
    kinds: Mapping[str, str]
    """Every spelling → its kind."""
    names: Mapping[str, str]
    """Every spelling → the flag's first name."""
    subcommands: frozenset[str] = frozenset()
    """Words that come first, where there are some."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """First name → the values that it may have, where they are few."""

    def named(self, option: str) -> str | None:
        """The flag's first name, however it is spelled (`--max_model_len`, `-tp`, `--x.key`), or None."""
        return self.names.get(plain(option))

    def kind(self, option: str) -> str:
        """How many values it takes."""
        return self.kinds[plain(option)]

    def nearest(self, option: str) -> str | None:
        """The flag that was probably meant."""
        return nearest(plain(option), (name for name in self.names if len(name) > 3), 0.75)


def plain(option: str) -> str:
    """`--max_model_len.key+` → `--max-model-len`."""
    if not option.startswith("--"):
        return option.partition(".")[0]
    return option.partition(".")[0].replace("_", "-").removesuffix("+")


@cache
def vllm() -> Flags:
    """Of `vllm serve`, which `python -m vllm.entrypoints.openai.api_server` has, too."""
    return _read("vllm-0.32.txt", f"vLLM {VLLM_VERSION}")[""]


@cache
def penstock() -> Mapping[str, Flags]:
    """Sub-command of `penstock`, in one or two words → its flags."""
    return _read("penstock.txt", "penstock")


def _read(name: str, owner: str) -> dict[str, Flags]:
    text = resources.files("penstock.check").joinpath("tables", name).read_text(encoding="utf-8")
    found: dict[str, tuple[dict[str, str], dict[str, str], dict[str, tuple[str, ...]]]] = {}
    command = ""
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        if line.startswith("["):
            command = line.strip("[]")
            found.setdefault(command, ({}, {}, {}))
            continue
        kind, *spellings = line.split()
        kinds, names, choices = found.setdefault(command, ({}, {}, {}))
        if spellings[-1].startswith("{"):
            choices[spellings[0]] = tuple(spellings.pop().strip("{}").split(","))
        for spelling in spellings:
            kinds[spelling], names[spelling] = kind, spellings[0]
            if kind == "switch" and spelling.startswith("--"):
                twin = f"--no-{spelling[2:]}"
                kinds[twin], names[twin] = "switch", spellings[0]
    made = {}
    for command, (kinds, names, choices) in found.items():
        under = frozenset(
            each[len(command) + 1 :] for each in found if command and each.startswith(command + " ")
        )
        made[command] = Flags(f"{owner} {command}".strip(), kinds, names, under, choices)
    return made
