"""GPUs: what NVIDIA's DCGM exporter says."""

from __future__ import annotations

from penstock.deploy.monitoring.alerts import CELSIUS, GPU_TEMPERATURE, XID
from penstock.deploy.monitoring.panels import RATE, Dashboard, Panel, Variable
from penstock.deploy.monitoring.promql import select
from penstock.deploy.workloads import Bundle

from .queries import CLEAR, GREEN, RED, YELLOW


def page(bundle: Bundle) -> Dashboard:
    """The page."""
    where = ('Hostname=~"$host"', 'gpu=~"$gpu"')
    name = "{{Hostname}} {{gpu}}"

    def gauge(metric: str, by: str = "Hostname, gpu") -> str:
        return f"max by ({by}) ({select(metric, *where)})"

    used, free = (
        f"sum by (Hostname, gpu) ({select(f'DCGM_FI_DEV_FB_{each}', *where)})" for each in ("USED", "FREE")
    )
    active = select("DCGM_FI_PROF_GR_ENGINE_ACTIVE", *where)
    rows: list[tuple[str, list[Panel]]] = [
        (
            "Now",
            [
                Panel(
                    "GPUs",
                    ((f"count(count by (UUID) ({select(GPU_TEMPERATURE, *where)}))", ""),),
                    kind="stat",
                    width=6,
                ),
                Panel(
                    "Hottest",
                    ((f"max({select(GPU_TEMPERATURE, *where)})", ""),),
                    "celsius",
                    "stat",
                    width=6,
                    thresholds=((None, GREEN), (CELSIUS - 10, YELLOW), (CELSIUS, RED)),
                ),
                Panel(
                    "Power",
                    ((f"sum({select('DCGM_FI_DEV_POWER_USAGE', *where)})", ""),),
                    "watt",
                    "stat",
                    width=6,
                ),
                Panel(
                    "Last XID",
                    ((f"max({select(XID, *where)})", ""),),
                    kind="stat",
                    width=6,
                    thresholds=((None, GREEN), (1, RED)),
                ),
            ],
        ),
        (
            "Work",
            [
                Panel(
                    "Engine active",
                    ((f"max by (Hostname, gpu, GPU_I_PROFILE) ({active})", name + " {{GPU_I_PROFILE}}"),),
                    "percentunit",
                    most=1.0,
                    about="Share of time in which something computes; of MIG slices, too.",
                ),
                Panel(
                    "Tensor cores",
                    ((gauge("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), name),),
                    "percentunit",
                    most=1.0,
                ),
                Panel(
                    "Memory bandwidth",
                    ((gauge("DCGM_FI_PROF_DRAM_ACTIVE"), name),),
                    "percentunit",
                    most=1.0,
                    about="Share of cycles; decoding is bound by it.",
                ),
            ],
        ),
        (
            "State",
            [
                Panel(
                    "Temperature",
                    ((gauge(GPU_TEMPERATURE), name),),
                    "celsius",
                    thresholds=((None, CLEAR), (CELSIUS, RED)),
                ),
                Panel("Power", ((gauge("DCGM_FI_DEV_POWER_USAGE"), name),), "watt"),
                Panel(
                    "Memory in use",
                    ((f"{used} / ({used} + {free})", name),),
                    "percentunit",
                    most=1.0,
                    about="An engine takes its share at its start, whatever the load.",
                ),
                Panel("Clock", ((gauge("DCGM_FI_DEV_SM_CLOCK"), name),), "rotmhz"),
                Panel(
                    "NVLink",
                    (
                        (
                            f"sum by (Hostname, gpu) "
                            f"(rate({select('DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL', *where)}"
                            f"[{RATE}]))",
                            name,
                        ),
                    ),
                ),
                Panel(
                    "Uncorrectable remapped rows", ((gauge("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS"), name),)
                ),
            ],
        ),
    ]
    return Dashboard(
        "gpu",
        "Penstock: GPUs",
        "What NVIDIA's DCGM exporter says of the cluster's GPUs.",
        (
            Variable("host", f"label_values({GPU_TEMPERATURE}, Hostname)", "Node"),
            Variable("gpu", f"label_values({GPU_TEMPERATURE}, gpu)", "GPU"),
        ),
        rows,
    )
