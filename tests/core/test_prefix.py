"""Which blocks of a request others may share: borders of blocks, of contents, and of requests."""

from __future__ import annotations

import pytest

from penstock.core.blocks import BlockPool, hash_block
from penstock.core.prefix import Prefixes
from penstock.core.request import Request
from penstock.core.request_spec import InputSpan, RequestSpec
from penstock.core.sampling_params import Sampling

from .world import World, config, request


def computed(prefixes: Prefixes, pool: BlockPool, spec: RequestSpec) -> list[int]:
    """Its blocks, all computed and offered."""
    one = next(iter(Request.of(spec)))
    one.blocks, one.computed = pool.allocate(pool.blocks_for(len(one.tokens))), len(one.tokens)
    prefixes.register(one)
    return one.blocks


def hits(prefixes: Prefixes, spec: RequestSpec) -> list[int]:
    return prefixes.hits(next(iter(Request.of(spec))))


@pytest.mark.parametrize(
    ("length", "found"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (16, 3)]
)
def test_at_least_one_token_is_left_to_compute(length: int, found: int) -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    table = computed(prefixes, pool, request("a", 16))
    assert hits(prefixes, request("b", length)) == table[:found]


def test_every_block_has_to_match() -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    prompt = list(range(1, 14))
    table = computed(prefixes, pool, request("a", prompt))
    for place in range(12):
        other = [*prompt[:place], 99, *prompt[place + 1 :]]
        assert hits(prefixes, request("b", other)) == table[: place // 4]


def test_the_hashes_are_those_that_blocks_are_defined_by() -> None:
    """h0 = H(salt, t[0:4]), h1 = H(h0, t[4:8]): others may compute them, too."""
    pool = BlockPool(16, 4)
    spec = request("a", 9, tenant="t")
    (one,) = Request.of(spec)
    assert Prefixes(pool, True).hits(one) == []
    first = hash_block(b"", one.tokens[:4], spec.salt)
    assert one.hashes == [first, hash_block(first, one.tokens[4:8])]


def test_a_block_is_hashed_when_it_is_full() -> None:
    """Who was looked up with less than a block is found by all of it later."""
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    (one,) = Request.of(request("a", [1, 2]))
    assert prefixes.hits(one) == []
    assert one.hashes == []
    one.tokens += [3, 4, 5]
    one.blocks, one.computed = pool.allocate(2), 5
    prefixes.register(one)
    assert hits(prefixes, request("b", [1, 2, 3, 4, 5])) == one.blocks[:1]
    assert hits(prefixes, request("c", [1, 2, 3, 9, 5])) == []


def test_only_what_is_computed_is_offered() -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    (one,) = Request.of(request("a", 13))
    one.blocks = pool.allocate(4)
    for count, offered in ((3, 0), (4, 1), (7, 1), (8, 2), (13, 3)):
        one.computed = count
        prefixes.register(one)
        assert one.registered == offered
        assert hits(prefixes, request("b", 13)) == one.blocks[:offered]
    one.computed = 16  # three tokens under way, which nobody knows yet
    prefixes.register(one)
    assert one.registered == 3


def test_generated_tokens_are_a_prefix_too_even_for_who_asks_for_prompt_logprobs() -> None:
    """After a preemption: the prompt's were told, so its positions need not pass through the model again."""
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    table = computed(prefixes, pool, request("a", 9))
    (one,) = Request.of(request("b", 9, sampling=Sampling(prompt_logprobs=0)))
    assert prefixes.hits(one) == []
    one.tokens.append(5)
    assert prefixes.hits(one) == table[:2]


@pytest.mark.parametrize(
    ("span", "found"),
    [
        (InputSpan(4, 4, "x"), 1),  # all of the second block
        (InputSpan(0, 1, "x"), 0),
        (InputSpan(3, 1, "x"), 0),  # the last position of the first
        (InputSpan(3, 6, "x"), 0),
        (InputSpan(7, 1, "x"), 1),
        (InputSpan(8, 1, "x"), 2),
    ],
)
def test_a_block_is_another_one_where_a_content_touches_it(span: InputSpan, found: int) -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    plain = computed(prefixes, pool, request("a", 13))
    assert hits(prefixes, request("b", 13, inputs=(span,))) == plain[:found]
    table = computed(prefixes, pool, request("c", 13, inputs=(span,)))
    assert hits(prefixes, request("d", 13, inputs=(span,))) == [*plain[:found], *table[found:3]]
    assert len({*plain[:3], *table[found:3]}) == 6 - found


@pytest.mark.parametrize("change", [{"digest": "y"}, {"length": 3}, {"start": 1}])
def test_a_content_is_its_place_its_length_and_its_hash(change: dict[str, object]) -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    span = {"start": 0, "length": 2, "digest": "x"}
    computed(prefixes, pool, request("a", 5, inputs=(InputSpan(**span),)))  # type: ignore[arg-type]
    other = InputSpan(**{**span, **change})  # type: ignore[arg-type]
    assert hits(prefixes, request("b", 5, inputs=(other,))) == []


def test_a_content_counts_from_its_block_on() -> None:
    """The same picture in the second block of both: what is before it stands in its block's parent."""
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    table = computed(prefixes, pool, request("a", prompt, inputs=(InputSpan(5, 2, "x"),)))
    assert hits(prefixes, request("b", prompt, inputs=(InputSpan(5, 2, "x"),))) == table[:2]
    assert hits(prefixes, request("c", prompt, inputs=(InputSpan(6, 2, "x"),))) == table[:1]


def test_without_prefix_caching_only_siblings_share() -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, False)
    alone = computed(prefixes, pool, request("a", 9))
    assert hits(prefixes, request("a", 9)) == []
    pool.release(alone)
    assert pool.cached == 0
    table = computed(prefixes, pool, request("b", 9, n=2))
    assert hits(prefixes, request("b", 9, n=2)) == table[:2]
    assert hits(prefixes, request("c", 9, n=2)) == []
    pool.release(table)
    assert pool.cached == 2


