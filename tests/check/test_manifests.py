"""The manifests of the source documents: the traps that the checklist names are found where they stand."""

from __future__ import annotations

import pytest

from penstock.check import check

from .bundle import options, shared

TRAPS: dict[str, set[tuple[str, int]]] = {
    "001-alerts.yaml": {("metric-removed", 11)},  # T2
    "001-serving.yaml": {
        ("flag-unknown", 25),  # T1
        ("trust-remote-code", 30),  # T22
        ("rollout-deadlock", 6),  # T12
        ("startup-missing", 19),
        ("readiness-missing", 19),
        ("liveness-missing", 19),
        ("prestop-missing", 19),
        ("drain-missing", 22),
        ("spread-missing", 17),
        ("single-replica", 7),  # the HPA's least
        ("scaled-twice", 138),
        ("scaler-on-gpu-util", 114),  # T8
        ("scaler-average", 150),  # T7
        ("used-over-free", 158),  # T6
        ("scaler-on-memory", 158),
    },
    "003-serving.yaml": {
        ("selector-mismatch", 5),  # T11
        ("image-latest", 11),  # T22
        ("trust-remote-code", 13),
        ("rollout-deadlock", 5),  # T12
        ("prestop-kill", 23),  # T13
        ("drain-missing", 12),
        ("probe-progress", 28),  # T14
        ("readiness-delay", 30),  # T15
        ("startup-missing", 10),
        ("shm-missing", 10),
        ("weights-uncached", 12),
        ("resources-missing", 17),
        ("single-replica", 6),
    },
    "003-adapter-values.yaml": {("adapter-average", 10)},
    "004-demo.yaml": {
        ("image-latest", 18),
        ("weights-uncached", 19),
        ("single-replica", 7),
        ("readiness-missing", 17),
    },
    "004-multi-model.yaml": {
        ("selector-mismatch", 5),
        ("selector-mismatch", 22),
        ("shm-missing", 10),
        ("shm-missing", 27),
        ("weights-uncached", 11),
        ("pdb-missing", 1),
    },
    "004-serving.yaml": {
        ("monitor-selects-nothing", 76),  # T10
        ("monitor-port", 80),
        ("image-latest", 18),
        ("readiness-missing", 17),
        ("object-external", 40),
        ("object-external", 49),
    },
}
_NOT_HERE = {
    "001-alerts.yaml": {"drain-missing"},
    # eight GPUs or one, the manifests have as many ranks
    "004-multi-model.yaml": {"gpu-count", "tensor-parallel"},
    "001-serving.yaml": {
        "shm-missing",
        "weights-uncached",
        "service-port",
        "backend-missing",
        "entry-timeout",
    },
    "004-serving.yaml": {"shm-missing", "weights-uncached", "selector-mismatch", "service-selects-nothing"},
}
"""What is right there."""


@pytest.mark.parametrize("name", sorted(TRAPS))
def test_traps_of_the_source_documents(name: str) -> None:
    folder = shared("sources")
    if folder is None:
        pytest.skip("the source documents are not here")
    found = check([folder / "manifests" / name], options())
    places = {(each.rule.id, each.line) for each in found}
    assert TRAPS[name] <= places, sorted(TRAPS[name] - places) + sorted(places)
    assert not {rule for rule, _ in places} & _NOT_HERE.get(name, set())
    assert all(each.rule.why and (each.fix or each.rule.fix) for each in found)


def test_the_folder_is_one_cluster_and_nothing_is_told_twice() -> None:
    folder = shared("sources")
    if folder is None:
        pytest.skip("the source documents are not here")
    found = check([folder / "manifests"], options())
    assert len(found) == len({(each.rule.id, each.path, each.line, each.column, each.what) for each in found})
    assert "object-duplicate" not in {each.rule.id for each in found}
