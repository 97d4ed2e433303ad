"""Kernels compiled ahead for GPUs that are not here; what is read from the compilers' texts; the page."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint import SHAPES
from benchmarks.gpu import roofline
from benchmarks.gpu.compile import (
    PAGE,
    RESULTS,
    ROOT,
    TARGETS,
    Compiled,
    chosen,
    faults,
    load_results,
    loads,
    reachable,
    run_worker,
    sample,
    stale,
    units,
)
from benchmarks.gpu.page import render
from benchmarks.gpu.sources import key, source
from penstock.kernels.triton.registry import KERNELS, Configuration, Kernel

PRODUCT = next(kernel for kernel in KERNELS if kernel.name == "quantized_product")
ATTEND = next(kernel for kernel in KERNELS if kernel.name == "attend")
OLD = ROOT / ".tools" / "triton-3.6"


def has_compiler() -> bool:
    return importlib.util.find_spec("triton") is not None


# ---- compiling ----


@pytest.mark.skipif(not has_compiler(), reason="no Triton")
def test_kernels_compile_for_gpus_that_are_not_here() -> None:
    """And come out as the page says, where it is the same Triton."""
    version, made = run_worker(None, ["sm_90"], [], 1)
    assert {row["kernel"] for row in made} == {kernel.name for kernel in KERNELS}
    made += run_worker(None, ["sm_80", "gfx942"], ["attend", "quantized_product"], 1)[1]
    kept = load_results().get(version, {})
    for row in made:
        assert row["faults"] == [], row
        assert 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255)
        assert row["shared"] <= TARGETS[row["target"]].shared
        same = [each for each in kept.get(row["target"], {}).get(row["kernel"], ()) if each.key == row["key"]]
        assert not kept or [(each.registers, each.shared) for each in same] == [
            (row["registers"], row["shared"])
        ]
    products = {row["target"]: row["units"] for row in made if row["kernel"] == "quantized_product"}
    assert products == {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}


@pytest.mark.skipif(not OLD.is_dir(), reason="no Triton 3.6 in .tools; .ci/run puts it there")
def test_the_triton_of_gpu_machines_compiles_them_too() -> None:
    version, made = run_worker(OLD, ["sm_90"], ["quantized_product", "round_to_fp8", "attend"], 1)
    assert version.startswith("3.6.")
    assert [row["faults"] for row in made] == [[], [], []]


def test_every_configuration_was_compiled_as_it_is() -> None:
    """By both Tritons, for all devices, as the kernels' sources and configurations are now; and nothing else
    was kept."""
    kept = load_results()
    assert len(kept) >= 2
    assert "3.6" in {version[:3] for version in kept}
    for version, by in kept.items():
        missing, old = [], []
        for name, target in TARGETS.items():
            for kernel in KERNELS:
                there = reachable(kernel, target)
                wanted = stale(by, kernel, target, there)
                missing += [f"{version} {name} {kernel.name} {each.label}" for each in wanted]
                now = {key(kernel, each) for each in there}
                rows = by.get(name, {}).get(kernel.name, [])
                old += [f"{version} {name} {kernel.name} {row.label}" for row in rows if row.key not in now]
        assert not missing + old, f"python -m benchmarks.gpu.compile: {(missing + old)[:3]}"


def test_nothing_spills_and_all_products_use_tensor_cores() -> None:
    wrong = [
        (version, target, kernel, row.label, row.faults)
        for version, targets in load_results().items()
        for target, by in targets.items()
        for kernel, rows in by.items()
        for row in rows
        if row.faults
    ]
    assert wrong == []


def test_a_key_is_of_a_kernel_its_callees_and_its_configuration() -> None:
    configurations = reachable(ATTEND, TARGETS["sm_90"])
    assert len({key(ATTEND, each) for each in configurations}) == len(configurations)
    one = configurations[0]
    assert key(ATTEND, one) == key(ATTEND, replace(one, label="another"))
    assert key(ATTEND, one) != key(ATTEND, replace(one, num_warps=16))
    assert key(ATTEND, one) != key(PRODUCT, one)
    used = dict(json.loads(source("attention_kernels", "attend")))
    assert {"attend", "product", "rounded", "INTERPRETED"} == set(used)
    assert "#" not in used["attend"]


# ---- what is chosen where ----


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_device_does_not_have_is_not_compiled_for_it(target: str) -> None:
    for kernel in KERNELS:
        for configuration in kernel.configurations():
            if chosen(kernel, configuration, TARGETS[target]):
                assert target != "sm_75" or configuration.traits.get("dtype") != "bf16"
                assert target != "sm_75" or not kernel.multiplies
                assert target in configuration.traits.get("targets", (target,))
    assert (not reachable(PRODUCT, TARGETS[target])) == (target == "sm_75")


def test_fp8_is_for_those_who_have_it() -> None:
    rounding = next(kernel for kernel in KERNELS if kernel.name == "round_to_fp8")
    assert [name for name in TARGETS if reachable(rounding, TARGETS[name])] == [
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_120",
    ]


@pytest.mark.parametrize("most", [1, 2, 5, 1000])
def test_samples_are_spread_over_the_usual_type(most: int) -> None:
    for kernel in KERNELS:
        picked, there = sample(kernel, TARGETS["sm_90"], most), len(reachable(kernel, TARGETS["sm_90"]))
        assert 1 <= len(picked) == min(most, len(picked)) <= there
        assert len({configuration.label for configuration in picked}) == len(picked)
        if most < there:
            assert {configuration.traits["dtype"] for configuration in picked} == {"bf16"}


# ---- what is read ----

PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd2 ];
    ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x8, %r6;
    cp.async.commit_group;
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
"""


