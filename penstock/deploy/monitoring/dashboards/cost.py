"""Cost: dollars, device time and tokens as billed, by route and team."""

from __future__ import annotations

from penstock.deploy import names
from penstock.deploy.monitoring.panels import Dashboard, Panel
from penstock.deploy.monitoring.promql import select, text
from penstock.deploy.workloads import Bundle
from penstock.observe import gateway_names as gateway
from penstock.observe import names as engine
from penstock.observe.names import Metric

from .queries import GREEN, RED, namespace, rate


def page(bundle: Bundle) -> Dashboard:
    """The page."""
    where = ('namespace="$namespace"', f"job={text(names.GATEWAY)}")

    def spent(metric: Metric, by: str, window: str = "$__range") -> str:
        grouped = f" by ({by})" if by else ""
        return f"sum{grouped} (increase({select(metric, *where)}[{window}]))"

    lost = select(gateway.BILLS, *where, 'outcome="lost"')
    tokens = f"({spent(gateway.INPUT_TOKENS, 'route')} + {spent(gateway.OUTPUT_TOKENS, 'route')})"
    idle = (
        [
            Panel(
                "Devices: busy and idle",
                ((rate(engine.DEVICE_SECONDS, where[0], by="state"), "{{state}}"),),
                "short",
                stacked=True,
                about="Devices' seconds a second, of Penstock's engines. Idle is paid for, too.",
            ),
        ]
        if any(each.engine == "penstock" for each in bundle.workloads)
        else []
    )
    rows: list[tuple[str, list[Panel]]] = [
        (
            "In the time shown",
            [
                Panel("Dollars", ((spent(gateway.DOLLARS, ""), ""),), "currencyUSD", "stat", width=6),
                Panel(
                    "Device-hours",
                    ((f"{spent(gateway.DEVICE_SECONDS, '')} / 3600", ""),),
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Tokens",
                    ((f"{spent(gateway.INPUT_TOKENS, '')} + {spent(gateway.OUTPUT_TOKENS, '')}", ""),),
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Bills lost",
                    ((f"sum(increase({lost}[$__range]))", ""),),
                    kind="stat",
                    width=6,
                    thresholds=((None, GREEN), (1, RED)),
                ),
            ],
        ),
        (
            "Where it goes",
            [
                Panel(
                    "Dollars an hour, by route",
                    (
                        (
                            f"{rate(gateway.DOLLARS, *where, by='route, upstream')} * 3600",
                            "{{route}} → {{upstream}}",
                        ),
                    ),
                    "currencyUSD",
                    stacked=True,
                ),
                Panel(
                    "Dollars an hour, by team",
                    ((f"{rate(gateway.TEAM_DOLLARS, *where, by='team')} * 3600", "{{team}}"),),
                    "currencyUSD",
                    stacked=True,
                ),
                Panel(
                    "Device-seconds a second, by team",
                    ((rate(gateway.TEAM_DEVICE_SECONDS, *where, by="team"), "{{team}}"),),
                    stacked=True,
                    about="How many devices each team keeps busy.",
                ),
                Panel(
                    "Dollars of a million tokens",
                    ((f"{spent(gateway.DOLLARS, 'route')} / {tokens} * 1e6", "{{route}}"),),
                    "currencyUSD",
                    "table",
                    about="In the time shown, input and output together.",
                ),
                Panel(
                    "Tokens, by route",
                    (
                        (rate(gateway.INPUT_TOKENS, *where, by="route"), "in {{route}}"),
                        (rate(gateway.OUTPUT_TOKENS, *where, by="route"), "out {{route}}"),
                        (rate(gateway.CACHED_TOKENS, *where, by="route"), "cached {{route}}"),
                    ),
                    about="A second.",
                ),
                *idle,
                Panel(
                    "Outcomes",
                    ((rate(gateway.OUTCOMES, *where, by="verdict"), "{{verdict}}"),),
                    "short",
                    about="Told of requests, a second: without them there is no cost of an outcome.",
                ),
            ],
        ),
    ]
    return Dashboard(
        "cost",
        "Penstock: cost",
        "Dollars, device time and tokens as billed; `penstock costs` has the ledger's.",
        (namespace(gateway.IN_FLIGHT),),
        rows,
    )
