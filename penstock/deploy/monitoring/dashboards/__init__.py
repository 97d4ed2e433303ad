"""Grafana's pages, each a ConfigMap that the sidecar finds by its label.

engines   what engines do: load, latency, KV cache, steps
gateway   who asks, how they fare, which replicas answer
cost      dollars, device time, tokens
gpu       what DCGM says
queries   what their queries have in common
"""

from __future__ import annotations

from penstock.deploy.monitoring.scrape import metadata
from penstock.deploy.objects import Object
from penstock.deploy.workloads import Bundle

from . import cost, engines, gateway, gpu

LABEL = {"grafana_dashboard": "1"}
"""What Grafana's sidecar (its chart, kube-prometheus-stack) looks for."""


def dashboards(bundle: Bundle) -> list[Object]:
    """Their ConfigMaps. GPUs have a page where there are some."""
    pages = [engines.page(bundle), gateway.page(bundle), cost.page(bundle)]
    if any(each.device.vendor == "nvidia" for each in bundle.workloads):
        pages.append(gpu.page(bundle))
    return [
        Object(
            api_version="v1",
            kind="ConfigMap",
            metadata=metadata(bundle, f"dashboard-{page.name}", more=LABEL),
            body={"data": {f"{bundle.namespace}-{page.name}.json": page.to_json(bundle.namespace)}},
        )
        for page in pages
    ]
