"""Typed objects and their text."""

from __future__ import annotations

import json

import pytest
import yaml

from penstock.deploy.objects import Metadata, Object, dump, dump_all, to_plain
from penstock.deploy.objects.kinds import IngressRule, PolicyPeer
from penstock.deploy.objects.pod import EmptyDir, LabelSelector, Volume


def test_a_misspelt_field_does_not_come_into_being() -> None:
    with pytest.raises(TypeError, match="sizeLimit"):
        EmptyDir(sizeLimit="1Gi")  # type: ignore[call-arg]


def test_defaults_are_left_out_and_empty_parts_stay() -> None:
    assert Volume(name="tmp", empty_dir=EmptyDir()).to_dict() == {"name": "tmp", "emptyDir": {}}
    rule = IngressRule(from_=(PolicyPeer(pod_selector=LabelSelector()),))
    assert rule.to_dict() == {"from": [{"podSelector": {}}]}


def test_an_object_has_kind_metadata_and_body_in_this_order() -> None:
    meta = Metadata(name="x", namespace="n")
    made = Object(api_version="v1", kind="ConfigMap", metadata=meta, body={"data": {"a": "1"}})
    assert list(made.to_dict()) == ["apiVersion", "kind", "metadata", "data"]
    assert made.key == ("v1", "ConfigMap", "x")
    assert to_plain({"parts": (EmptyDir(medium="Memory"),)}) == {"parts": [{"medium": "Memory"}]}


TEXTS = ["1e3", "0x1f", "0o7", "on", "off", "yes", "null", "~", "1:30", "12", "1.5", ".5", "1_000"]
MORE = ["a: b", "#", "", "line\nline\n", " trailing \n", "two\n\nparas", "{{ x }}", "- a", "'", '"']


@pytest.mark.parametrize("text", [*TEXTS, *MORE])
def test_texts_stay_texts_for_every_reader(text: str) -> None:
    written = dump({"key": text, text or "empty": 1})
    assert yaml.safe_load(written)["key"] == text
    if text in TEXTS:
        # a reader of YAML 1.2, or Go's, would take it for a number or a truth without quotes
        assert f"key: {text}\n" not in written


def test_documents_have_a_head_and_are_the_same_every_time() -> None:
    documents = [{"b": 1, "a": [1, {"c": None}]}, {"d": {}}]
    text = dump_all(documents, "made from x\n\nby y")
    assert text.startswith("# made from x\n#\n# by y\n")
    assert list(yaml.safe_load_all(text)) == documents
    assert text == dump_all(json.loads(json.dumps(documents)), "made from x\n\nby y")
    assert text.index("b: 1") < text.index("a:"), "keys keep their order"
    shared = {"x": 1}
    assert "&" not in dump({"one": shared, "two": shared})
