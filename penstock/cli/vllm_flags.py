"""vLLM 0.32's flags that are not ours: what each would need, or why it changes nothing.

From this table come the parser's answers, `penstock serve --help=vllm` and docs/flags.md. A row is

    --max-loras=1             takes one value; 1 asks for what is so anyway, others are refused
    --nnodes,-n=1             with its short name
    --task=auto|generate      several such values; * is any
    --enable-lora=off         a switch, which also has a --no- twin: on, off, or both (any)
    --spec-model              no value is served, but None, "" and [] are: they are no value
    --lora-modules+           takes several values; --hf-token? takes one or none

Every reason reads on after "--flag needs", or says why the flag changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

_ROW = re.compile(r"(?P<name>--[a-z0-9-]+)(?P<short>,-\w+)?(?P<many>[+?])?(?:=(?P<served>\S+))?")
_SECRET = {"--hf-token"}  # its value is not for a log
_SWITCH = {"on": (True,), "off": (False,), "any": (True, False)}


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """A flag of vLLM that Penstock has no setting for."""

    name: str
    short: str | None
    nargs: str | None
    """As argparse has it: None for one value, "+", "?"."""
    switch: tuple[bool, ...]
    """The positions of a switch that are served; () for flags with values."""
    values: tuple[str, ...]
    """The values that are served."""
    why: str
    """What the others need; or why none changes anything."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling but the --no- twin."""
        return (self.name, *filter(None, [self.short]))

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return bool(self.switch)

    @property
    def changes_nothing(self) -> bool:
        """Whether it is accepted however it is given."""
        return len(self.switch) == 2 or "*" in self.values

    def serves(self, given: bool | str | Sequence[str] | None) -> bool:
        """Whether this position, value or list of values asks for what is so anyway."""
        if isinstance(given, bool):
            return given in self.switch
        if self.changes_nothing or given is None:  # None: it may stand without a value, and does
            return True
        text = given if isinstance(given, str) else " ".join(given)
        if not self.values and text in ("", "None", "[]"):
            return True
        return any(_same(text, value) for value in self.values)

    def answer(self, option: str, given: bool | str | Sequence[str] | None) -> str:
        """Why `option`, as it was written, is not served, and what is."""
        shown = ""
        if given and not isinstance(given, bool) and self.name not in _SECRET:
            shown = " " + (given if isinstance(given, str) else " ".join(given))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return f"{option}{shown} is vLLM's, and needs {self.why}. {self._instead()}"

    def _instead(self) -> str:
        if self.values:
            return f"Drop it, or give it as {' or '.join(self.values)}."
        return "Drop it, or serve with vLLM." if "not implemented" in self.why else "Drop it."


def _same(given: str, served: str) -> bool:
    """Whether two spellings are one value: numbers and JSON by what they mean, names by their letters."""
    if given.lower() == served.lower():
        return True
    try:
        return bool(json.loads(given) == json.loads(served))
    except ValueError:
        return False


