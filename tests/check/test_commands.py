"""The traps T1, T5, T16, T17 and T22 wherever a command stands: shell, Compose, Markdown, images, units."""

from __future__ import annotations

import pytest

from penstock.check import commands
from penstock.check.finding import Word
from penstock.check.words import Place

from .finding import in_code, of, places, rules

SERVE = "vllm serve Qwen/Qwen3-8B --host 127.0.0.1 --max-model-len 8192"
RUN = "docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000"
IMAGE = "vllm/vllm-openai:v0.32.0"

TRAPS = [
    ("T1", f"{SERVE} --gpu-memory-utilisation 0.9", "flag-unknown"),
    ("T5", f"{SERVE} --num-scheduler-steps 8", "flag-removed"),
    ("T5", f"{SERVE} --swap-space 4", "flag-removed"),
    ("T16", "hey -z 60s -c 20 http://llm/v1/chat/completions", "load-test-get"),
    ("T17", f"{RUN} -e MAX_NUM_SEQS=32 {IMAGE} --model m --max-model-len 8192", "env-not-read"),
    ("T22", f"{SERVE} --trust-remote-code", "trust-remote-code"),
    ("T22", f"{RUN} vllm/vllm-openai:latest --model m --max-model-len 8192", "image-latest"),
]
CLEAN = [
    SERVE,
    f"{RUN} {IMAGE} --model m --max-model-len 8192 --max-num-seqs 32",
    "hey -m POST -T application/json -D body.json http://llm/v1/chat/completions",
    "hey -z 10s http://llm/health",
    "ab -p body.json -T application/json -n 10 http://llm/v1/completions",
    "wrk -t4 -c8 -d30s -s post.lua http://llm/v1/completions",
    'curl http://llm/v1/chat/completions -d \'{"model": "m", "messages": [], "max_tokens": 5}\'',
    "curl http://llm/metrics | grep vllm",
    "penstock serve demo --port 8000",
    "vllm serve --help=all",
    "penstock plan qwen3-8b --gpu L4 --rate 5",
    "pip install vllm",
    f"{SERVE} $EXTRA_ARGS",
    "vllm serve $MODEL --max-model-len $LEN --tensor-parallel-size ${TP} --uds /run/vllm.sock",
]


@pytest.mark.parametrize(("trap", "command", "rule"), TRAPS)
def test_traps_in_a_script(trap: str, command: str, rule: str) -> None:
    assert places(in_code(f"#!/bin/sh\nset -e\n{command}\n", "run.sh")) == {(rule, 3)}


@pytest.mark.parametrize(("trap", "command", "rule"), TRAPS)
def test_traps_in_markdown(trap: str, command: str, rule: str) -> None:
    text = f"# Serving\n\n1. Start it:\n\n   ```bash\n   {command}\n   ```\n"
    found = in_code(text, "README.md")
    assert places(found) == {(rule, 6)}
    assert all(each.column > 3 for each in found)


@pytest.mark.parametrize(("trap", "command", "rule"), TRAPS)
def test_traps_in_a_block_without_a_language(trap: str, command: str, rule: str) -> None:
    assert places(in_code(f"```\n{command}\n```\n", "README.md")) == {(rule, 2)}


@pytest.mark.parametrize(("trap", "command", "rule"), TRAPS)
def test_traps_in_plain_text(trap: str, command: str, rule: str) -> None:
    assert (rule, 2) in places(in_code(f"Then run\n{command}\nand wait.\n", "notes.txt"))


@pytest.mark.parametrize(("trap", "command", "rule"), TRAPS)
def test_traps_in_a_step_of_ci(trap: str, command: str, rule: str) -> None:
    text = f"jobs:\n  load:\n    steps:\n      - run: |\n          set -e\n          {command}\n"
    assert places(of(text, "ci.yaml")) == {(rule, 6)}


@pytest.mark.parametrize("command", CLEAN)
def test_what_is_right_is_not_flagged(command: str) -> None:
    assert in_code(command + "\n", "run.sh") == []
    assert in_code(f"```sh\n{command}\n```\n", "README.md") == []


