"""Which form a weight gets on which processor, and which library serves: decided by what others say of them,
who are played here, so that the choices of processors that are not at hand are tested, too."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from penstock.kernels.attention import _zeros
from penstock.kernels.cpu import binding, build, decoder, library, linear, matrix, prebuilt
from penstock.kernels.cpu.binding import Library
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.linear import ALL_ROWS, PANEL, BF16Panels, IntegerPanels, agree

BF16, F32 = torch.bfloat16, torch.float32
compiled = pytest.mark.skipif(
    available(wait_seconds=120) is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0"
)


def processor(isa: str = "AVX2", *, bf16: bool = False) -> Library:
    return cast("Library", types.SimpleNamespace(isa=isa, multiplies_bf16=bf16))


@pytest.mark.parametrize(
    ("isa", "bf16", "amx", "free"),
    [
        ("AVX2", False, False, True),
        ("AVX512", False, False, False),
        ("AVX512-BF16", True, False, True),
        ("AVX512-BF16", True, True, False),
        ("NEON", False, False, False),
    ],
)
def test_where_the_promise_costs_nothing(
    isa: str, bf16: bool, amx: bool, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "has_amx", lambda: amx)
    assert matrix.is_free(processor(isa, bf16=bf16)) is free


class Ops:
    """torch.ops.mkldnn of a build that has these operators."""

    def __init__(self, *names: str, bf16: bool = True) -> None:
        for name in names:
            setattr(self, name, None)
        self._is_mkldnn_bf16_supported = lambda: bf16


BOTH = ("_reorder_linear_weight", "_linear_pointwise")


@pytest.mark.parametrize(
    ("machine", "ops", "f32", "bf16"),
    [
        ("x86_64", Ops(*BOTH), True, True),
        ("AMD64", Ops(*BOTH), True, True),
        ("x86_64", Ops(*BOTH, bf16=False), True, False),
        ("x86_64", Ops(BOTH[0]), False, False),
        ("x86_64", Ops(BOTH[1]), False, False),
        ("aarch64", Ops(*BOTH), False, False),
    ],
)
def test_where_onednn_packs(
    machine: str, ops: Ops, f32: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = types.SimpleNamespace(
        ops=types.SimpleNamespace(mkldnn=ops), float32=F32, bfloat16=BF16, float16=torch.float16
    )
    monkeypatch.setattr(matrix, "torch", played)
    monkeypatch.setattr(matrix.platform, "machine", lambda: machine)
    decide = matrix.can_pack.__wrapped__
    assert (decide(F32), decide(BF16), decide(torch.float16)) == (f32, bf16, False)


@pytest.mark.parametrize(
    ("bf16", "shape", "pointer", "readable"),
    [
        (True, (128, 64), "data_ptr", True),
        (False, (128, 64), "data_ptr", False),
        (True, (128, 65), "data_ptr", False),
        (True, (129, 64), "data_ptr", False),
        (True, (128, 64), "another", False),
    ],
)
def test_whose_panels_can_be_read(
    bf16: bool, shape: tuple[int, int], pointer: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear.torch, "ops", types.SimpleNamespace(mkldnn=Ops(pointer)))
    assert BF16Panels.can_read(processor(bf16=bf16), *shape) is readable


@pytest.mark.parametrize(("amx", "most_rows"), [(False, ALL_ROWS), (True, 8)])
def test_how_many_rows_our_kernels_take_beside_amx(
    amx: bool, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_amx", lambda: amx)
    monkeypatch.setattr(linear.torch, "ops", types.SimpleNamespace(mkldnn=Ops()))
    monkeypatch.setattr(linear.torch.ops.mkldnn, "data_ptr", lambda _: 0, raising=False)
    assert BF16Panels(processor(bf16=True), torch.zeros(1), 64, 64).most_rows == most_rows


class Played:
    """Stands for a class; remembers what it was made of."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.panels: Any = types.SimpleNamespace(most_rows=8)