#: feature → (what is missing or why it is always so, rows)
_TABLE: dict[str, tuple[tuple[str, str], ...]] = {
    "Several devices": (
        (
            "several devices: not implemented; run one server per device behind a gateway",
            """--pipeline-parallel-size,-pp=1 --decode-context-parallel-size,-dcp=1
            --prefill-context-parallel-size,-pcp=1 --data-parallel-size,-dp=1 --data-parallel-rank,-dpn
            --data-parallel-start-rank,-dpr --data-parallel-size-local,-dpl=1 --data-parallel-address,-dpa
            --data-parallel-rpc-port,-dpp --data-parallel-backend,-dpb=mp --data-parallel-hybrid-lb,-dph=off
            --data-parallel-external-lb,-dpe=off --data-parallel-multi-port-external-lb,-dpm=off
            --data-parallel-supervisor-port=9256 --dp-supervisor-probe-interval-s=5
            --dp-supervisor-probe-timeout-s=5 --dp-supervisor-probe-failure-threshold=3 --dp-sync-interval=16
            --nnodes,-n=1 --node-rank,-r=0 --master-addr=127.0.0.1 --master-port=29501 --headless=off
            --distributed-executor-backend=uni|mp --distributed-timeout-seconds
            --cpu-distributed-timeout-seconds --dcp-comm-backend --dcp-q-replicate=off
            --dcp-kv-cache-interleave-size=1 --cp-kv-cache-interleave-size=1 --enable-hc-sp=off
            --enable-batch-sharded-sampling=off --enable-elastic-ep=off --elastic-ep-max-dp-size
            --enable-fault-tolerance=off --fault-tolerance-config={} --enable-shm-tensor-arena=off
            --enable-nccl-comm-suspend=off --prefill-schedule-interval=1 --ray-workers-use-nsight=off
            --max-parallel-loading-workers --worker-cls=auto --worker-extension-cls""",
        ),
        (
            "nothing passes between devices",
            """--disable-custom-all-reduce=any --disable-nccl-for-dp-synchronization=any
            --aggregate-engine-logging=any""",
        ),
        (
            "the choice of the devices from outside: set CUDA_VISIBLE_DEVICES",
            "--device-ids",
        ),
        (
            "the choice of memory nodes and cores from outside: start the server with numactl or taskset",
            "--numa-bind=off --numa-bind-nodes+ --numa-bind-cpus+",
        ),
        ("the engine always has a process of its own", "--disable-frontend-multiprocessing=any"),
    ),
    "Mixture of experts": (
        (
            "mixture-of-experts models: not implemented",
            """--enable-expert-parallel,-ep=off --enable-ep-weight-filter=off --enable-eplb=off
            --eplb-config={} --all2all-backend=allgather_reducescatter --expert-placement-strategy=linear
            --moe-backend=auto --enable-return-routed-experts=off --enable-dbo=off --ubatch-size=0
            --dbo-decode-token-threshold=32 --dbo-prefill-token-threshold=512""",
        ),
    ),
    "Speculative decoding": (
        (
            "speculative decoding: not implemented",
            """--speculative-config,-sc --spec-method --spec-model --spec-tokens
            --per-request-spec-decode-metrics=none""",
        ),
    ),
    "LoRA": (
        (
            "LoRA adapters: not implemented; merge the adapter into the weights",
            """--enable-lora=off --lora-modules+ --max-loras=1 --max-lora-rank=16 --max-cpu-loras
            --lora-dtype=auto --lora-target-modules+ --fully-sharded-loras=off --default-mm-loras
            --specialize-active-lora=off --enable-tower-connector-lora=off --enable-mixed-moe-lora-format=off
            --enable-moe-shared-loras=off --max-lora-cls-labels""",
        ),
    ),
    "Images, audio and video": (
        (
            "inputs other than text: not implemented",
            """--limit-mm-per-prompt={} --enable-mm-embeds=off --media-io-kwargs={} --mm-processor-kwargs
            --mm-processor-cache-gb=4|0 --mm-processor-cache-type=lru --mm-hasher-algorithm=blake3
            --mm-shm-cache-max-object-size-mb=128 --mm-encoder-only=off --mm-encoder-tp-mode=weights
            --mm-encoder-attn-backend --mm-encoder-attn-dtype --mm-encoder-fp8-scale-path
            --mm-encoder-fp8-scale-save-path --mm-encoder-fp8-scale-save-margin=1.5
            --interleave-mm-strings=off --video-pruning-rate --video-pruning-method=evs
            --mm-tensor-ipc=direct_rpc --mm-processor-device=auto|cpu --mm-ipc-gpu-memory-gb=0
            --mm-device-do-normalize=off --allowed-local-media-path --allowed-media-domains+
            --trust-request-mm-kwargs=off --ec-transfer-config --ec-manager-config={}""",
        ),
        (
            "inputs are text only",
            "--language-model-only=any --disable-chunked-mm-input=any --skip-mm-profiling=any",
        ),
    ),
    "Tools, reasoning and structured output": (
        (
            "parsers of one's own: not implemented; use those of --tool-call-parser and --reasoning-parser",
            "--tool-parser-plugin --reasoning-parser-plugin",
        ),
        ("tools that the server runs by itself: not implemented", "--tool-server"),
    ),
    "Other kinds of model": (
        (
            "another name: --runner and --convert say what a model is for",
            "--task=auto|generate",
        ),
        (
            "multi-vector models are scored in the API process",
            "--enable-flash-late-interaction=any",
        ),
        (
            "Mamba and other state-space layers: not implemented",
            """--mamba-backend=triton --mamba-ssu-algorithm --enable-mamba-cache-stochastic-rounding=off
            --mamba-cache-philox-rounds=0 --mamba-cache-dtype=auto --mamba-ssm-cache-dtype=auto
            --mamba-block-size --mamba-cache-mode=none --enable-mamba-shared-prefix-checkpoint=off
            --replayssm-buffer-len=16 --use-replayssm=off --gdn-prefill-backend --kda-prefill-backend
            --kda-decode-backend""",
        ),
        (
            "an architecture that is not implemented",
            """--diffusion-config,-dc --engram-config --sparse-indexer-topk-backend=auto
            --kv-sharing-fast-prefill=off""",
        ),
        (
            "layers with key-value caches of several kinds: there is one, and every layer keeps all tokens",
            """--disable-hybrid-kv-cache-manager=on --swa-bounded-replay=on
            --prefix-cache-retention-interval=0""",
        ),
    ),
    "Loading": (
        (
            "files from elsewhere: configuration, weights and tokenizer come from the model's own directory",
            """--tokenizer --tokenizer-revision --hf-config-path --config-format=auto|hf
            --model-class-overrides={} --quantization-config""",
        ),
        (
            "other tokenizers than tokenizer.json",
            "--tokenizer-mode=auto|hf --skip-tokenizer-init=off",
        ),
        (
            "an implementation that is not ours: models are written here, one file per architecture",
            "--model-impl=auto --io-processor-plugin --additional-config={}",
        ),
        ("no code from checkpoints is ever run", "--code-revision=*"),
        ("the token in the environment: set HF_TOKEN", "--hf-token?"),
        (
            "another way of reading weights: safetensors files are memory-mapped, once",
            """--safetensors-load-strategy=lazy --safetensors-prefetch-num-threads=8
            --safetensors-prefetch-block-size=16777216|16M --model-loader-extra-config={}
            --ignore-patterns+=original/**/* --pt-load-map-location=cpu""",
        ),
        (
            "a quiet log: a terminal gets a progress bar, a file one line",
            "--use-tqdm-on-load=on",
        ),
        (
            "formats that Penstock does not read; it quantises at load (--quantization)",
            "--allow-deprecated-quantization=off",
        ),
        (
            "weights that change while serving: not implemented",
            """--weight-transfer-config --enable-sleep-mode=off --sleep-mode-offload-cudagraph=off
            --sleep-preserve-parameter-names+=[]""",
        ),
    ),
    "Memory": (
        (
            "a KV cache in another type than the model's: not implemented",
            "--kv-cache-dtype=auto --kv-cache-dtype-skip-layers+=[]",
        ),
        (
            "its number from the memory: set --kv-cache-memory-bytes",
            "--num-gpu-blocks-override",
        ),
        (
            "memory besides the device's: not implemented",
            """--cpu-offload-gb=0 --cpu-offload-params+=[] --offload-backend=auto --offload-group-size=0
            --offload-num-in-group=1 --offload-prefetch-step=1 --offload-params+=[]
            --kv-offloading-backend=native --kv-transfer-config --kv-events-config
            --enable-cumem-allocator=off""",
        ),
        (
            "hits within a block: prefixes are matched by whole blocks of --block-size tokens",
            "--prefix-match-unit",
        ),
        (
            "another hash: blocks are named by blake2b, which is cryptographic as sha256 is",
            "--prefix-caching-hash-algo=sha256|sha256_cbor",
        ),
    ),
    "Scheduling": (
        (
            "another limit: use --max-num-batched-tokens",
            "--max-num-scheduled-tokens",
        ),
        ("another limit: use --max-num-seqs", "--max-num-active-seqs"),
        (
            "a limit that moves; --long-prefill-token-threshold and --max-num-mixed-prefill-tokens stand",
            "--long-prefill-token-threshold-adaptive=off",
        ),
        (
            "admission by the first chunk; the whole prompt must fit",
            "--scheduler-reserve-full-isl=on",
        ),
        ("another reserve: 1% of the blocks is kept free", "--watermark=0.01"),
        ("a scheduler from outside: there is --scheduling-policy", "--scheduler-cls"),
    ),
    "Kernels and compilation": (
        (
            "compiled or captured graphs: nothing is compiled while serving",
            """--compilation-config,-cc={} --optimization-level,-O=0 --cudagraph-metrics=off
            --performance-mode=balanced""",
        ),
        ("nothing is compiled while serving", "--jit-monitor-mode=* --jit-monitor-verbose=any"),
        (
            "other kernels: they are chosen once, for the device; see --attention-backend",
            """--attention-config,-ac={} --kernel-config={} --ir-op-priority={} --linear-backend=auto
            --enable-flashinfer-autotune=off""",
        ),
        ("there is no cascade attention, in vLLM 0.32 neither", "--disable-cascade-attn=any"),
        (
            "a context that is cut to the window: windows are computed as the model has them",
            "--disable-sliding-window=off",
        ),
    ),
    "Sampling": (
        (
            "log-probabilities after penalties and temperature, or raw logits: they are the model's own",
            "--logprobs-mode=raw_logprobs",
        ),
        (
            "values in a file: --generation-config DIR reads DIR/generation_config.json",
            "--override-generation-config={}",
        ),
        ("another random generator", "--use-fp64-gumbel=off"),
        ("outputs that are given: not implemented", "--enable-trace-replay=off"),
        (
            "more to be returned than tokens and log-probabilities: not implemented",
            "--return-sampling-mask=off --aux-output-config={}",
        ),
        ("watermarks in the text: not implemented", "--watermark-config"),
        ("prompts that are embeddings: not implemented", "--enable-prompt-embeds=off"),
    ),
    "HTTP": (
        ("gRPC: not implemented", "--grpc=off --grpc-port"),
        (
            "code of yours in the server: put a proxy in front",
            "--middleware",
        ),
        ("a choice of ciphers: they are Python's, for TLS 1.2 and later", "--ssl-ciphers"),
        ("/docs loads nothing from elsewhere", "--enable-offline-docs=any"),
        ("/load always answers", "--enable-server-load-tracking=any"),
        ("comments in idle streams: not implemented", "--sse-keep-alive-interval=0"),
        (
            "prefill and decode apart: not implemented",
            "--tokens-only=off --enable-scale-out=off",
        ),
        (
            "Cohere's API of chats: not implemented",
            "--cohere-format=cmd4 --cohere-is-reasoning-model=on",
        ),
        (
            "a chat template that cannot do without thinking: `chat_template_kwargs` say so",
            "--anthropic-disabled-thinking-effort=auto",
        ),
    ),
    "Requests and answers": (
        (
            "another choice than the template's: whether it takes parts or text is read from it",
            "--chat-template-content-format=auto",
        ),
        ("usage always tells the cached tokens", "--enable-prompt-tokens-details=any"),
        (
            "vLLM's `metrics` object: usage has queue_ms, ttft_ms and more, always",
            "--enable-per-request-metrics=off",
        ),
        (
            "a fingerprint of your own: it is a hash of version, model, type and device",
            "--fingerprint-mode=full|hash --fingerprint-value",
        ),
        ("several threads for templates and tokens: there is one", "--renderer-num-workers=1"),
    ),
    "Logs and metrics": (
        (
            "one name: use --uvicorn-log-level, which sets the level of all logs",
            "--log-level",
        ),
        (
            "a configuration of Python's logging: there is --log-format text or json",
            "--logging-config={} --log-config-file",
        ),
        (
            "texts in the log: neither prompts nor outputs are ever logged",
            "--enable-log-outputs=off",
        ),
        ("neither prompts nor outputs are ever logged", "--max-log-len=* --enable-log-deltas=any"),
        (
            "stacks of refusals: failures of the server always have theirs in the log",
            "--log-error-stack=off",
        ),
        (
            "traces: not implemented",
            """--otlp-traces-endpoint --collect-detailed-traces+ --enable-layerwise-nvtx-tracing=off
            --profiler-config={}""",
        ),
        (
            "a log of every step: --record-steps FILE writes one",
            "--enable-logging-iteration-details=off",
        ),
        (
            "metrics that are not there; docs/api.md has those that are",
            """--kv-cache-metrics=off --kv-cache-metrics-sample=0.01
            --custom-histogram-buckets --enable-mfu-metrics=off""",
        ),
        (
            "a check of VLLM_ variables: only VLLM_API_KEY is read",
            "--fail-on-environ-validation=off",
        ),
    ),
}


