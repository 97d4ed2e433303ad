"""The gateway: requests, refusals, latency, upstreams, escalations."""

from __future__ import annotations

from penstock.deploy import names
from penstock.deploy.monitoring.panels import Dashboard, Panel, Variable
from penstock.deploy.monitoring.promql import select, text
from penstock.deploy.workloads import Bundle
from penstock.observe import gateway_names as gateway

from .queries import GREEN, RED, YELLOW, namespace, percentiles, rate


def page(bundle: Bundle) -> Dashboard:
    """The page."""
    where = ('namespace="$namespace"', f"job={text(names.GATEWAY)}", 'route=~"$route"')
    every = where[:2]
    failed = rate(gateway.REQUESTS, *where, 'code=~"5.."')
    rows: list[tuple[str, list[Panel]]] = [
        (
            "Now",
            [
                Panel("Requests/s", ((rate(gateway.REQUESTS, *where), ""),), "reqps", "stat", width=6),
                Panel(
                    "Under way", ((f"sum({select(gateway.IN_FLIGHT, *every)})", ""),), kind="stat", width=6
                ),
                Panel(
                    "Errors",
                    ((f"{failed} / {rate(gateway.REQUESTS, *where)}", ""),),
                    "percentunit",
                    "stat",
                    width=6,
                    thresholds=((None, GREEN), (0.01, YELLOW), (0.05, RED)),
                ),
                Panel("Refused/s", ((rate(gateway.REFUSALS, *every), ""),), "reqps", "stat", width=6),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "By route and upstream",
                    ((rate(gateway.REQUESTS, *where, by="route, upstream"), "{{route}} → {{upstream}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "By status",
                    ((rate(gateway.REQUESTS, *where, by="code"), "{{code}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Refused, by reason", ((rate(gateway.REFUSALS, *every, by="code"), "{{code}}"),), "reqps"
                ),
                Panel(
                    "Time to first byte",
                    percentiles(gateway.TIME_TO_FIRST_BYTE, *where, by="route", legend="{{route}}"),
                    "s",
                ),
                Panel(
                    "Whole request", percentiles(gateway.LATENCY, *where, by="route", legend="{{route}}"), "s"
                ),
                Panel(
                    "Before an upstream is asked",
                    percentiles(gateway.WAITED, *where, by="route", legend="{{route}}"),
                    "s",
                    about="Keys, limits, models that start.",
                ),
            ],
        ),
        (
            "Upstreams",
            [
                Panel(
                    "Under way at replicas",
                    ((f"sum by (replica) ({select(gateway.STATION_IN_FLIGHT, *every)})", "{{replica}}"),),
                    stacked=True,
                ),
                Panel(
                    "Share of a healthy replica",
                    ((f"min by (replica) ({select(gateway.STATION_WEIGHT, *every)})", "{{replica}}"),),
                    "percentunit",
                    most=1.0,
                    about="0 is out: it fails, or makes no progress.",
                ),
                Panel(
                    "Failed attempts",
                    (
                        (
                            rate(gateway.ATTEMPTS_FAILED, *every, by="upstream, fault"),
                            "{{upstream}} {{fault}}",
                        ),
                    ),
                    "reqps",
                ),
                Panel(
                    "Streams that went on elsewhere",
                    ((rate(gateway.STREAMS_RESUMED, *every, by="upstream"), "{{upstream}}"),),
                    "reqps",
                ),
                Panel(
                    "Verdicts on attempts",
                    ((rate(gateway.VERDICTS, *where, by="verifier, verdict"), "{{verifier}} {{verdict}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Escalations",
                    ((rate(gateway.ESCALATIONS, *where, by="route, outcome"), "{{route}} {{outcome}}"),),
                    "reqps",
                ),
            ],
        ),
    ]
    return Dashboard(
        "gateway",
        "Penstock: gateway",
        "Who asks, how they fare, and which replicas answer.",
        (
            namespace(gateway.IN_FLIGHT),
            Variable("route", f"label_values({select(gateway.REQUESTS, *every)}, route)", "Route"),
        ),
        rows,
    )
