"""What the DCGM exporter tells of GPUs: fields, as the chart's `dcgm-metrics.csv` wants them.

    DCGM FIELD, Prometheus metric type, help message

Utilisation is DCGM_FI_PROF_GR_ENGINE_ACTIVE beside DCGM_FI_DEV_GPU_UTIL: the latter is not reported of MIG
slices at all, and is near 100 % with one request. Names: the exporter's `dcp-metrics-included.csv`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Field(NamedTuple):
    """One line."""

    name: str
    type: Literal["gauge", "counter", "label"]
    help: str


FIELDS = (
    Field("DCGM_FI_DEV_SM_CLOCK", "gauge", "Clock of the multiprocessors (MHz)."),
    Field("DCGM_FI_DEV_MEM_CLOCK", "gauge", "Clock of the memory (MHz)."),
    Field("DCGM_FI_DEV_GPU_TEMP", "gauge", "Temperature of the GPU (C)."),
    Field("DCGM_FI_DEV_MEMORY_TEMP", "gauge", "Temperature of the memory (C)."),
    Field("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw (W)."),
    Field("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "counter", "Energy since boot (mJ)."),
    Field("DCGM_FI_DEV_GPU_UTIL", "gauge", "Time with a kernel running (%); not of MIG slices."),
    Field("DCGM_FI_DEV_MEM_COPY_UTIL", "gauge", "Time with memory traffic (%); not of MIG slices."),
    Field("DCGM_FI_DEV_XID_ERRORS", "gauge", "The last XID error."),
    Field("DCGM_FI_DEV_FB_FREE", "gauge", "Free memory (MiB)."),
    Field("DCGM_FI_DEV_FB_USED", "gauge", "Used memory (MiB)."),
    Field("DCGM_FI_DEV_FB_RESERVED", "gauge", "Memory reserved by the driver (MiB)."),
    Field("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "counter", "PCIe retries."),
    Field("DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", "counter", "NVLink traffic of all lanes."),
    Field("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "counter", "Rows remapped for uncorrectable errors."),
    Field("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "counter", "Rows remapped for correctable errors."),
    Field("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "Whether remapping of rows has failed."),
    Field("DCGM_FI_DRIVER_VERSION", "label", "Version of the driver."),
    Field("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "gauge", "Share of time with work (also of MIG slices)."),
    Field("DCGM_FI_PROF_SM_ACTIVE", "gauge", "Share of time with a warp (mean of multiprocessors)."),
    Field("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "gauge", "Share of cycles with tensor cores active."),
    Field("DCGM_FI_PROF_DRAM_ACTIVE", "gauge", "Share of cycles with memory traffic."),
    Field("DCGM_FI_PROF_PCIE_TX_BYTES", "gauge", "Sent over PCIe (bytes/s)."),
    Field("DCGM_FI_PROF_PCIE_RX_BYTES", "gauge", "Received over PCIe (bytes/s)."),
)
"""Every field; a help message has no comma, which separates columns."""


def csv() -> str:
    """The file."""
    lines = ["# DCGM FIELD, Prometheus metric type, help message"]
    lines += [f"{field.name}, {field.type}, {field.help}" for field in FIELDS]
    return "\n".join(lines) + "\n"
