"""Accelerators as nvidia-smi names them, by a script in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.gateway.local.devices import Device, accelerators, assign

SAID = """\
0, NVIDIA H100 80GB HBM3, 80000, 81559
1, NVIDIA H100 80GB HBM3, 70000, 81559
2, NVIDIA L4, 22000, 23034
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    return says(tmp_path, f"cat <<'E'\n{SAID}E")


def says(folder: Path, script: str) -> dict[str, str]:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_they_are_found_with_their_memory(machine: dict[str, str]) -> None:
    first, _, third = accelerators(machine)
    assert first == Device(0, "NVIDIA H100 80GB HBM3", 80000 << 20, 81559 << 20)
    assert third.name == "NVIDIA L4"


@pytest.mark.parametrize(("seen", "numbers"), [("2,0", [2, 0]), ("", []), ("1", [1]), ("7", [])])
def test_those_that_are_hidden_are_not_there(machine: dict[str, str], seen: str, numbers: list[int]) -> None:
    found = accelerators({**machine, "CUDA_VISIBLE_DEVICES": seen})
    assert [device.number for device in found] == numbers


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no nvidia-smi"),
        ("exit 9", "nvidia-smi does not say which accelerators are here"),
        ("echo No devices were found", "nvidia-smi does not say which accelerators are here"),
        ("echo '0, GPU, [N/A], 100'", "nvidia-smi does not say which accelerators are here"),
    ],
)
def test_a_machine_without_any(tmp_path: Path, script: str | None, message: str) -> None:
    environment = {"PATH": str(tmp_path)} if script is None else says(tmp_path, script)
    with pytest.raises(StartupError, match=message):
        accelerators(environment)


def test_pools_get_devices_of_their_own() -> None:
    devices = [Device(number, "GPU", 1, 1) for number in range(4)]
    given = assign([("a", 1), ("b", 2)], devices)
    assert [device.number for device in given["a"]] == [0]
    assert [device.number for device in given["b"]] == [1, 2]
    with pytest.raises(
        StartupError, match=r"the pools a \(2\), b \(3\) have 5 accelerators; this machine has 4"
    ):
        assign([("a", 2), ("b", 3)], devices)
