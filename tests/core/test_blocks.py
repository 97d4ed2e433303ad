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


@pytest.mark.parametrize(("blocks", "size"), [(0, 1), (1, 0), (-1, 4), (4, -1)])
def test_there_is_a_block_and_it_holds_a_token(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"at least one block of one token, got {blocks} of {size}"):
        BlockPool(blocks, size)
    assert BlockPool(1, 1).available == 1


def test_a_block_has_one_content_and_a_content_one_block() -> None:
    pool = BlockPool(4, 2)
    first, twin = pool.allocate(2)
    one, other = hash_block(b"", [1, 2]), hash_block(b"", [3, 4])
    pool.register(first, one)
    pool.register(first, other)
    assert (pool.lookup([one]), pool.lookup([other])) == ([first], [])
    pool.register(twin, one)
    assert pool.lookup([one]) == [first]
    pool.check([[first, twin]])
    pool.release([first, twin])
    assert (pool.cached, pool.available) == (1, 4)


def test_what_is_worthless_is_found_no_more() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(3)
    hashes = chain([1, 2, 3, 4, 5, 6], 2)
    for block, digest in zip(table, hashes, strict=True):
        pool.register(block, digest)
    pool.release(table[2:])
    pool.unregister([table[0], table[2]])
    assert (pool.cached, pool.available) == (0, 2)
    pool.check([table[:2]])
    assert pool.lookup(hashes[:1]) == []
    assert pool.lookup(hashes[1:]) == table[1:2]
    pool.unregister_all()
    assert pool.lookup(hashes[1:]) == []
    pool.check([table[:2]])


def test_figures_of_a_pool() -> None:
    pool = BlockPool(8, 4)
    assert [pool.blocks_for(count) for count in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    table = pool.allocate(2)
    assert (pool.usage, pool.available, pool.cached) == (0.25, 6, 0)
    pool.register(table[0], hash_block(b"", [1, 2, 3, 4]))
    assert pool.unreferenced(table) == 0
    pool.release(table)
    assert (pool.usage, pool.available, pool.cached) == (0.0, 8, 1)
    assert pool.unreferenced(table) == 2
    pool.share(table[:1])
    assert (pool.usage, pool.cached) == (0.125, 0)
    pool.share(table[:1])
    pool.release(table[:1])
    pool.check([table[:1]])
    pool.reset()
    assert (pool.available, pool.cached, pool.lookup([hash_block(b"", [1, 2, 3, 4])])) == (8, 0, [])
    assert pool.allocate(3) == [0, 1, 2]  # from the first, so that plans are the same


def test_the_content_of_a_block_enters_its_hash() -> None:
    plain = hash_block(b"", [1], "salt")
    assert hash_block(b"", [1], "salt", "cat") not in (plain, hash_block(b"", [1], "salt", "dog"))
    assert hash_block(plain, [2], content="cat") != hash_block(plain, [2])
    assert hash_block(plain, [2], "salt") == hash_block(plain, [2])  # the parent has it already
    assert len(plain) == 16


BROKEN = {
    "free twice": lambda pool: pool._free.append(pool._free[0]),
    "lost or doubled": lambda pool: pool._free.pop(),
    "both free and cached": lambda pool: (pool._cached.__setitem__(pool._free[0], None), pool._free.pop()),
    "has -1 references": lambda pool: pool._references.__setitem__(pool._free[0], -1),
    "misplaced": lambda pool: (pool._free.append(0), pool._free.remove(pool._free[0])),
    "free block . is indexed": lambda pool: pool._hash_of.__setitem__(pool._free[0], b"x"),
    "is not indexed": lambda pool: pool._hash_of.__setitem__(1, None),
    "index misses block": lambda pool: pool._index.clear(),
    "entries without a block": lambda pool: pool._index.__setitem__(b"y", 3),
}


@pytest.mark.parametrize("said", BROKEN)
def test_the_check_sees_what_is_broken(said: str) -> None:
    pool = BlockPool(6, 2)
    table = pool.allocate(3)
    pool.register(table[1], hash_block(b"", [1, 2]))
    pool.release([table[1]])
    pool.check([[0, 2]])
    BROKEN[said](pool)
    with pytest.raises(AssertionError, match=said):
        pool.check()


def test_the_check_compares_with_the_tables() -> None:
    pool = BlockPool(6, 2)
    table = pool.allocate(2)
    pool.share(table[:1])
    pool.check([table, table[:1]])
    pool.check()  # without them it cannot
    with pytest.raises(AssertionError, match="differ from the block tables"):
        pool.check([table])