def test_traps_in_compose() -> None:
    text = """\
services:
  llm:
    image: vllm/vllm-openai:latest
    environment:
      MAX_NUM_SEQS: 32
      HF_TOKEN: ${HF_TOKEN}
    command: >-
      --model Qwen/Qwen3-8B
      --gpu-memory-utilisation 0.9
      --num-scheduler-steps 8 --trust-remote-code
    ports: ["8000:8000"]
"""
    assert places(of(text, "compose.yaml")) >= {
        ("image-latest", 3),
        ("env-not-read", 5),
        ("flag-unknown", 9),
        ("flag-removed", 10),
        ("trust-remote-code", 10),
        ("engine-open", 11),
        ("shm-missing", 2),
    }


def test_compose_that_is_right() -> None:
    text = """\
services:
  llm:
    image: vllm/vllm-openai:v0.32.0
    shm_size: 8gb
    environment: [HF_TOKEN, "VLLM_API_KEY=${KEY}", MAX_NUM_SEQS=32]
    command: [--model, Qwen/Qwen3-8B, --max-model-len, "8192", "--max-num-seqs=${MAX_NUM_SEQS}"]
    ports: ["8000:8000"]
  db:
    image: postgres:17
    environment: {POSTGRES_PASSWORD_FILE: /run/secrets/db}
"""
    assert of(text, "compose.yaml") == []


def test_traps_in_a_dockerfile() -> None:
    text = """\
# syntax=docker/dockerfile:1
FROM vllm/vllm-openai:latest AS base
ENV MAX_NUM_SEQS=32 \\
    HF_HOME=/models
RUN apt-get update && \\
    # a comment that Docker takes away
    hey -z 5s http://llm/v1/chat/completions
CMD ["--model", "m", "--max-model-len", "8192", "--swap-space", "4"]

FROM base
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
CMD ["--model=m", "--max-model-len=8192", "--gpu-memory-utilisation=0.9"]
"""
    assert places(in_code(text, "Dockerfile")) == {
        ("image-latest", 2),
        ("env-not-read", 3),
        ("load-test-get", 7),
        ("flag-removed", 8),
        ("flag-unknown", 12),
    }


def test_traps_in_a_unit_of_systemd() -> None:
    text = """\
[Service]
Environment=VLLM_API_KEY=%d/key
ExecStart=/opt/vllm/bin/vllm serve Qwen/Qwen3-8B \\
    --max-model-len 8192 \\
    --num-scheduler-steps 8
"""
    assert places(in_code(text, "vllm.service")) == {("flag-removed", 5)}


def test_traps_in_a_fragment_of_yaml() -> None:
    """As the first source document has it: `env:` alone."""
    text = '```yaml\nenv:\n  - name: MAX_NUM_SEQS\n    value: "32"\n```\n'
    assert places(in_code(text, "notes.md")) == {("env-not-read", 3)}


def test_variables_that_the_arguments_use_are_read() -> None:
    text = "env:\n- name: MAX_NUM_SEQS\n  value: '32'\nargs: ['--max-num-seqs=$(MAX_NUM_SEQS)']\n"
    assert of(text, "values.yaml") == []


