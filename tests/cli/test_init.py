"""`penstock init`, and the example that it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.cli.init import example
from penstock.cli.main import main
from penstock.cli.spec_page import render
from penstock.deploy.bundle import objects
from penstock.deploy.resolve import resolve
from penstock.spec import load, loads


def test_it_writes_an_example_that_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "penstock.yaml"
    assert main(["init", str(file)]) == 0
    assert f"penstock up {file}" in capsys.readouterr().out
    spec = load(file)
    assert spec.models["demo"].weights == "demo"
    assert spec.gateway.host == "127.0.0.1"


def test_it_writes_penstock_yaml_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert (tmp_path / "penstock.yaml").read_text() == example()


def test_it_never_writes_over_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text("mine")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere")
    for name in ("penstock.yaml", "link.yaml"):
        assert main(["init", str(tmp_path / name)]) == 2
        assert "is there already" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "missing" / "penstock.yaml")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_what_is_switched_off_in_the_example_is_right_too() -> None:
    text = re.sub(r"(?m)^#(?=[a-z_]+:|  +\S)", "", example())
    assert text != example()
    spec = loads(text)
    assert spec.models["demo"].keep_alive == 600
    assert spec.routes["assistant"].fallback[0].upstream == "cloud"
    assert spec.tags["feature"]["search"].limits.dollars_per_month == 20 * 10**9
    made = {each.kind for each in objects(resolve(spec))}
    assert made >= {"Job", "PersistentVolumeClaim", "Ingress", "PrometheusRule", "ScaledObject"}


def test_compiled_as_it_is_it_gives_all_that_a_service_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of the demo model are in the image: only they are not fetched."""
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert main(["compile", "penstock.yaml", "-o", "bundle"]) == 0
    kinds = set(
        re.findall(r"(?m)^kind: (\w+)", "".join(p.read_text() for p in Path("bundle").glob("*.yaml")))
    )
    assert kinds >= {
        *("Namespace", "ServiceAccount", "ConfigMap", "PersistentVolumeClaim", "Deployment", "Service"),
        *(
            "Ingress",
            "NetworkPolicy",
            "PodDisruptionBudget",
            "ServiceMonitor",
            "PrometheusRule",
            "ScaledObject",
        ),
    }
    assert main(["check", "--strict", "penstock.yaml", "bundle"]) == 0, capsys.readouterr().out


def test_the_page_of_the_spec_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "spec.md"
    assert page.read_text() == render(), "python -m penstock.cli.spec_page > docs/spec.md"
