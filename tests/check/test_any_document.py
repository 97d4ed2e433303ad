"""No document breaks the rules on Compose, agents, CI and penstock.yaml, whatever stands where."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .finding import of

KEYS = st.sampled_from(
    "services image command entrypoint environment ports shm_size ipc volumes tmpfs env_file env name value "
    "args jobs steps run script extraArgs model temperature max_tokens max_turns tools agent agents num_ctx "
    "messages max-model-len tensor-parallel-size gpu-memory-utilization served-model-name version pools "
    "models upstreams routes teams tags limits gateway cluster hardware mig count weights pool "
    "engine flags targets "
    "fallback url price_per_hour time_slicing quantization devices host entry feature body".split()
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 200_000),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        "vllm/vllm-openai:latest a sh -c 'vllm serve m --swap-space 4' --max-model-len=8K gpu A100-80GB "
        "3g.40gb x Qwen/Qwen3-32B int8 0.0.0.0 8000:8000 MAX_NUM_SEQS=32 $X https://x 1".split(" ")
    ),
    st.text(max_size=8),
)
DOCUMENTS = st.recursive(
    VALUES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=6)),
    max_leaves=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(KEYS, DOCUMENTS, max_size=6),
    st.sampled_from(["compose.yaml", "penstock.yaml", "agent.json", "ci.yaml"]),
)
def test_no_document_breaks_the_checker(data: dict[str, Any], path: str) -> None:
    for finding in of(json.dumps(data, ensure_ascii=True, indent=1), path):  # JSON is YAML, too
        assert finding.line >= 1
        assert finding.column >= 1