def test_siblings_take_the_prompts_hashes_from_their_leader_and_no_others() -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, True)
    leader, sibling = Request.of(request("a", [1, 2, 3, 4, 5, 6], n=2))
    leader.tokens = [1, 2, 3, 4, 5, 6, 7, 7, 7]
    sibling.tokens = [1, 2, 3, 4, 5, 6, 8, 8, 8, 8, 8, 8, 8]
    leader.blocks, leader.computed = pool.allocate(3), 9
    prefixes.register(leader)
    assert len(leader.hashes) == 2
    assert prefixes.hits(sibling) == leader.blocks[:1]
    sibling.blocks = [leader.blocks[0], *pool.allocate(3)]
    for count in (8, 12, 13):  # as it grows
        sibling.computed = count
        prefixes.register(sibling)
    wanted = [hash_block(b"", [1, 2, 3, 4], sibling.spec.salt)]
    wanted.append(hash_block(wanted[0], [5, 6, 8, 8]))
    wanted.append(hash_block(wanted[1], [8, 8, 8, 8]))
    assert sibling.hashes == wanted
    assert sibling.hashes[0] is leader.hashes[0]  # hashed once
    assert pool.lookup(wanted) == [leader.blocks[0], *sibling.blocks[1:3]]


def test_without_prefix_caching_siblings_of_another_prompt_do_not_share() -> None:
    pool = BlockPool(16, 4)
    prefixes = Prefixes(pool, False)
    prompt = request("a", 9).prompts[0]
    spec = RequestSpec(id="a", prompts=(prompt, prompt), sampling=Sampling(), n=2)
    first, sibling, second, _ = Request.of(spec)
    first.blocks, first.computed = pool.allocate(3), 9
    prefixes.register(first)
    assert prefixes.hits(sibling) == first.blocks[:2]
    assert prefixes.hits(second) == []


def test_what_is_found_is_counted() -> None:
    world = World(config(max_num_batched_tokens=64), num_blocks=32)
    world.add(request("a", 13, max_tokens=1))
    world.add(request("b", 13, max_tokens=1))
    world.add(request("c", 13, max_tokens=1, sampling=Sampling(prompt_logprobs=0)))
    world.run()
    totals = world.scheduler.totals
    assert (totals.prefix_queries, totals.prefix_hits, totals.cached_tokens) == (39, 12, 12)
    assert (totals.prompt_tokens, totals.generation_tokens, totals.recomputed_tokens) == (27, 3, 0)
    assert totals.steps == 1


def test_a_preempted_request_is_looked_up_once() -> None:
    world = World(config(watermark=0.0), num_blocks=8)
    world.add(request("old", [1, 2, 3, 4], max_tokens=26))
    world.add(request("young", list(range(50, 66)), max_tokens=8))
    world.run()
    totals = world.scheduler.totals
    assert totals.preemptions == 1
    assert (totals.prefix_queries, totals.prefix_hits, totals.cached_tokens) == (20, 0, 0)