@pytest.mark.parametrize(
    ("dtype", "packs", "reads", "agrees", "form"),
    [
        (BF16, True, True, True, "_Packed"),
        (BF16, True, True, False, "_Own"),  # another layout than ours
        (BF16, True, False, True, "_Own"),
        (BF16, False, True, True, "_Own"),
        (F32, True, True, True, "_Own"),
    ],
)
def test_what_keeps_the_promise(
    dtype: torch.dtype, packs: bool, reads: bool, agrees: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Packed(Played):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            if not agrees:
                self.panels = None

    own = type("_Own", (Played,), {})
    monkeypatch.setattr(matrix, "_Packed", type("_Packed", (Packed,), {}))
    monkeypatch.setattr(matrix, "_Own", own)
    monkeypatch.setattr(matrix, "FloatPanels", Played)
    monkeypatch.setattr(matrix, "can_pack", lambda _: packs)
    monkeypatch.setattr(BF16Panels, "can_read", lambda *_: reads)
    made: Any = matrix.matrix(processor(), torch.zeros(64, 64, dtype=dtype), invariant=True)
    assert type(made).__name__ == form
    if form == "_Packed":
        assert made.panels.most_rows == ALL_ROWS  # AMX or not: one order of sums


def packed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *, amx: bool = False, agrees: bool = True
) -> tuple[Any, list[str], list[Any]]:
    """oneDNN's form of a weight, who was asked to multiply with it, and what `agree` was given."""
    asked: list[str] = []
    compared: list[Any] = []

    class Panels(BF16Panels):
        def __init__(self, *_: Any) -> None:
            self.depth, self.most_rows = 64, linear._ROWS_BESIDE_AMX if amx else ALL_ROWS

        def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            asked.append("panels")
            return x

    def onednn(x: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        asked.append("onednn")
        return x

    def judge(panels: Any, oracle: Any, depth: int) -> bool:
        compared.append(oracle(torch.zeros(1, 64)))
        return agrees

    monkeypatch.setattr(matrix, "BF16Panels", Panels)
    monkeypatch.setattr(Panels, "can_read", staticmethod(lambda *_: True))
    monkeypatch.setattr(matrix, "_onednn", onednn)
    monkeypatch.setattr(matrix, "agree", judge)
    form = matrix._Packed(processor(bf16=True), torch.zeros(64, 64, dtype=dtype))
    asked.clear()
    return form, asked, compared


@pytest.mark.skipif(not matrix.can_pack(F32), reason="oneDNN packs nothing here")
def test_who_multiplies_with_what_onednn_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    form, asked, compared = packed(monkeypatch, F32, amx=True)
    assert (form.panels, compared) == (None, [])  # they are bfloat16's
    form(torch.zeros(1, 64), None)
    assert asked == ["onednn"]


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="no oneDNN")
@pytest.mark.parametrize(("agrees", "first"), [(True, "panels"), (False, "onednn")])
def test_few_rows_are_our_kernels_where_they_agree(
    agrees: bool, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight: weight)
    form, asked, compared = packed(monkeypatch, BF16, amx=True, agrees=agrees)
    assert len(compared) == 1
    for rows in (1, 8, 9):
        form(torch.zeros(rows, 64, dtype=BF16), None)
    assert asked == [first, first, "onednn"]