@pytest.mark.parametrize(
    "wrapped",
    [
        "sudo {}",
        "CUDA_VISIBLE_DEVICES=0,1 {}",
        "env A=b nohup {} > log 2>&1 &",
        "nice -n 15 {} | tee log",
        "timeout 600s {}",
        "exec {}",
        "uv run {}",
        "if true; then {}; fi",
        "for m in a b; do {} ; done",
        "( {} )",
        "x=$({})",
        "docker exec -it llm {}",
        "kubectl exec deploy/llm -- {}",
        "bash -c '{}'",
        'sh -ec "{}"',
        'docker run --shm-size 8g image:1 bash -c "{}"',
        "cat <<EOF | sh\nhello\nEOF\n{}",
    ],
)
def test_commands_are_found_behind_what_starts_them(wrapped: str) -> None:
    command = f"{SERVE} --max-num-sequences 8"
    (found,) = in_code(wrapped.format(command) + "\n", "run.sh")
    assert found.rule.id == "flag-unknown"
    assert found.fix == "Write --max-num-seqs."
    line = wrapped.format(command).split("\n")[found.line - 1]
    assert line[found.column - 1 :].startswith("--max-num-sequences")


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ("--gpu-memory-utilization 90", "flag-value"),
        ("--gpu-memory-utilization=0.9x", "flag-value"),
        ("--tensor-parallel-size 0", "flag-value"),
        ("-tp two", "flag-value"),
        ("--quantization int8", "flag-value"),
        ("-q int4", "flag-value"),
        ("--quantization none", "flag-value"),
        ("--quantization AWQ", "flag-value"),
        ("--quantization fbgemm_fp8", "flag-value"),
        ("--quantization bitsandbytes", "quantization-plugin"),
        ("--max-model-len many", "flag-value"),
        ("--max-model-len", "flag-no-value"),
        ("--max-model-len --enforce-eager", "flag-no-value"),
        ("--dtype fp7", "flag-value"),
        ("--max-num-batched-tokens 128 --max-num-seqs 256", "flag-value"),
        ("--max-model-len 131072", "context-just-in-case"),
        ("--max_model_len=128k", "context-just-in-case"),
        ("--tensor-parallel-size 3", "tensor-parallel-odd"),
        ("--max-num-seqs 8 --max-num-seqs 16", "flag-twice"),
        ("--no-enable-prefix-caching", "prefix-caching-off"),
        ("--api-key q7Zx81Lw", "key-in-text"),
        ("--hf-token hf_QwErTyUiOpAsDfGhJkLz12", "key-in-text"),
    ],
)
def test_values(flags: str, rule: str) -> None:
    command = f"vllm serve some/model --host 127.0.0.1 {flags}"
    assert rules(command, "run.sh") - {"context-unset"} == {rule}


@pytest.mark.parametrize(
    "flags",
    [
        "--gpu-memory-utilization 0.95 --max-model-len 32K -tp 8 --api-key $KEY",
        "--max-model-len auto --no-trust-remote-code -O3 --lora-modules a=b c=d",
        '--compilation-config.mode 3 --speculative-config \'{"model": "x"}\' --max-model-len -1',
        "--max-model-len 8192 --api-key YOUR_KEY --served-model-name a b c",
        "--config engine.yaml",
    ],
)
def test_values_that_are_right(flags: str) -> None:
    assert rules(f"vllm serve some/model --host 127.0.0.1 {flags}", "run.sh") == set()


def test_ranks_are_checked_against_the_model() -> None:
    """Qwen3-32B has 64 heads, Qwen2.5-7B has 28: 7 divides the latter."""
    base = "vllm serve {} --uds x --max-model-len 8192 --tensor-parallel-size {}"
    assert rules(base.format("Qwen/Qwen3-32B", 6), "run.sh") == {"tensor-parallel"}
    assert rules(base.format("Qwen/Qwen3-32B", 8), "run.sh") == set()
    assert rules(base.format("Qwen/Qwen2.5-7B-Instruct", 8), "run.sh") == {"tensor-parallel"}


@pytest.mark.parametrize(
    ("command", "open_"),
    [
        ("vllm serve m --max-model-len 8K", True),
        ("vllm serve m --max-model-len 8K --host 0.0.0.0", True),
        ("python -m vllm.entrypoints.openai.api_server --model m --max-model-len 8K", True),
        ("penstock serve demo --host 0.0.0.0", True),
        ("penstock serve demo", False),
        ("vllm serve m --max-model-len 8K --host 127.0.0.1", False),
        ("vllm serve m --max-model-len 8K --api-key $KEY", False),
        ("VLLM_API_KEY=$KEY vllm serve m --max-model-len 8K", False),
        ("export VLLM_API_KEY=$(cat key)\nvllm serve m --max-model-len 8K", False),
        (f"docker run --ipc=host -p 8000:8000 {IMAGE} --model m --max-model-len 8K", True),
        (f"docker run --ipc=host -p 127.0.0.1:8000:8000 {IMAGE} --model m --max-model-len 8K", False),
        (f"docker run --ipc=host {IMAGE} --model m --max-model-len 8K", False),
        (f"docker run --ipc=host -p 8000:8000 -e VLLM_API_KEY {IMAGE} --model m --max-model-len 8K", False),
    ],
)
def test_engines_without_a_key(command: str, open_: bool) -> None:
    assert rules(command, "run.sh") == ({"engine-open"} if open_ else set())


