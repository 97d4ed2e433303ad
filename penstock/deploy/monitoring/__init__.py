"""What Prometheus, Grafana and autoscalers are told: from a Bundle to objects, and to values of charts.

    scrape      ServiceMonitors: engines, gateway
    alerts      PrometheusRule: engines, latency against SLOs, replicas, gateway, budgets, GPUs
    scaling     what follows a model's load: queries, KEDA's ScaledObject, or HPA with prometheus-adapter
    dashboards  Grafana: engines, gateway, cost, GPUs
    promql      selectors and how numbers are written

Names of metrics come from the tables of `observe`; `penstock.check` reads what comes out once more. A series
is known by its namespace and its job, which is the Service's name.
"""

from __future__ import annotations

from penstock.deploy.objects import Object, dump
from penstock.deploy.workloads import Bundle

from .alerts import rules
from .dashboards import dashboards
from .scaling import adapter_values, scalers
from .scrape import monitors

__all__ = ["adapter_values", "dashboards", "files", "monitors", "objects", "rules", "scalers"]

ADAPTER = "prometheus-adapter"
"""Folder of the bundle. Not Kubernetes objects: nothing applies it."""


def objects(bundle: Bundle) -> list[Object]:
    """ServiceMonitors, PrometheusRules, scalers and dashboards."""
    return [*monitors(bundle), *rules(bundle), *scalers(bundle), *dashboards(bundle)]


def files(bundle: Bundle) -> dict[str, str]:
    """Path → text of what belongs to others: values of the chart prometheus-adapter, where an HPA scales."""
    adapter = adapter_values(bundle)
    if not adapter:
        return {}
    note = "# Values of the chart prometheus-community/prometheus-adapter: the metrics of the HPAs\n"
    return {f"{ADAPTER}/values.yaml": note + dump(adapter)}
