"""Who gets Triton's table, and who is told why not."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels import create
from penstock.kernels.create import create_operations, why_no_triton
from penstock.kernels.limits import DECODE_GROUP_BYTES
from penstock.kernels.triton import launch, schedule
from penstock.kernels.triton.attention import chunk_tile, decode_tile
from penstock.kernels.triton.registry import DEVICE_KINDS, KERNELS, TENSOR_MEMORY, device_kind

from .triton import needs_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Play = Callable[..., None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """A machine with this compute capability, and with or without Triton, interpreted or not."""

    def machine(
        capability: tuple[int, int] = (9, 0), *, installed: bool = True, interpreted: bool = False
    ) -> None:
        monkeypatch.setattr(launch, "installed", lambda: installed)
        monkeypatch.setattr(launch, "interpreted", lambda: interpreted)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return machine


def test_which_devices_are_taken(play: Play) -> None:
    play((8, 0))
    assert why_no_triton(CUDA, torch.bfloat16) is None
    assert "computes float32, bfloat16 and float16, not torch.float64" in str(
        why_no_triton(CUDA, torch.float64)
    )
    play((7, 5))
    assert why_no_triton(CUDA, torch.float16) is None
    assert "8.0 for torch.bfloat16, and cuda has 7.5" in str(why_no_triton(CUDA, torch.bfloat16))
    play((6, 1))
    assert "needs compute capability 7.0" in str(why_no_triton(CUDA, torch.float16))
    play(installed=False)
    assert "not installed" in str(why_no_triton(CUDA, torch.float16))
    play()
    assert "needs a GPU" in str(why_no_triton(CPU, torch.float16))
    assert "is not for mps" in str(why_no_triton(torch.device("mps"), torch.float16))
    play(interpreted=True)
    assert why_no_triton(CPU, torch.float16) is None


@pytest.mark.parametrize(
    ("machine", "words"),
    [({"installed": False}, "pip install triton"), ({}, "needs a GPU; on a CPU it runs for tests alone")],
)
def test_asked_for_by_name_it_is_there_or_the_start_is_refused(
    play: Play, machine: dict[str, bool], words: str
) -> None:
    play(**machine)
    with pytest.raises(StartupError, match=words) as refused:
        create_operations(CPU, torch.float32, attention="triton")
    assert refused.value.param == "--attention-backend"


def test_asked_for_by_name_it_must_compile(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play(interpreted=True)
    monkeypatch.setattr("penstock.kernels.triton.operations.triton_operations", lambda plain: None)
    with pytest.raises(StartupError, match="cannot be compiled here"):
        create_operations(CPU, torch.float32, attention="triton")


def test_it_makes_no_promise_about_batches(play: Play) -> None:
    play(interpreted=True)
    with pytest.raises(StartupError, match="'triton' is not batch-invariant"):
        create_operations(CPU, torch.float32, attention="triton", batch_invariant=True)


@needs_triton
def test_the_table_has_an_entry_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the other half of the suite uses it")
    table = create_operations(CPU, torch.float16, attention="triton")
    assert table.name == "triton"
    assert table.stack is not None
    assert table.choose is not None
    assert not table.batch_invariant
    assert create_operations(CPU, torch.float16).name != "triton", "nobody asked for the interpreter"
    assert create.ATTENTION_BACKENDS == ("auto", "cpu", "triton", "torch", "reference")


def test_nothing_needs_triton_to_be_imported() -> None:
    """Hosts, the registry and its configurations; the engine chooses among tables on any machine."""
    program = """
import sys
sys.modules["triton"] = None  # its import fails
from penstock.kernels.create import create_operations
from penstock.kernels.triton import operations, registry, stack
print(sum(1 for kernel in registry.KERNELS for _ in kernel.configurations()) > 500)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_tiles_fit_the_device_that_they_are_for() -> None:
    assert device_kind(227 << 10, (10, 0)) == TENSOR_MEMORY
    assert [device_kind(size << 10, None) for size in (0, 48, 64, 99, 100, 163, 227)] == [
        "interpreted", "small", "small", "medium", "medium", "large", "largest",
    ]  # fmt: skip
    for kind in (*list(DEVICE_KINDS)[1:], TENSOR_MEMORY):
        for dim in (8, 64, 80, 128, 256):
            for itemsize in (2, 4):
                for tile in (decode_tile(kind, 4, dim, itemsize), chunk_tile(kind, dim, itemsize)):
                    assert tile.queries >= 16 <= tile.keys
                    assert tile.queries & (tile.queries - 1) == tile.keys & (tile.keys - 1) == 0


def test_what_parts_take_is_in_the_plan_of_memory() -> None:
    """Grown by a quarter at most; see kernels/limits.py."""
    assert 2 * DECODE_GROUP_BYTES["cuda"] >= schedule.WORKSPACE_BYTES * 5 // 4


def test_names_of_configurations_are_their_own() -> None:
    for kernel in KERNELS:
        configurations = list(kernel.configurations())
        for configuration in configurations:
            constants = [name for name, kind in configuration.signature.items() if kind == "constexpr"]
            assert sorted(constants) == sorted(configuration.constants), configuration
            assert set(configuration.divisible) <= set(configuration.signature)
        if kernel.host != "quantized":  # whose tiles for other devices have the same names
            labels = [(each.label, each.device_kind) for each in configurations]
            assert len(set(labels)) == len(labels), kernel.name


@needs_triton
def test_signatures_name_the_arguments_of_the_kernels_in_order() -> None:
    """Else they would be compiled ahead of time for something else than what is started."""
    for kernel in KERNELS:
        function = kernel.function()
        names = list(inspect.signature(function.fn).parameters)
        for configuration in kernel.configurations():
            assert list(configuration.signature) == names, (kernel.name, configuration.label)
