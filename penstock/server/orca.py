"""The engine's load in the header of an answer, for gateways that balance by it (ORCA).

    endpoint-load-metrics-format: TEXT ─▶ endpoint-load-metrics: TEXT named_metrics.kv_cache_usage_perc=0.0, …
                                  JSON ─▶                        JSON {"named_metrics": {…}}

Names and forms are vLLM 0.32's (`orca_metrics.py`), which gives them with whole answers; here streams have
them, too. The report is xds.data.orca.v3.OrcaLoadReport.
"""

from __future__ import annotations

import json

from starlette.types import Message, Scope, Send

from penstock.http.exchange import header

from .state import State


def with_load(state: State, scope: Scope, send: Send) -> Send:
    """`send`, which adds the header to a 200 where the request asks for it."""
    wanted = (header(scope, b"endpoint-load-metrics-format") or "").strip().lower()
    if wanted not in ("text", "json"):
        return send

    async def reporting(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            message["headers"].append((b"endpoint-load-metrics", _report(state, wanted).encode()))
        await send(message)

    return reporting


def _report(state: State, form: str) -> str:
    stats = state.engine.stats
    load = {"num_requests_waiting": float(stats.waiting), "kv_cache_usage_perc": float(stats.kv_usage)}
    if form == "json":
        return f"JSON {json.dumps({'named_metrics': load})}"
    return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in load.items())
