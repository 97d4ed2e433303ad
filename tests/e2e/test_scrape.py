"""A real Prometheus scrapes a real engine and a real gateway; what is compiled asks for what they export.

engine (demo, CPU) ─┐
                    ├─ /metrics ◀─ Prometheus ◀─ rules, dashboards and scalers of a compiled bundle
gateway ────────────┘
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.observe import foreign
from penstock.observe.gateway_names import METRICS as GATEWAY
from penstock.observe.names import METRICS
from tests.deploy.monitoring import specs
from tests.e2e.server import serving
from tests.gateway.local.processes import eventually
from tests.gateway.process import gateway
from tests.ports import free_port

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (package prometheus)"),
]

SPEC = """
gateway: {{port: 0}}
pools: {{here: {{hardware: cpu, price_per_hour: 1.0}}}}
upstreams:
  engine: {{url: "{engine}", kind: penstock, pool: here, models: {{demo: {{}}}}}}
routes:
  chat: {{targets: [{{model: demo, upstream: engine}}]}}
teams: {{search: {{limits: {{dollars_per_day: 24}}}}}}
"""
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.json]
scrape_configs:
- job_name: chat
  static_configs: [{{targets: ["{engine}"], labels: {{namespace: llm-serving, pod: chat-0}}}}]
- job_name: gateway
  static_configs: [{{targets: ["{gateway}"], labels: {{namespace: llm-serving, pod: gateway-0}}}}]
"""


@dataclass
class Prometheus:
    """A Prometheus with both as its targets, after a few requests."""

    url: str

    def get(self, path: str, **query: str) -> Any:
        """The `data` of an answer of its API."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def ask(self, query: str) -> list[Any]:
        """The elements of a result."""
        found = self.get("query", query=query)
        return list(found["result"]) if found["resultType"] == "vector" else [found["result"]]

    def exported(self) -> set[str]:
        """Names that the targets declare, with or without series yet."""
        return {each["metric"] for each in self.get("targets/metadata", match_target='{job=~"chat|gateway"}')}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("scrape")
    flags = ("demo", "--dtype", "float32", "--kv-cache-memory-bytes", "32MiB", "--max-model-len", "512")
    with serving(*flags, log=folder / "engine.log") as engine:
        spec = SPEC.format(engine=engine.url)
        with gateway(folder, spec) as process:
            _, key = process.new_key(team="search")
            for _ in range(3):
                answer = process.post(
                    "/v1/chat/completions",
                    {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
                    key=key,
                )
                assert answer.status == 200, answer
            with _prometheus(folder, engine.url, f"http://127.0.0.1:{process.port}") as found:
                yield found


class _prometheus:
    """The process, for the length of a with block."""

    def __init__(self, folder: Path, engine: str, gateway: str) -> None:
        (folder / "rules.json").write_text(json.dumps(specs.rules()))
        targets = {"engine": engine.removeprefix("http://"), "gateway": gateway.removeprefix("http://")}
        (folder / "prometheus.yml").write_text(CONFIG.format(**targets))
        address = f"127.0.0.1:{free_port()}"
        assert PROMETHEUS is not None
        self.found = Prometheus(f"http://{address}")
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [PROMETHEUS, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
                 f"--web.listen-address={address}", "--log.level=warn"],
                cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Prometheus:
        eventually(lambda: self.process.poll() is not None or _answers(self.found.url), 30)
        assert self.process.poll() is None
        # two scrapes of each, so that there are rates
        eventually(lambda: len(self.found.ask("count_over_time(up[1m]) > 2 and up == 1")) == 2, 60)
        eventually(lambda: bool(self.found.ask("penstock:gateway_team_dollars_total")), 30)
        return self.found

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def test_every_name_that_is_exported_stands_in_a_table(prometheus: Prometheus) -> None:
    names = prometheus.get("label/__name__/values", **{"match[]": '{job=~"chat|gateway"}'})
    assert len(names) > 80
    assert [name for name in names if foreign.find(name) is None] == []


def test_every_name_of_the_tables_is_exported(prometheus: Prometheus) -> None:
    """With its kind, whether it has series yet or not."""
    declared = {
        each["metric"]: each["type"]
        for each in prometheus.get("targets/metadata", match_target='{job=~"chat|gateway"}')
    }
    for metric in (*METRICS, *GATEWAY):
        # the text format has counters with their suffix
        name = metric.series()[0] if metric.kind == "counter" else metric.name
        assert declared.get(name) == metric.kind, name


def test_labels_are_those_of_the_tables(prometheus: Prometheus) -> None:
    for series in prometheus.get("series", **{"match[]": '{job=~"chat|gateway"}'}):
        known = foreign.find(series["__name__"])
        assert known is not None
        wrong = [label for label in series if not known.may_have(label)]
        assert not wrong, (series["__name__"], wrong)


def _queries() -> list[tuple[str, str]]:
    """(where, query) of everything that is compiled for our engine; Grafana's variables filled in."""
    promql = pytest.importorskip("penstock.check.promql")
    if not promql.available():
        pytest.skip("promql-parser is not installed (penstock[check])")
    from penstock.check.metrics_texts import expressions
    from penstock.check.sources import read_text

    found = []
    for scaler in ("keda", "hpa"):
        texts = [json.dumps(each) for each in specs.compiled("penstock", scaler)]
        texts += [json.dumps(specs.monitoring.scaling.adapter_values(specs.bundle("penstock", scaler)))]
        for text in texts:
            for document in read_text(text, "x.json").documents:
                for each in expressions(document):
                    filled = promql.fill(each.text).replace('"$namespace"', '"llm-serving"')
                    found.append((f"{each.use} {each.name}", re.sub(r'"\$\w+"', '".*"', filled)))
    return found


def test_every_name_that_is_asked_for_is_exported_or_foreign(prometheus: Prometheus) -> None:
    from penstock.check import promql

    exported = prometheus.exported()
    ours = {series for metric in (*METRICS, *GATEWAY) for series in metric.series()}
    queries = _queries()
    assert len(queries) > 150
    asked = {selector.name for _, query in queries for selector in promql.parse(query).selectors}
    assert len(asked & ours) > 30
    for name in asked:
        known = foreign.find(name)
        assert known is not None, name
        if name in ours:
            whole = known.metric if known.part != "_total" else name
            assert whole in exported, name
        else:
            assert not name.startswith(("vllm:", "penstock:")), name


def test_prometheus_takes_every_query(prometheus: Prometheus) -> None:
    answered = set()
    for where, query in _queries():
        if prometheus.ask(query):
            answered.add(where)
    # of the engine and the gateway, in which something has happened
    for where in ("panel Generated tokens", "panel Whole answer", "panel By route and upstream",
                  "panel Dollars an hour, by team", "panel Device busy", "scaler waiting", "scaler occupancy",
                  "scaler cache", "adapter penstock_chat_waiting"):  # fmt: skip
        assert where in answered, where


def test_scalers_get_a_single_element(prometheus: Prometheus) -> None:
    for where, query in _queries():
        if where.startswith(("scaler", "adapter")):
            (element,) = prometheus.ask(query)
            assert element["metric"] == {}, where
            assert float(element["value"][1]) == 0  # nothing is under way


def test_rules_are_evaluated_and_nothing_fires_that_is_well(prometheus: Prometheus) -> None:
    def evaluated() -> bool:
        groups = prometheus.get("rules")["groups"]
        return all(rule["health"] == "ok" for group in groups for rule in group["rules"])

    eventually(evaluated, 30)
    firing = prometheus.ask('ALERTS{alertstate="firing"}')
    assert [each["metric"]["alertname"] for each in firing] == []
