"""BlockPool: every block is in exactly one place, and equal prefixes are found again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.blocks import BlockPool, hash_block


def chain(tokens: list[int], size: int, salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - size + 1, size):
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[start : start + size], salt))
    return hashes


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["take", "drop", "index", "share"]), st.integers(0, 9)), max_size=60),
)
def test_random_use_keeps_the_invariants(total: int, operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(total, 4)
    tables: list[list[int]] = []
    serial = 0
    for what, number in operations:
        if what == "take" and number <= pool.available:
            tables.append(pool.allocate(number))
        elif what == "drop" and tables:
            pool.release(tables.pop(number % len(tables)))
        elif what == "index" and tables:
            for block in tables[number % len(tables)]:
                serial += 1
                pool.register(block, hash_block(b"", [serial]))
        elif what == "share" and tables:
            tables.append(list(tables[number % len(tables)]))
            pool.share(tables[-1])
        pool.check(tables)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.available == total


def test_a_prefix_is_found_as_far_as_it_matches() -> None:
    pool = BlockPool(8, 2)
    tokens = [1, 2, 3, 4, 5, 6]
    table = pool.allocate(3)
    for block, digest in zip(table, chain(tokens, 2), strict=True):
        pool.register(block, digest)
    pool.release(table)
    assert pool.cached == 3
    assert pool.lookup(chain(tokens, 2)) == table
    assert pool.lookup(chain([1, 2, 3, 9], 2)) == table[:1]
    assert pool.lookup(chain([9, 2, 3, 4], 2)) == []
    assert pool.lookup(chain(tokens, 2, salt="other tenant")) == []


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(3, 2)
    hashes = chain([1, 2, 3, 4, 5, 6], 2)
    table = pool.allocate(3)
    for block, digest in zip(table, hashes, strict=True):
        pool.register(block, digest)
    pool.release(table)
    pool.allocate(1)
    assert pool.lookup(hashes) == table[:2]


def test_the_least_recently_released_sequence_is_evicted_first() -> None:
    pool = BlockPool(2, 1)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], hash_block(b"", [1]))
    pool.register(second[0], hash_block(b"", [2]))
    pool.release(second)
    pool.release(first)
    pool.allocate(1)
    assert pool.lookup([hash_block(b"", [1])]) == first
    assert pool.lookup([hash_block(b"", [2])]) == []


def test_asking_for_too_much_takes_nothing() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(ValueError, match="asked for 3 blocks, 2 are available"):
        pool.allocate(3)
    assert pool.available == 2


def test_hashes_do_not_depend_on_the_process() -> None:
    assert hash_block(b"", [1, 2, 3], "salt").hex() == "05a868077462b8ef096cf01de3a87711"
    assert hash_block(hash_block(b"", [1]), [2]).hex() == "30e044a502cd42b316b95c377f814a2a"