def test_a_pod_is_not_open_by_itself() -> None:
    words = [Word(text, 1, 1) for text in "vllm serve m --max-model-len 8192 --host 0.0.0.0".split()]
    assert list(commands.examine(words, "deployment.yaml")) == []
    assert [each.rule.id for each in commands.examine(words, "run.sh", place=Place.SHELL)] == ["engine-open"]


def test_arguments_of_an_image_without_a_program() -> None:
    words = [Word("--model", 4, 9), Word("m", 4, 18), Word("--gpu-memory-utilisation=0.9", 5, 9)]
    found = list(commands.examine(words, "deployment.yaml"))
    assert [(each.rule.id, each.line, each.column) for each in found] == [
        ("flag-unknown", 5, 9),
        ("context-unset", 4, 9),
    ]
    others = [Word("--config.file=/etc/prometheus.yml", 1, 1), Word("--web.enable-lifecycle", 2, 1)]
    assert list(commands.examine(others, "prometheus.yaml")) == []


@pytest.mark.parametrize(
    "command",
    [
        "hey http://llm/v1/completions",
        "hey -m POST http://llm/v1/completions",
        'hey -d \'{"prompt": "a"}\' http://llm/v1/completions',
        "oha -n 100 http://llm/v1/chat/completions",
        "wrk -t4 -c100 -d30s http://llm/v1/completions",
        "ab -n 100 -c 10 http://llm/v1/completions",
    ],
)
def test_load_tests_without_a_body(command: str) -> None:
    assert rules(command, "load.sh") == {"load-test-get"}


def test_what_curl_sends() -> None:
    url = "http://llm/v1/chat/completions"
    assert rules(f"curl {url}", "a.sh") == {"request-get"}
    assert rules(f'curl -sS {url} -d \'{{"model": "m"}}\'', "a.sh") == {"call-unbounded"}
    assert rules(f'curl -sSd \'{{"model": "m", "max_tokens": -1}}\' {url}', "a.sh") == {"call-unbounded"}
    assert rules(f"curl {url} --json @body.json", "a.sh") == set()
    assert rules(f"curl {url} -d '{{\"model\": \"'$MODEL'\"}}'", "a.sh") == {"call-unbounded"}
    assert rules(f"curl {url} -d '{{\"model\": '$MODEL'}}'", "a.sh") == set()  # not known
    assert rules('curl http://llm/v1/completions -d \'{"prompt": "a"}\'', "a.sh") == set()  # 16 tokens


def test_keys_are_found_wherever_they_stand() -> None:
    key = "sk-aB3dE5fG7hJ9kL1mN3pQ5rS7"
    for command in (f"curl -H 'Authorization: Bearer {key}' http://x", f"export OPENAI_API_KEY={key}"):
        (found,) = in_code(command, "a.sh")
        assert found.rule.id == "key-in-text"
        assert key not in found.what
    for harmless in (
        "sk-…",
        "sk-your-key-goes-here-please",
        "hf_YOUR_TOKEN_HERE",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    ):
        assert rules(f"export OPENAI_API_KEY={harmless}", "a.sh") == set()


def test_penstock_is_known_by_its_own_flags() -> None:
    found = in_code("penstock serve demo --max-modl-len 8\npenstock bench serv\npenstock plna\n", "a.sh")
    assert [(each.line, each.fix) for each in found] == [
        (1, "Write --max-model-len."),
        (3, "Write penstock plan."),
    ]


def test_charts_have_versions() -> None:
    assert rules("helm install gpu nvidia/gpu-operator --set x.tag=latest", "a.sh") == {
        "chart-unpinned",
        "image-latest",
    }
    assert rules("helm upgrade --install gpu nvidia/gpu-operator --version v24.6.2", "a.sh") == set()
    assert rules("helm install demo ./chart", "a.sh") == set()
    assert rules("helm install demo dist/chart -n x", "a.sh") == set()


def test_a_flag_that_is_only_mentioned_is_a_note() -> None:
    text = "vLLM: raise `--num-scheduler-steps` for batches; `--gpu-memory-utilisation` is a share.\n"
    assert places(in_code(text, "guide.md")) == {("flag-mentioned", 1)}
    assert in_code("vLLM has removed `--num-scheduler-steps`.\n", "guide.md") == []
    assert in_code("cargo build --num-scheduler-steps\n", "guide.md") == []


