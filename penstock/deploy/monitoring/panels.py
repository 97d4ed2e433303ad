"""Grafana's dashboards as types: panels on a grid of 24 columns, queries, variables. Schema version 39.

Dashboard ─┬─ variables   datasource, namespace, and what the dashboard asks for
           └─ rows ─▶ panels ─▶ (PromQL, legend)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "gauge", "table"]

RATE = "$__rate_interval"
_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)."""
    unit: str = "short"
    """Grafana's: percentunit, s, reqps, currencyUSD, celsius, …"""
    kind: Kind = "timeseries"
    about: str = ""
    thresholds: tuple[tuple[float | None, str], ...] = ()
    """(value, colour), rising; the first value is None."""
    width: int = 8
    stacked: bool = False
    most: float | None = None
    """Of the axis."""

    def to_dict(self, id: int, x: int, y: int, height: int) -> dict[str, Any]:
        """As Grafana has it."""
        steps = [{"value": value, "color": color} for value, color in self.thresholds]
        custom: dict[str, Any] = {}
        if self.kind == "timeseries":
            custom = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
            if self.stacked:
                custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}
            if steps:
                custom["thresholdsStyle"] = {"mode": "line"}
        defaults: dict[str, Any] = {"unit": self.unit, "min": 0, "custom": custom}
        if self.most is not None:
            defaults["max"] = self.most
        defaults["thresholds"] = {
            "mode": "absolute",
            "steps": steps or [{"value": None, "color": "green"}],
        }
        return {
            "id": id,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": _DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": _OPTIONS[self.kind],
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": _DATASOURCE,
                    "expr": query,
                    "legendFormat": legend,
                    "range": self.kind == "timeseries",
                    "instant": self.kind != "timeseries",
                    **({"format": "table"} if self.kind == "table" else {}),
                }
                for index, (query, legend) in enumerate(self.queries)
            ],
        }


_REDUCE = {"values": False, "calcs": ["lastNotNull"], "fields": ""}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _REDUCE, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "gauge": {"reduceOptions": _REDUCE, "showThresholdMarkers": True},
    "table": {"showHeader": True, "cellHeight": "sm"},
}


@dataclass(frozen=True, slots=True)
class Variable:
    """What the reader may choose."""

    name: str
    query: str
    """`label_values(METRIC, LABEL)`."""
    label: str
    several: bool = True

    def to_dict(self, default: str | None = None) -> dict[str, Any]:
        """As Grafana has it."""
        all = {"text": "All", "value": "$__all"}
        current = all if self.several else {"text": default or "", "value": default or ""}
        return {
            "name": self.name,
            "label": self.label,
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": self.query, "refId": f"variable-{self.name}"},
            "definition": self.query,
            "refresh": 2,
            "sort": 1,
            "multi": self.several,
            "includeAll": self.several,
            "current": current,
        }


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page."""

    name: str
    """Of its file and ConfigMap."""
    title: str
    about: str
    variables: tuple[Variable, ...]
    rows: Sequence[tuple[str, Sequence[Panel]]] = field(default_factory=tuple)

    def to_json(self, namespace: str) -> str:
        """The page; the same for the same bundle."""
        panels: list[dict[str, Any]] = []
        y = 0
        for title, row in self.rows:
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "row",
                    "title": title,
                    "collapsed": False,
                    "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
                    "panels": [],
                }
            )
            y, x, height = y + 1, 0, 4 if all(panel.kind == "stat" for panel in row) else 8
            for panel in row:
                if x + panel.width > _COLUMNS:
                    x, y = 0, y + height
                panels.append(panel.to_dict(len(panels) + 1, x, y, height))
                x += panel.width
            y += height
        page = {
            # of the namespace, so that two bundles do not overwrite each other's pages
            "uid": hashlib.blake2b(f"{namespace}/{self.name}".encode(), digest_size=7).hexdigest(),
            "title": self.title,
            "description": self.about,
            "tags": ["penstock"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {
                "list": [
                    {
                        "name": "datasource",
                        "label": "Data source",
                        "type": "datasource",
                        "query": "prometheus",
                        "current": {},
                    },
                    *(each.to_dict(namespace) for each in self.variables),
                ]
            },
            "annotations": {"list": []},
            "panels": panels,
        }
        return json.dumps(page, indent=1, ensure_ascii=False) + "\n"
