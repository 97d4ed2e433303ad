"""The catalogue of hardware, and which slices can lie on one device."""

from __future__ import annotations

import datetime
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.fleet import catalogue
from penstock.fleet.hardware import GIB, MigProfile, pack

A100 = catalogue.find_device("A100-80GB")


def profiles(*names: str) -> list[MigProfile]:
    return [next(each for each in A100.mig if each.name == name) for name in names]


@pytest.mark.parametrize(
    "name", ["V100-16GB", "T4", "A10G", "L4", "L40S", "A100-40GB", "A100-80GB", "H100", "H200", "B200", "cpu"]
)
def test_what_there_must_be_is_there(name: str) -> None:
    device = catalogue.find_device(name)
    assert device.memory > 0
    assert device.bandwidth > 0
    assert device.rate > 0
    assert device.source


@pytest.mark.parametrize("device", catalogue.devices().values(), ids=lambda device: device.name)
def test_every_price_has_a_date_and_a_source(device: catalogue.Device) -> None:
    for price in device.prices:
        assert datetime.date(2026, 1, 1) <= price.as_of <= datetime.date(2026, 12, 31)
        assert price.source
        assert price.what
        assert 0 < price.per_hour < 100 * 10**9
    if device.prices:
        assert device.price is not None
        assert device.price.as_of == max(price.as_of for price in device.prices)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("a100", "A100-80GB"), ("NVIDIA-H100", "H100"), ("V100", "V100-16GB"), ("l4-24gb", "L4")],
)
def test_spellings(spelling: str, name: str) -> None:
    assert catalogue.find_device(spelling).name == name


def test_an_unknown_device_lists_the_others() -> None:
    with pytest.raises(
        StartupError, match=r"'RTX-9090' is not in the catalogue of hardware. It has V100-16GB, .*B200"
    ):
        catalogue.find_device("RTX-9090")


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        (("3g.40gb", "3g.40gb"), True),  # 6 of 7 compute slices
        (("4g.40gb", "3g.40gb"), True),  # all 7
        (("4g.40gb", "4g.40gb"), False),
        (("3g.40gb",) * 3, False),
        (("2g.20gb",) * 3, True),
        (("2g.20gb",) * 4, False),
        (("1g.10gb",) * 7, True),
        (("1g.10gb",) * 8, False),
        (("1g.20gb",) * 4, True),
        (("3g.40gb", "2g.20gb", "2g.20gb"), True),
        (("3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"), True),
        (("4g.40gb", "2g.20gb", "1g.10gb"), True),
        (("3g.40gb", "1g.20gb", "1g.20gb"), True),
        (("7g.80gb",), True),
        (("7g.80gb", "1g.10gb"), False),
        ((), True),
    ],
)
def test_which_slices_lie_on_an_a100_together(names: tuple[str, ...], fits: bool) -> None:
    """NVIDIA's MIG user guide, and the documents' trap T18."""
    for order in set(itertools.permutations(names)) if len(names) < 5 else [names]:
        assert (pack(profiles(*order)) is not None) == fits


@given(st.lists(st.sampled_from(A100.mig), max_size=7))
def test_what_is_placed_does_not_overlap(chosen: list[MigProfile]) -> None:
    starts = pack(chosen)
    if starts is None:
        return
    taken: set[int] = set()
    for profile, start in zip(chosen, starts, strict=True):
        slices = set(range(start, start + profile.memory_slices))
        assert start in profile.placements
        assert not taken & slices
        assert max(slices) < 8
        taken |= slices
    assert sum(profile.compute for profile in chosen) <= 7


def test_a_slice_is_a_smaller_device() -> None:
    profile = profiles("3g.40gb")[0]
    half = A100.sliced(profile)
    assert half.memory == int(39.25 * GIB)
    assert half.bandwidth == A100.bandwidth / 2
    assert half.rate == pytest.approx(A100.rate * 42 / 98)
    assert half.node == 1
    assert profile.resource == "nvidia.com/mig-3g.40gb"


def test_sizes_that_no_driver_was_asked_for_are_marked() -> None:
    marked = {device.name for device in catalogue.devices().values() for each in device.mig if each.estimated}
    assert marked == {"H200", "B200"}