def test_a_command_in_the_text() -> None:
    assert in_code("Give `vllm serve --config` a file, or `penstock serve --port`.\n", "guide.md") == []
    text = "Put load on it (`hey -z 60s http://llm/v1/chat/completions`), or `vllm serve m --swap-space 4`.\n"
    assert [(each.rule.id, each.column) for each in in_code(text, "guide.md")][:1] == [("load-test-get", 18)]
    assert rules(text, "guide.md") == {"load-test-get", "flag-removed", "flag-mentioned"}


def test_traps_in_the_manifests_of_a_guide() -> None:
    text = """\
1. Apply it:

   ```yaml
   apiVersion: apps/v1
   kind: Deployment
   metadata: {name: llm}
   spec:
     template:
       spec:
         containers:
           - name: vllm
             image: vllm/vllm-openai:latest
             args:
               - --model=Qwen/Qwen3-8B
               - --gpu-memory-utilisation=0.9
               - --num-scheduler-steps=8
             env:
               - {name: MAX_NUM_SEQS, value: "32"}
   ```
"""
    found = in_code(text, "guide.md")
    assert places(found) == {
        ("image-latest", 12),
        ("context-unset", 14),
        ("flag-unknown", 15),
        ("flag-removed", 16),
        ("env-not-read", 18),
    }
    (unknown,) = [each for each in found if each.rule.id == "flag-unknown"]
    assert text.split("\n")[14][unknown.column - 1 :].startswith("--gpu-memory-utilisation")


def test_queries_in_a_guide() -> None:
    rule = "  - alert: B\n    expr: vllm:gpu_cache_usage_perc > 0.9\n"
    text = f"```yaml\ngroups:\n- name: a\n  rules:\n{rule}```\n"
    assert {line for _, line in places(in_code(text, "guide.md"))} == {6}


def test_flags_in_the_values_of_a_chart() -> None:
    text = """\
modelSpec:
  - name: chat
    vllmConfig:
      maxModelLen: 8192
      extraArgs: ["--gpu-memory-utilisation=0.9", "--swap-space", "4", "--max-num-seqs", "32"]
  - name: other
    extraArgs: ["--verbose"]
"""
    assert places(of(text, "values.yaml")) == {("flag-unknown", 5), ("flag-removed", 5)}


def test_containers_of_custom_resources_are_read() -> None:
    text = """\
apiVersion: serving.kserve.io/v1alpha2
kind: LLMInferenceService
metadata: {name: q}
spec:
  template:
    containers:
    - name: main
      image: vllm/vllm-openai:latest
      args: [--gpu-memory-utilisation=0.9, --trust-remote-code]
"""
    found = places(of(text, "a.yaml"))
    assert {("image-latest", 8), ("flag-unknown", 9), ("trust-remote-code", 9)} <= found


KSERVE = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: q}
spec:
  predictor:
    %s
    containers:
    - name: main
      image: vllm/vllm-openai:v0.32.0
      args: [--model, Qwen/Qwen3-32B, --max-model-len=8192%s]
      resources: {limits: {%s}}
"""


@pytest.mark.parametrize(
    ("more", "flags", "limits", "rule"),
    [
        ("minReplicas: 1", ", --tensor-parallel-size=4", "nvidia.com/gpu: 2", "gpu-count"),
        ("minReplicas: 1", ", --tensor-parallel-size=4", "nvidia.com/gpu: 4", None),
        ("minReplicas: 1", "", "nvidia.com/gpu: 2", None),  # its controller may say it
        ("workerSpec: {pipelineParallelSize: 2}", ", --tensor-parallel-size=4", "nvidia.com/gpu: 2", None),
        ("minReplicas: 1", ", --tensor-parallel-size=2", "nvidia.com/mig-3g.40gb: 2", "mig-parallel"),
        ("minReplicas: 1", "", "nvidia.com/mig-5g.50gb: 1", "mig-resource"),
        ("minReplicas: 1", "", "nvidia.com/gpu: 0.5", "device-requests"),
    ],
)
def test_devices_of_kserves_containers(more: str, flags: str, limits: str, rule: str | None) -> None:
    """Of what stands there; probes, /dev/shm and the rest are its controller's to fill in."""
    assert rules(KSERVE % (more, flags, limits), "a.yaml") - {"schema-unchecked"} == (
        {rule} if rule else set()
    )
