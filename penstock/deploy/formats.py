"""A bundle as files: path in the folder → text. Nothing is written here.

    plain       NN-part.yaml, for `kubectl apply -f DIR`
    kustomize   base/ with all parts; overlays/production/, which is yours from the first time on
    helm        a chart (helm.py)
    compose, systemd   one machine (penstock.deploy.machine)

Beside the objects: what goes elsewhere (values of charts, nodes' configuration) in folders of its own, which
`kubectl apply -f DIR` does not look into, and a README.md that says in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from penstock.core.errors import StartupError

from . import monitoring, operator, readme
from .bundle import groups
from .objects.base import Object
from .objects.yaml import dump_all
from .workloads import Bundle

Format = Literal["plain", "kustomize", "helm", "compose", "systemd"]
FORMATS: tuple[Format, ...] = get_args(Format)
Proxy = Literal["nginx", "envoy"]
OVERLAY = "overlays/production/kustomization.yaml"


def files(
    bundle: Bundle,
    format: Format,
    source: str = "penstock.yaml",
    proxy: Proxy = "nginx",
    parts: Mapping[str, tuple[Object, ...]] | None = None,
) -> dict[str, str]:
    """Everything of the folder. Raises StartupError for what cannot be.

    Args:
        parts: the bundle's objects (`bundle.groups`), for who has them already.
        source: the spec's file name, for the comments at the head.
        proxy: what stands before the gateway on one machine.
    """
    if format != "systemd":  # there the environment is the machine's own
        _refuse_callables(bundle)
    if format in ("compose", "systemd"):
        from . import machine

        return machine.files(bundle, format, proxy)
    header = head(source)
    if parts is None:
        parts = groups(bundle)
    beside = {**_beside(bundle), "README.md": readme.text(bundle, format, source)}
    if format == "helm":
        from . import helm

        return {**helm.chart(bundle, parts, header), **beside}
    texts = {
        f"{name}.yaml": dump_all((each.to_dict() for each in part), header) for name, part in parts.items()
    }
    if format == "plain":
        return {**texts, **beside}
    return {
        **{f"base/{name}": text for name, text in texts.items()},
        "base/kustomization.yaml": dump_all([_base(texts)], header),
        OVERLAY: dump_all([_overlay(bundle)], _OVERLAY_HEADER),
        **beside,
    }


def _refuse_callables(bundle: Bundle) -> None:
    """Somebody's Python is not in our image: the gateway would end at its start."""
    spec = bundle.spec
    if spec.cluster.images.penstock is not None:
        return
    named = [(f"gateway.hooks[{at}].python", each.python) for at, each in enumerate(spec.gateway.hooks)]
    for name, route in spec.routes.items():
        verifiers = route.escalate.verifiers if route.escalate is not None else ()
        where = f"routes.{name}.escalate.verifiers"
        named += [(f"{where}[{at}].python", each.python) for at, each in enumerate(verifiers)]
    for where, callable in named:
        if callable is not None and not callable.startswith("penstock."):
            raise StartupError(
                f"{where}: {callable} is not in Penstock's own image, and the gateway would not start.",
                param=where,
                advice="Build an image from it that has the package, and name it under "
                "cluster.images.penstock; or ask by url.",
            )


def head(source: str) -> str:
    """The comment at the head of every file."""
    return f"Made from {source} by `penstock compile`: change that, and compile again."


def kept(format: Format) -> frozenset[str]:
    """Paths that are written once, and belong to whoever uses the folder from then on."""
    return frozenset({OVERLAY}) if format == "kustomize" else frozenset()


_OVERLAY_HEADER = """\
Made once by `penstock compile`, which does not touch it again: here goes what differs in a cluster.
`kubectl kustomize` shows what comes out of this folder, `kubectl apply -k` applies it."""


def _beside(bundle: Bundle) -> dict[str, str]:
    """What is no object of this namespace."""
    return {**operator.files(bundle), **monitoring.files(bundle)}


def _base(texts: Mapping[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(texts),
    }


def _overlay(bundle: Bundle) -> dict[str, Any]:
    """The base, with its images by name, so that a registry or a version is one line. Of a name with several
    tags (ours for CPUs and for GPUs) the tags stay: kustomize would make them one."""
    images = sorted({each.image for each in bundle.workloads} | {bundle.gateway.image})
    names = [_name(image) for image in images]
    listed = {
        name: _image(image) if names.count(name) == 1 else {"name": name, "newName": name}
        for name, image in zip(names, images, strict=True)
    }
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base"],
        "images": list(listed.values()),
    }


def _name(image: str) -> str:
    """Without its tag or digest."""
    return image.partition("@")[0] if "@" in image else image.rpartition(":")[0]


def _image(image: str) -> dict[str, str]:
    """As kustomize names it: name, and tag or digest."""
    name = _name(image)
    rest = image[len(name) + 1 :]
    return {"name": name, "newName": name, "digest" if "@" in image else "newTag": rest}