def test_loads_by_their_width() -> None:
    assert loads(PTX) == {16: 3, 8: 1, 2: 1}
    amd = "global_load_dwordx4 v[0:3], v4\nbuffer_load_dword v1\nglobal_load_ushort v2\nglobal_load_ubyte v3"
    assert loads(amd) == {16: 1, 4: 1, 2: 1, 1: 1}


def test_the_best_unit_is_named() -> None:
    assert units(PTX) == "mma"
    assert units(PTX + "tcgen05.mma.cta_group::1.kind::f16 [ %r1 ]") == "tcgen05"
    assert units(PTX + "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16") == "wgmma"
    assert units("v_mfma_f32_32x32x8_bf16_1k") == "mfma"
    assert units("fma.rn.f32") == ""


def configuration(**traits: Any) -> Configuration:
    return Configuration("x", {}, {}, traits=traits)


@pytest.mark.parametrize(
    ("kernel", "target", "traits", "made", "words"),
    [
        (PRODUCT, "sm_80", {"dtype": "bf16"}, {"units": "mma"}, ()),
        (PRODUCT, "sm_80", {"dtype": "bf16"}, {"units": ""}, ("no tensor cores",)),
        (PRODUCT, "sm_80", {"dtype": "fp32"}, {"units": ""}, ()),
        (PRODUCT, "sm_90", {"dtype": "bf16", "tile": (64, 16)}, {"units": "mma"}, ("mma for a tile of 64",)),
        (PRODUCT, "sm_90", {"dtype": "bf16", "tile": (64, 16)}, {"units": "wgmma"}, ()),
        (PRODUCT, "sm_90", {"dtype": "bf16", "tile": (32, 16)}, {"units": "mma"}, ()),
        (PRODUCT, "sm_100", {"dtype": "bf16", "tile": (64, 16)}, {"units": "wgmma"}, ("not tcgen05",)),
        (PRODUCT, "sm_100", {"dtype": "bf16", "tile": (64, 16)}, {"units": "tcgen05"}, ()),
        (
            PRODUCT,
            "sm_86",
            {"dtype": "bf16"},
            {"units": "mma", "shared": 110_000},
            ("110000 bytes of shared",),
        ),
        (PRODUCT, "gfx942", {"dtype": "bf16"}, {"units": "mfma", "spilled": 3}, ("3 registers spilled",)),
        # with registers left: for one more program on a multiprocessor, or because ptxas gave up
        (PRODUCT, "sm_80", {"dtype": "bf16"}, {"units": "mma", "registers": 128, "spilled": 32}, ()),
        (
            PRODUCT,
            "sm_80",
            {"dtype": "bf16"},
            {"units": "mma", "registers": 40, "spilled": 40},
            ("40 bytes spilled",),
        ),
        (
            PRODUCT,
            "sm_80",
            {"dtype": "bf16"},
            {"units": "mma", "registers": 255, "spilled": 8},
            ("8 bytes spilled",),
        ),
        (ATTEND, "sm_80", {"dtype": "bf16"}, {"units": "mma", "widest": 8}, ("no loads of 16 bytes",)),
        (ATTEND, "sm_80", {"dtype": "bf16"}, {"units": "mma", "widest": 16}, ()),
    ],
)
def test_faults(
    kernel: Kernel, target: str, traits: dict[str, Any], made: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = faults(kernel, configuration(**traits), TARGETS[target], Compiled("x", **made))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


# ---- the page ----


def test_the_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text() == render(), "python -m benchmarks.gpu.compile --page"


@pytest.mark.parametrize(
    ("shape", "billions"), [("qwen3-0.6b", 0.596), ("qwen3-8b", 7.57), ("qwen3-32b", 31.98)]
)
def test_a_step_reads_the_weights_once_and_multiplies_with_each(shape: str, billions: float) -> None:
    """All parameters but those of an embedding that is only looked up, and of norms."""
    works = {work.kernel: work for work in roofline.step(shape, 1, False)}
    products = [work for name, work in works.items() if "product" in name or name == "output layer"]
    assert sum(work.flops for work in products) / 2e9 == pytest.approx(billions, rel=0.01)
    assert sum(work.bytes for work in products) / 2e9 == pytest.approx(billions, rel=0.01)
    half = {work.kernel: work for work in roofline.step(shape, 1, False, 8)}
    for name in ("down product", "gate and up product"):
        assert half[name].bytes == pytest.approx(works[name].bytes / 2, rel=0.01)
    assert half["output layer"] == works["output layer"]


def test_decoding_reads_every_requests_keys_and_values() -> None:
    config = SHAPES["qwen3-8b"]
    one, many = (
        next(work for work in roofline.step("qwen3-8b", batch, False) if work.kernel == "attention")
        for batch in (1, 64)
    )
    assert many.bytes == 64 * one.bytes
    cache = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert one.bytes == pytest.approx(cache * roofline.CONTEXT, rel=0.01)


def test_a_time_is_the_longer_of_two() -> None:
    limit = roofline.Limit("x", bandwidth=10.0, flops=100.0)
    assert roofline.Work("a", 20.0, 100.0).seconds(limit) == 2.0
    assert roofline.Work("a", 20.0, 400.0).seconds(limit) == 4.0


def test_results_lie_in_the_repository() -> None:
    assert Path(RESULTS).is_relative_to(ROOT)
