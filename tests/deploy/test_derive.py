"""The gateway's own penstock.yaml."""

from __future__ import annotations

import pytest

from penstock.deploy import readme
from penstock.deploy.derive import derived, plain_spec
from penstock.deploy.objects import dump
from penstock.deploy.resolve import resolve
from penstock.spec import SpecError, loads

from .matrix import SPECS, bundle_of

every = pytest.mark.parametrize("name", SPECS)


@every
def test_a_spec_that_is_written_down_reads_the_same(name: str) -> None:
    spec = bundle_of(name).spec
    assert loads(dump(plain_spec(spec))) == spec


def test_money_is_exact() -> None:
    text = """
pools: {a: {price_per_hour: "0.000000001"}, b: {price_per_hour: 12}, c: {price_per_hour: 3.67}}
models: {m: {weights: demo, pool: a}}
teams: {t: {limits: {dollars_per_day: "123456789.123456789"}}}
"""
    spec = loads(text)
    assert loads(dump(plain_spec(spec))) == spec


@every
def test_the_loader_takes_it_and_engines_are_upstreams(name: str) -> None:
    bundle = bundle_of(name)
    spec = loads(derived(bundle))
    assert not spec.models
    assert not spec.jobs
    for model, slug in bundle.slugs.items():
        upstream = spec.upstreams[slug]
        workload = bundle.of(slug)[0]
        assert upstream.url == f"http://{slug}.{bundle.namespace}.svc:8000"
        assert upstream.discover, "each pod is a replica: its cache, its queue and its health are its own"
        assert upstream.kind == workload.engine
        assert upstream.api_key_env == "PENSTOCK_ENGINE_KEY"
        assert upstream.trusts_gateway == (workload.engine == "penstock")
        assert upstream.in_house, "its pool is ours, so local_only reaches it"
        assert upstream.models[model].context == workload.max_model_len
        assert upstream.devices == bundle.spec.models[model].devices
    assert spec.gateway.host == "0.0.0.0"
    assert spec.ledger.spool.startswith("/var/lib/penstock/")
    assert spec.teams == bundle.spec.teams
    assert spec.limits == bundle.spec.limits
    assert spec.pools == bundle.spec.pools, "with their prices"


def test_routes_lead_to_the_engines_and_models_keep_their_names() -> None:
    spec = loads(derived(bundle_of("hub")))
    assistant = spec.routes["assistant"]
    assert assistant.targets[0].upstream == "qwen3-8b"
    assert assistant.fallback[0].upstream == "cloud"
    assert assistant.shadow[0].upstream == "qwen3-vl"
    assert assistant.escalate is not None
    assert assistant.escalate.to[0].upstream == "cloud"
    assert assistant.max_tokens == bundle_of("hub").spec.routes["assistant"].max_tokens
    assert spec.routes["BAAI/bge-m3"].targets[0].model == "BAAI/bge-m3"
    assert spec.routes["BAAI/bge-m3"].targets[0].upstream == "baai-bge-m3"


@every
def test_no_key_is_printed_where_logs_are_kept(name: str) -> None:
    assert not loads(derived(bundle_of(name))).gateway.first_key
    assert "kubectl -n" in (text := readme.text(bundle_of(name), "plain", "penstock.yaml"))
    assert "penstock keys create --spec /etc/penstock/penstock.yaml" in text
    assert " logs " not in text


def test_the_ledger_is_where_pods_can_write() -> None:
    assert loads(derived(bundle_of("init"))).ledger.url == "sqlite:////var/lib/penstock/penstock.db"
    assert loads(derived(bundle_of("hub"))).ledger.url == bundle_of("hub").spec.ledger.url


def test_what_is_of_this_machine_is_left_out() -> None:
    """Certificates are the entry's matter, and an address is the pod's."""
    text = """
pools: {here: {}}
models: {m: {weights: demo, pool: here}}
gateway:
  {host: 10.1.2.3, port: 9000, ssl_certfile: a.pem, ssl_keyfile: b.pem, admin: {key_env: K, port: 9001}}
"""
    spec = loads(derived(resolve(loads(text))))
    assert spec.gateway.ssl_certfile is None
    assert (spec.gateway.host, spec.gateway.port) == ("0.0.0.0", 9000)
    assert spec.gateway.admin is not None
    assert spec.gateway.admin.host == "0.0.0.0"


def test_an_upstream_of_the_same_name_stays_what_it_is() -> None:
    text = """
pools: {here: {}}
models: {m: {weights: demo, pool: here}}
upstreams: {m: {url: "https://api.example.com", models: {x: {}}}}
routes: {m: {targets: [{model: m}], fallback: [{model: x, upstream: m}]}}
"""
    spec = loads(derived(resolve(loads(text))))
    assert spec.upstreams["m"].url == "https://api.example.com"
    assert spec.routes["m"].targets[0].upstream == "engines-m"


def test_what_the_loader_would_refuse_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.deploy import derive

    monkeypatch.setattr(derive, "_engines", lambda *_: {"demo": {"url": "no url", "models": {"demo": {}}}})
    with pytest.raises(SpecError, match="the gateway's penstock"):
        derived(bundle_of("init"))
