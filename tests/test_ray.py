"""The callable for Ray Data: by itself, and in a Ray of this machine where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.ray import Generate

SETTINGS: dict[str, Any] = {
    "model": "demo",
    "sampling": {"max_tokens": 4, "temperature": 0},
    "kv_cache_memory_bytes": 8 << 20,
    "threads": 1,
}


def test_columns_in_and_columns_out() -> None:
    generate = Generate(**SETTINGS)
    made = generate({"prompt": ["A Pod is", "", "A Pod is"], "id": [1, 2, 3]})
    assert made["id"] == [1, 2, 3]
    first, empty, again = made["text"]
    assert first == again != ""
    assert empty == ""
    assert [bool(each) for each in made["error"]] == [False, True, False]
    assert made["completion_tokens"] == [4, 0, 4]
    assert made["finish_reason"] == ["length", "", "length"]
    with pytest.raises(KeyError, match=r"no column 'prompt'; there are id\."):
        generate({"id": [1]})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own settings are
def test_a_local_ray() -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray has no data")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    try:
        rows = ray.data.from_items([{"prompt": "A Pod is", "id": i} for i in range(4)])
        done = rows.map_batches(
            Generate, fn_constructor_kwargs=SETTINGS, batch_size=2, compute=ray.data.ActorPoolStrategy(size=1)
        ).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["id"] for row in done) == [0, 1, 2, 3]
    assert len({row["text"] for row in done}) == 1
    assert all(row["text"] and not row["error"] for row in done)
