"""No object breaks the checker, whatever stands where; and what it reads is bounded."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from penstock.check import Options, check_sources, check_text, schemas
from penstock.check.sources import read_text

from .bundle import Bundle, found, options
from .test_traps import RIGHT

_OBJECTS = list(yaml.safe_load_all(RIGHT))
_JUNK: list[Any] = [
    None, 0, -1, 3.5, True, "", "x", "a: b", "10%", "$(X)", [], [1], [None], [[]], {}, {"a": 1},
    {"name": None}, 10**400, "1e999", float("inf"),
]  # fmt: skip


def _paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield from _paths(value, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_no_object_breaks_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        objects = copy.deepcopy(_OBJECTS)
        for _ in range(rng.choice([1, 2, 8])):
            target = rng.choice(objects)
            *way, last = rng.choice(list(_paths(target)))
            for key in way:
                target = target[key]
            target[last] = copy.deepcopy(rng.choice(_JUNK))
        text = "---\n".join(yaml.safe_dump(each, sort_keys=False) for each in objects)
        for finding in check_text(text, "x.yaml", Options()):
            assert 1 <= finding.line <= text.count("\n") + 1
            assert finding.what


def test_json_and_yaml_give_the_same() -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": _OBJECTS}, indent=2)
    of_json = {(each.rule.id, each.what) for each in check_text(text, "x.json", options())}
    assert of_json == {(each.rule.id, each.what) for each in check_text(RIGHT, "x.yaml", options())}


def test_comments_pass_findings_by() -> None:
    broken = RIGHT.replace(":v0.32.0", ":latest").replace("minAvailable: 1", "minAvailable: 9")
    told = {each.rule.id for each in check_text(broken, "x.yaml", options())}
    assert {"image-latest", "pdb-blocks-drain"} <= told
    noted = broken.replace(":latest", ":latest  # penstock: ignore[image-latest] a demo").replace(
        "minAvailable: 9", "# penstock: ignore[pdb-blocks-drain] one node\n  minAvailable: 9"
    )
    left = {each.rule.id for each in check_text(noted, "x.yaml", options())}
    assert left == told - {"image-latest", "pdb-blocks-drain"}


@pytest.mark.parametrize(
    ("comment", "rule"),
    [
        ("ignore[image-latest]", "ignore-reason"),
        ("ignore[image-lates] because", "ignore-unknown"),
        ("ignore[gpu-count] because", "ignore-unused"),
        ("ignore-file[gpu-count] because", "ignore-unused"),
    ],
)
def test_comments_are_looked_at_too(comment: str, rule: str) -> None:
    text = RIGHT.replace(":v0.32.0", f":latest  # penstock: {comment}")
    assert rule in {each.rule.id for each in check_text(text, "x.yaml", options())}


def test_a_comment_above_a_document_covers_it_whole() -> None:
    objects = RIGHT.replace("minAvailable: 1", "minAvailable: 9").replace(
        "---\napiVersion: policy/v1", "---\n# penstock: ignore[pdb-blocks-drain] known\napiVersion: policy/v1"
    )
    assert "pdb-blocks-drain" not in {each.rule.id for each in check_text(objects, "x.yaml", options())}
    everywhere = f"# penstock: ignore-file[image-latest] demo\n{RIGHT}".replace(":v0.32.0", ":latest")
    assert "image-latest" not in {each.rule.id for each in check_text(everywhere, "x.yaml", options())}


def test_without_the_schemas_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "_versions", lambda: ())
    found = check_text(RIGHT.replace("      containers:", "      containrs:"), "x.yaml", Options())
    notes = [each for each in found if each.rule.id == "schema-unchecked"]
    assert any("kubernetes-validate is not installed" in each.what for each in notes)
    assert "schema" not in {each.rule.id for each in found}
    assert "penstock[check]" in notes[0].rule.fix


def test_versions_of_kubernetes() -> None:
    assert schemas.chosen("1.33") == "1.33"
    assert schemas.chosen("v1.33.4") == "1.33"
    assert schemas.chosen("1.999") == schemas.version()
    for wrong in ("1.2", "new", "1"):
        with pytest.raises(ValueError, match=wrong):
            schemas.chosen(wrong)
    assert any(
        each.rule.id == "schema" and "Kubernetes 1.30" in each.what
        for each in check_text(
            RIGHT.replace("  strategy:", "  strtegy:"), "x.yaml", Options(kubernetes="1.30")
        )
    )


def test_definitions_among_the_objects_count() -> None:
    definition = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.example.com}
spec:
  group: example.com
  names: {kind: Thing, plural: things}
  scope: Namespaced
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              properties: {size: {type: integer}, port: {x-kubernetes-int-or-string: true}}
---
apiVersion: example.com/v1
kind: Thing
metadata: {name: a}
spec: {size: 1, port: http}
"""
    assert not check_text(definition, "x.yaml", Options())
    wrong = definition.replace("size: 1,", "size: one, sise: 2,")
    assert {each.what for each in check_text(wrong, "x.yaml", Options())} == {
        "spec.sise: there is no such field. Did you mean size?",
        "spec.size: one is no integer.",
    }
    old = definition.replace("example.com/v1\nkind: Thing", "example.com/v1beta1\nkind: Thing")
    assert [each.rule.id for each in check_text(old, "x.yaml", Options())] == ["kind-unknown"]


def test_patches_of_a_kustomization_are_parts() -> None:
    patch = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {replicas: 3}\n"
    kustomization = (
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\npatches: [{path: more.yaml}]\n"
    )
    alone = check_sources([read_text(patch, "o/more.yaml")])
    assert "schema" in {each.rule.id for each in alone}
    texts = [read_text(kustomization, "o/kustomization.yaml"), read_text(patch, "o/more.yaml")]
    assert not check_sources(texts)


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, 1])
def test_an_entry_of_a_configmap_that_is_no_text_is_told(value: object) -> None:
    bundle = Bundle("hub")  # with a gateway, whose file is looked for among the entries of all
    bundle.get("ConfigMap", "chat-arguments")["data"]["ENGINE_DEVICE"] = value
    assert "schema" in {each.rule.id for each in found(bundle.text())}
