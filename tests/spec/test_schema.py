"""The JSON Schema says what the models say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from penstock.cli.init import example
from penstock.cli.main import main
from penstock.spec import SpecError, loads
from penstock.spec.schema import schema

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator() -> Any:
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """As editors read YAML: dates are texts."""


_Loader.yaml_implicit_resolvers = {
    key: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def accepted(text: str) -> bool:
    try:
        loads(text)
    except SpecError:
        return False
    return True


MODEL = "pools: {here: {}}\nmodels: {m: {weights: demo, pool: here, %s}}"
PRICE = (
    "upstreams: {c: {url: 'http://c', models: "
    "{m: {price: {input: %s, output: 1, as_of: 2026-01-01, source: x}}}}}"
)


@pytest.mark.parametrize(
    "text",
    [
        example(),
        *(MODEL % f"memory: {size}" for size in ("1", "40GiB", "1.5 GB", "-1", "1.5", "lots")),
        *(MODEL % f"start: lazy, keep_alive: {time}" for time in ("5", "0.5", "10m", "-1", "soon", "1 week")),
        *(PRICE % price for price in ("1", "0.25", "$1.50", "-1", "cheap", "[1]")),
        MODEL % "replicas: 0",
        MODEL % "replica: 1",
        MODEL % "engine: tgi",
        MODEL % "flags: {max-num-seqs: 64, x: [1], y: {z: true}}",
        MODEL % "flags: {-x: 1}",
        "version: 2",
        "routes: {r: {targets: []}}",
        "gateway: {port: 65536}",
        "gateway: {hooks: [{when: before, url: 'http://x', timeout: 100ms}]}",
        "teams: {a: {limits: {dollars_per_day: 5, gpu_hours_per_day: 0.5}}}",
    ],
)
def test_it_accepts_what_the_models_accept(validator: Any, text: str) -> None:
    assert validator.is_valid(yaml.load(text, _Loader)) == accepted(text)


def test_every_setting_is_described(validator: Any) -> None:
    bare = [
        f"{part}.{name}"
        for part, shape in schema()["$defs"].items()
        for name, field in shape["properties"].items()
        if "description" not in field
    ]
    assert bare == []


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