def _flag(row: str, why: str) -> VllmFlag:
    match = _ROW.fullmatch(row)
    if match is None:
        raise ValueError(f"{row!r} is no row of the table of vLLM's flags")
    served = match["served"]
    return VllmFlag(
        name=match["name"],
        short=match["short"] and match["short"][1:],
        nargs=match["many"],
        switch=_SWITCH.get(served or "", ()),
        values=() if served is None or served in _SWITCH else tuple(served.split("|")),
        why=why,
    )


VLLM_FLAGS: dict[str, tuple[tuple[VllmFlag, ...], ...]] = {
    topic: tuple(tuple(_flag(row, why) for row in rows.split()) for why, rows in groups)
    for topic, groups in _TABLE.items()
}
"""topic → groups of flags that share a reason."""

BY_NAME: dict[str, VllmFlag] = {
    name: flag for groups in VLLM_FLAGS.values() for group in groups for flag in group for name in flag.names
}

THEIR_DEFAULTS: dict[str, str] = {
    "--model": "Qwen/Qwen3-0.6B",
    "--seed": "0",
    "--gpu-memory-utilization": "0.92",
    "--shutdown-timeout": "0",
    "--enable-request-id-headers": "off",
}
"""Flags that both have, whose defaults differ → vLLM's."""

OTHERWISE_HERE = frozenset(["--watermark", "--optimization-level"])
"""Flags of the table whose default in vLLM is not what happens here; given explicitly, they are refused."""
