"""What a cluster's nodes with NVIDIA's GPUs need before anything runs on them: the GPU Operator's chart.

    Spec ─┬─ mig.py       which slices each GPU is cut into (mig-parted)
          ├─ sharing.py   time-slicing, for development only (device plugin)
          ├─ dcgm.py      which metrics of GPUs there are (DCGM exporter)
          └─ google.py    what GKE wants before
    files(bundle) ─▶ values.yaml of the chart with all of these; each also beside it, to be used alone

Nothing of this is applied with the bundle: a chart is installed once, by whoever has the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.deploy.objects import dump
from penstock.deploy.providers import PRODUCT_LABEL, PRODUCTS
from penstock.deploy.workloads import Bundle
from penstock.fleet.catalogue import find_device
from penstock.spec.model import Spec

from . import dcgm, google, mig, sharing
from .values import CHART, values

__all__ = ["CHART", "FOLDER", "files"]

FOLDER = "gpu-operator"
"""Of the bundle. Not Kubernetes objects: nothing applies it."""


def files(bundle: Bundle) -> dict[str, str]:
    """Path → text; none where there are no GPUs of NVIDIA's.

    Raises StartupError, naming the field, for slices that there are not, and for a model that promises
    something on devices shared in time.
    """
    spec = bundle.spec
    if not any(find_device(pool.hardware).vendor == "nvidia" for pool in spec.pools.values()):
        sharing.configs(spec, mig_strategy="mixed")  # refuses what is shared in vain
        return {}
    nodes = mig.nodes(spec)
    cut = mig.config(nodes) if nodes else None
    shared = sharing.configs(spec, mig_strategy="mixed")
    made = {
        f"{FOLDER}/values.yaml": _note(f"Values of the chart nvidia/gpu-operator {CHART}")
        + dump(values(spec, mig=cut, sharing=shared)),
        f"{FOLDER}/dcgm-metrics.csv": dcgm.csv(),
        f"{FOLDER}/README.md": _readme(spec, nodes, shared),
    }
    if cut is not None:
        made[f"{FOLDER}/mig-parted.yaml"] = _note("`nvidia-mig-parted apply -f` this `-c CONFIG`") + dump(cut)
    for name, document in shared.items():
        if name != "default":
            note = "FOR DEVELOPMENT ONLY: pods take turns on a GPU, without walls between them."
            made[f"{FOLDER}/{name}.yaml"] = _note(note) + dump(document)
    return made


def _note(text: str) -> str:
    return f"# {text}\n"


def _readme(spec: Spec, nodes: Sequence[mig.Node], shared: Mapping[str, Any]) -> str:
    gke = spec.cluster.provider == "gke"
    lines = [
        "# GPUs of the cluster",
        "",
        "Once for each cluster, before the rest of the bundle. Nodes come with NVIDIA's driver (`nvidia-smi`",
        "runs on them); `driver.enabled: true` in values.yaml installs one where they do not.",
        "",
        *(google.before() if gke else ()),
        "```",
        "helm repo add nvidia https://helm.ngc.nvidia.com/nvidia && helm repo update",
        "helm install gpu-operator nvidia/gpu-operator \\",
        f"  --namespace gpu-operator --create-namespace --version {CHART} --values values.yaml",
        "kubectl -n gpu-operator get pods --watch",
        "```",
        "",
    ]
    if nodes:
        lines += [
            "Slices are made when a node is told its configuration. Nothing may run on its GPUs then:",
            "",
            "```",
        ]
        for node in nodes:
            product = PRODUCTS[node.hardware][0]
            lines += [
                f"# {len(node.layouts)} GPU(s) of a node with {node.hardware} ({PRODUCT_LABEL}={product}),",
                f"# for {', '.join(f'pools.{name}' for name in node.pools)}: {_words(node.layouts)}",
                f"kubectl label node NODE nvidia.com/mig.config={node.config} --overwrite",
            ]
        lines += [
            "kubectl get nodes -L nvidia.com/mig.config.state     # success",
            "```",
            "",
        ]
    names = [name for name in shared if name != "default"]
    if names:
        lines += [
            "**Development only**: pods on these nodes take turns on a GPU. Latency hangs on what others do,",
            "and memory is shared without a wall. Nothing with an SLO is compiled onto them.",
            "",
            "```",
            *(f"kubectl label node NODE {sharing.LABEL}={name} --overwrite" for name in names),
            "```",
            "",
        ]
    return "\n".join(lines)


def _words(layouts: Sequence[mig.Layout]) -> str:
    return "; ".join(
        " + ".join(f"{count} x {profile}" for profile, count in layout) for layout in dict.fromkeys(layouts)
    )
