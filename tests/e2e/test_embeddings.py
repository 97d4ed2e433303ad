"""An encoder behind the gateway of `penstock up`: the official client, ranks, bills."""

from __future__ import annotations

import time
from pathlib import Path

import openai
import pytest

from tests.model.encoders import make_encoder, modules
from tests.test_offline_pooling import with_tokenizer

from .test_up import rows
from .up import running

SPEC = """
pools: {here: {price_per_hour: 3.6}}
models: {embed: {weights: %s, pool: here, flags: {dtype: float32}}}
gateway: {port: 0}
"""


@pytest.mark.slow
def test_embeddings_and_ranks_are_relayed_metered_and_priced(tmp_path: Path) -> None:
    model = tmp_path / "bert"
    model.mkdir()
    with_tokenizer(make_encoder(model, "bert", files=modules("mean", normalize=True)))
    with (
        running(tmp_path, SPEC % model) as up,
        openai.OpenAI(base_url=f"{up.url}/v1", api_key=up.key) as client,
    ):
        answer = client.embeddings.create(model="embed", input=["w1 w2", "w3"])
        assert [len(each.embedding) for each in answer.data] == [48, 48]
        assert sum(number * number for number in answer.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
        assert answer.usage.prompt_tokens == 7
        asks = {
            "/v2/rerank": {"query": "w1", "documents": ["w2", "w1"]},
            "/score": {"text_1": "w1", "text_2": "w1"},
            "/pooling": {"input": "w1", "task": "token_embed"},
            "/v2/embed": {"texts": ["w1", "w2"], "embedding_types": ["base64"]},
        }
        told = {path: up.post(path, {"model": "embed", **body}) for path, body in asks.items()}
        assert [status for status, _ in told.values()] == [200] * 4, told
        assert told["/v2/rerank"][1]["results"][0]["index"] == 1  # type: ignore[index]
        status, refused = up.post("/v1/chat/completions", {"model": "embed", "messages": []})
        assert status == 400, refused
        deadline = time.monotonic() + 5.0
        while len(rows(up)) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        paid = [row for row in rows(up) if row["status"] == 200]
        assert [(row["input_tokens"], row["output_tokens"]) for row in paid] == [
            (7, 0),
            (9, 0),
            (6, 0),
            (3, 0),
            (6, 0),
        ]
        assert all(row["settlement"] == "settled" and row["device_seconds"] for row in paid)
        for row in paid:
            assert row["dollars"] == pytest.approx(row["device_seconds"] / 1000, abs=1)  # type: ignore[operator]
