"""What the driver says, and what is refused because of it."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.engine import driver, hardware


def library(number: int, status: int = 0) -> Any:
    def get(pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = number
        return status

    return lambda name: SimpleNamespace(cuDriverGetVersion=get)


def absent(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("load", "found"),
    [
        (library(12040), (12, 4)),
        (library(13000), (13, 0)),
        (library(11080), (11, 8)),
        (library(0), None),
        (library(12040, status=3), None),
        (absent, None),
        (lambda name: SimpleNamespace(), None),
    ],
)
def test_the_newest_cuda_that_it_knows(load: Any, found: tuple[int, int] | None) -> None:
    assert driver.newest_cuda(load) == found


def test_its_version_is_in_the_kernels_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver.version(file) == ""
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    )
    assert driver.version(file) == "535.104.05"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert driver.version(file) == "580.65.06"
    file.write_text("something else\n")
    assert driver.version(file) == ""
    assert driver.is_there(file)
    assert not driver.is_there(tmp_path / "nvidiactl")


def machine(monkeypatch: pytest.MonkeyPatch, *, runtime: str | None, known: tuple[int, int] | None) -> None:
    """A machine whose driver torch cannot use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", runtime)
    monkeypatch.setattr(driver, "newest_cuda", lambda: known)
    monkeypatch.setattr(driver, "version", lambda: "470.57.02")
    monkeypatch.setattr(driver, "is_there", lambda: True)


def test_a_driver_that_is_too_old_is_refused_with_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, runtime="12.8", known=(11, 4))
    with pytest.raises(StartupError, match="--device cuda") as caught:
        hardware.choose_device("cuda")
    assert caught.value.param == "--device"
    for words in ("470.57.02", "11.4", "12.8", "525.60.13"):
        assert words in caught.value.message
    machine(monkeypatch, runtime="12.8", known=(12, 4))  # something else is wrong
    with pytest.raises(StartupError, match="torch sees no CUDA device"):
        hardware.choose_device("cuda")


def test_a_gpu_that_is_not_used_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, runtime="12.8", known=(11, 4))
    with caplog.at_level(logging.WARNING):
        assert hardware.choose_device("auto").type == "cpu"
    assert "470.57.02" in caplog.text
    caplog.clear()
    machine(monkeypatch, runtime=None, known=(11, 4))  # torch's build for CPUs is meant so
    with caplog.at_level(logging.WARNING):
        assert hardware.choose_device("auto").type == "cpu"
    assert not caplog.text