def test_every_output_is_judged_by_its_own_size() -> None:
    """A quiet output may not be wrong by what a loud one may be."""
    columns = torch.tensor([1e3, 1e-3])

    def right(x: torch.Tensor) -> torch.Tensor:
        return x[:, :1].float() * columns

    def wrong(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return right(x) * torch.tensor([1.0, 2.0])

    def far(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return right(x) * torch.tensor([1.01, 1.0])  # by 10, of a thousand

    assert not agree(cast("BF16Panels", wrong), right, 64)
    assert agree(cast("BF16Panels", far), right, 64)


@compiled
@pytest.mark.parametrize(
    ("scheme", "nbytes"), [("int8", 128 * 256 + 128 * 4), ("int4", 128 * 128 + 128 * 2 * 3)]
)
def test_bytes_of_integers_are_all_that_is_held(scheme: str, nbytes: int) -> None:
    found = available()
    assert found is not None
    panels = IntegerPanels(found, torch.randn(128, 256), scheme)
    assert panels.nbytes == nbytes
    zeros = panels._zeros
    assert (zeros.dtype, zeros.numel()) == (torch.uint8, 0 if scheme == "int8" else 128 * 2)


# ---- stacks ----


def layer(columns: dict[str, int], most_rows: dict[str, int] | None = None) -> Any:
    """A layer whose products have panels of these widths."""

    def product(name: str) -> tuple[Any, None]:
        made: Any = matrix.CpuMatrix()
        rows = (most_rows or {}).get(name, ALL_ROWS)
        made.panels = types.SimpleNamespace(columns=columns[name], most_rows=rows)
        return made, None

    return types.SimpleNamespace(**{name: product(name) for name in columns})


def test_only_gate_and_up_have_to_fill_pairs_of_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "DecoderStack", lambda *_: "a stack")
    widths = {"qkv": 3 * PANEL, "out": PANEL, "gate_up": 2 * PANEL, "down": PANEL}
    fits, does_not = layer(widths), layer({**widths, "gate_up": 3 * PANEL})
    assert decoder.create_stack(processor(), BF16, [fits, fits], 1e-6, 1.0) is not None
    assert decoder.create_stack(processor(), BF16, [fits, does_not], 1e-6, 1.0) is None


# ---- memory ----


def test_a_cache_has_its_dtype_on_every_device() -> None:
    for device in ("cpu", "meta"):
        zeros = _zeros((3, 4), torch.float16, torch.device(device))
        assert (zeros.dtype, tuple(zeros.shape), zeros.device.type) == (torch.float16, (3, 4), device)


def test_a_cache_on_a_cpu_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(*_: Any, **__: Any) -> None:
        raise AssertionError("it would touch every page")

    monkeypatch.setattr(torch, "zeros", writes)
    assert _zeros((5,), F32, torch.device("cpu")).tolist() == [0.0] * 5


# ---- libraries ----


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_CPU_KERNELS", raising=False)
    for name, value in {"library": None, "settled": False, "builder": None}.items():
        monkeypatch.setattr(library._State, name, value)


@pytest.mark.parametrize(
    ("state", "builds"),
    [({}, True), ({"settled": True}, False), ({"builder": object()}, False), ({"off": True}, False)],
)
def test_when_a_build_begins(
    fresh: None, state: dict[str, Any], builds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    monkeypatch.setattr(build, "find_library", lambda: None)
    monkeypatch.setattr(prebuilt, "fitting", list)
    monkeypatch.setattr(build, "target", lambda: None)
    monkeypatch.setattr(build, "start_build", lambda: begun.append(None))
    if state.pop("off", False):
        monkeypatch.setenv("PENSTOCK_CPU_KERNELS", "0")
    for name, value in state.items():
        monkeypatch.setattr(library._State, name, value)
    library.start_build()
    assert bool(begun) is builds


def test_what_was_compiled_here_is_not_compiled_again(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def checked(path: Path) -> Library:
        tried.append(path)
        raise OSError(f"{path.name} is broken")

    def compiles(_: float) -> Path:
        raise AssertionError("it would only make the same again")

    monkeypatch.setattr(build, "find_library", lambda: Path("own"))
    monkeypatch.setattr(prebuilt, "fitting", lambda: [Path("ahead")])
    monkeypatch.setattr(library, "_checked", checked)
    monkeypatch.setattr(library, "_compiled", compiles)
    with pytest.raises(OSError, match="ahead is broken"):
        library._load(0.0)
    assert [path.name for path in tried] == ["own", "ahead"]


def test_warnings_about_kernels_have_their_logger() -> None:
    assert library.logger.name == "penstock.kernels"


def test_the_runtime_of_openmp_is_found_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process's memory map cannot be read."""
    home = str(Path(torch.__file__).parent)
    if not any(Path(home, "lib").glob("libgomp*")):
        pytest.skip("torch brings no OpenMP runtime of its own")
    monkeypatch.setattr(binding, "_maps", list)
    path, entries = binding._openmp()
    assert path.startswith(home)
    assert len(entries) == len(binding._ENTRY_POINTS)
