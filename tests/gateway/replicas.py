"""A gateway in front of replicas whose connections break, and what a client reads of a stream."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from penstock.gateway.policy.health import Health
from penstock.gateway.records import Principal, Row
from penstock.spec.load import loads
from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine

from .conftest import CHAT, KEY, Gateway
from .cutter import Cut, Cutter
from .test_bills import started

COMPLETIONS = "/v1/completions"
SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours:
    url: {url}/v1
    urls: [{urls}]
    kind: penstock
    pool: box
    trusts_gateway: true
    api_key_env: CLOUD_KEY
    timeout_idle: {idle}
    models: {{tiny: {{context: 2048}}}}
  other: {{url: "{fallback}", kind: penstock, models: {{tiny: {{context: 2048}}}}}}
routes:
  small:
    targets: [{{model: tiny, upstream: ours}}]
    fallback: [{{model: tiny, upstream: other}}]
    retries: {retries}
"""


@dataclass
class Seen:
    """A stream, as a client reads it."""

    text: str = ""
    roles: list[str] = field(default_factory=list)
    heads: set[str] = field(default_factory=set)
    finish: list[str] = field(default_factory=list)
    usages: list[dict[str, Any]] = field(default_factory=list)
    continuous: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    done: bool = False

    @classmethod
    def of(cls, body: bytes) -> Seen:
        """Read strictly: whole events, nothing after the end, no comments."""
        seen = cls()
        assert body.endswith(b"\n\n")
        for event in body[:-2].split(b"\n\n"):
            assert not seen.done
            assert seen.error is None
            assert event.startswith(b"data: "), event
            assert b"\n" not in event
            if event == b"data: [DONE]":
                seen.done = True
                continue
            seen._take(json.loads(event[6:]))
        return seen

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]
            return
        names = ("id", "object", "created", "model", "system_fingerprint")
        self.heads.add(json.dumps([chunk[name] for name in names]))
        usage = chunk.get("usage")
        if not chunk["choices"]:
            self.usages.append(usage)
            return
        if usage is not None:
            self.continuous.append(usage["completion_tokens"])
        (choice,) = chunk["choices"]
        assert not self.finish, "after the end"
        delta = choice.get("delta", {"content": choice.get("text")})
        if "role" in delta:
            self.roles.append(delta["role"])
        self.text += delta["content"]
        if choice["finish_reason"] is not None:
            self.finish.append(choice["finish_reason"])


class World:
    """Replicas behind connections that break, the first of which is asked first, and one of another model."""

    def __init__(
        self,
        servers: list[LiveServer],
        cutters: list[Cutter],
        fallback: str,
        *,
        retries: int = 2,
        idle: float = 0.3,
    ) -> None:
        """Nothing is asked yet. servers: what stands behind the cutters, where that is in this process."""
        self.servers = servers
        self.cutters = cutters
        self.cutter = cutters[0]
        more = ", ".join(f"{each.url}/v1" for each in cutters[1:])
        spec = SPEC.format(url=self.cutter.url, urls=more, fallback=fallback, retries=retries, idle=idle)
        self.gateway = Gateway(loads(spec), [], {KEY: Principal(key_id="k1")})
        for station in self.gateway.stations.all()[1:]:
            station.in_flight = 1  # so that the first one is asked first
        started(self.gateway)

    def ask(self, body: dict[str, Any], *cuts: Cut, path: str = "") -> tuple[Seen, Row]:
        """A stream whose first attempts are cut so, and its row."""
        gateway = self.gateway
        for station in gateway.stations.all():
            station.health = Health()
        for cutter in self.cutters:
            cutter.plan, cutter.cuts = [], 0
        for number, cut in enumerate(cuts):
            self.cutters[number % len(self.cutters)].plan.append(cut)
        before = len(gateway.meter.rows)
        answer = gateway.post(self.body(body), path or (CHAT if "messages" in body else COMPLETIONS))
        assert answer.status == 200, answer.body
        return Seen.of(answer.body), gateway.rows(before + 1)[-1]

    def wait_for(self, engine: FakeEngine, tokens: int) -> None:
        """Until an engine has generated so many, and has paused."""
        self.gateway.wait_for(lambda: any(each.position == tokens for each in list(engine._running.values())))

    def stop(self) -> None:
        self.gateway.live.stop()

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": "small", "stream": True, "max_tokens": 100, **body}
