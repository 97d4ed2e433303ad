"""Memory of several engines on one device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import MemoryBudgetError
from penstock.model.together import Need, share

MIB = 1 << 20


def need(name: str = "a", **given: int | None) -> Need:
    sizes: dict[str, int | None] = {
        "process": 100 * MIB,
        "weights": 50 * MIB,
        "activations": 10 * MIB,
        "least": 8 * MIB,
        "most": 512 * MIB,
        "block": MIB,
    }
    return Need(name=name, **{**sizes, **given})  # type: ignore[arg-type]


def test_where_there_is_enough_everybody_gets_all_that_is_of_use() -> None:
    shares = share([need("a"), need("b", replicas=2)], device="cpu", available=100_000 * MIB)
    assert shares.kv_caches == (512 * MIB, 512 * MIB)
    assert shares.total == 3 * (160 + 512) * MIB


def test_what_is_left_is_shared_in_proportion() -> None:
    needs = [need("a"), need("b", most=260 * MIB)]
    shares = share(needs, device="cpu", available=1000 * MIB)  # limit 500; 320 + 16 are needed; 164 are left
    (a, b) = shares.kv_caches
    assert (a - 8 * MIB) / (b - 8 * MIB) == pytest.approx(2.0, rel=0.05)
    assert 498 * MIB <= shares.total <= 500 * MIB


def test_sizes_that_were_given_stand() -> None:
    needs = [need("a", given=300 * MIB), need("b")]
    shares = share(needs, device="cpu", available=1000 * MIB)
    assert shares.kv_caches == (300 * MIB, 8 * MIB)  # over the limit of 500, so the other gets its least
    assert shares.total == 628 * MIB


def test_models_that_do_not_fit_together_are_refused_with_the_table() -> None:
    needs = [need("small"), need("large", weights=4000 * MIB, replicas=2)]
    with pytest.raises(MemoryBudgetError) as caught:
        share(needs, device="cpu", available=8000 * MIB)
    message = str(caught.value)
    assert "do not fit together: they take 8.21 GiB at least, and 7.42 GiB of the 7.81 GiB" in message
    assert "large" in message
    assert "small" in message
    assert "max_model_len" in caught.value.advice


def test_the_table() -> None:
    table = share([need("demo", replicas=2)], device="cpu", available=10_000 * MIB).render().splitlines()
    assert table[0] == "Memory (cpu), all models together"
    assert table[2].split() == "demo 100.00 MiB 50.00 MiB 10.00 MiB 512.00 MiB 2 1.31 GiB".split()
    assert table[-1].split() == "free 8.45 GiB of 9.77 GiB".split()
    assert len({len(line) for line in table[1:4]}) == 1  # columns are aligned


SIZES = st.integers(0, 1000).map(lambda size: size * MIB)


@st.composite
def needs(draw: st.DrawFn) -> Need:
    block = draw(st.integers(1, 64)) * 1024
    least = block * draw(st.integers(1, 100))
    return need(
        process=draw(SIZES),
        weights=draw(SIZES),
        activations=draw(SIZES),
        least=least,
        most=least + block * draw(st.integers(0, 10_000)),
        block=block,
        replicas=draw(st.integers(1, 4)),
        given=draw(st.none() | SIZES),
    )


@given(st.lists(needs(), min_size=1, max_size=5), SIZES.map(lambda size: size * 20))
def test_nobody_gets_less_than_a_request_needs_and_all_together_no_more_than_there_is(
    all_needs: list[Need], available: int
) -> None:
    try:
        shares = share(all_needs, device="cpu", available=available)
    except MemoryBudgetError:
        least = sum(
            each.replicas * (each.fixed + (each.least if each.given is None else each.given))
            for each in all_needs
        )
        assert least > 0.94 * available
        return
    assert shares.total <= available
    for each, cache in zip(all_needs, shares.kv_caches, strict=True):
        if each.given is not None:
            assert cache == each.given
        else:
            assert each.least <= cache <= each.most
            assert cache % each.block == 0
    assert share(all_needs, device="cpu", available=available) == shares
