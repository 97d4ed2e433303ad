"""What the door decides, as pure functions: properties over all inputs, and the rules at their borders."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ModelNotFound
from penstock.gateway.policy.affinity import (
    BLOCK,
    MOST_BLOCKS,
    SLACK,
    Candidate,
    Prefixes,
    choose,
    prefix_hashes,
)
from penstock.gateway.policy.amounts import NANO, Limit
from penstock.gateway.policy.health import EJECTION, FORGOTTEN, IN_A_ROW, RECENT, WARM_UP, Health, Progress
from penstock.gateway.policy.limits import Entitlements, caps
from penstock.gateway.policy.price import Pace, Share, Used, by_device, by_tokens
from penstock.gateway.policy.retries import Attempt, ejects, pause
from penstock.gateway.policy.routes import Book, Forbidden, order, shadows
from penstock.spec.load import loads
from penstock.spec.model import Limits, Price

SPEC = loads("""
pools:
  box: {hardware: H100, count: 2, price_per_hour: 2.50}
models:
  tiny: {weights: demo, pool: box, max_model_len: 2048}
  spare: {weights: demo, pool: box}
upstreams:
  cloud:
    url: https://api.example.org/v1
    models:
      large: {name: large-2026, context: 100000, price: {input: 1, output: 4, as_of: 2026-11-01, source: x}}
      mini: {}
routes:
  mix:
    targets: [{model: tiny, weight: 95}, {model: mini, upstream: cloud, weight: 5}]
    fallback: [{model: large, upstream: cloud}]
    shadow: [{model: spare, weight: 0.25}, {model: mini, upstream: cloud}]
    aliases: [classify-intent]
    comparator: {model: large, upstream: cloud}
  out: {targets: [{model: large, upstream: cloud}]}
  special:
    targets: [{model: spare}]
    match: [{headers: {X-Lane: fast}, tags: {feature: search}}]
teams:
  red:
    routes: [mix, tiny]
    limits: {dollars_per_month: 100}
    key_limits: {requests_per_minute: 7}
  blue: {local_only: true}
tags:
  feature: {search: {limits: {tokens_per_minute: 50}}, secret: {local_only: true}}
limits: {requests_per_minute: 60}
""")
BOOK = Book(SPEC)


# ---- routes ----


def test_names_aliases_and_models_lead_somewhere() -> None:
    assert BOOK.find("mix", {}, {}).name == "mix"
    assert BOOK.find("classify-intent", {}, {}).name == "mix"
    tiny = BOOK.find("tiny", {}, {})
    (place,) = tiny.targets
    assert (place.local, place.model, place.context, place.device) == (True, "tiny", 2048, "H100")
    assert place.device_price == 2_500_000_000
    (large,) = BOOK.find("out", {}, {}).targets
    assert (large.model, large.device, large.in_house, large.kind) == ("large-2026", "", False, "openai")
    with pytest.raises(ModelNotFound):
        BOOK.find("large", {}, {})  # of a cloud: only by a route


def test_a_match_takes_requests_whatever_they_name_if_all_of_it_fits() -> None:
    assert BOOK.find("mix", {"x-lane": "fast"}, {"feature": "search"}).name == "special"
    assert BOOK.find("nothing", {"x-lane": "fast"}, {"feature": "search"}).name == "special"
    assert BOOK.find("mix", {"x-lane": "fast"}, {"feature": "other"}).name == "mix"
    assert BOOK.find("mix", {"x-lane": "slow"}, {"feature": "search"}).name == "mix"


def test_a_key_may_go_where_it_and_its_team_may() -> None:
    for model, team, routes, allowed in (
        ("mix", "", None, True),
        ("mix", "red", None, True),
        ("out", "red", None, False),
        ("out", "", ("mix",), False),
        ("tiny", "red", ("mix",), False),
        ("classify-intent", "red", ("mix",), True),
    ):
        if allowed:
            assert BOOK.find(model, {}, {}, team, routes)
        else:
            with pytest.raises(Forbidden) as caught:
                BOOK.find(model, {}, {}, team, routes)
            assert caught.value.status == 403
    assert [name for name, _ in BOOK.names("red", ("mix",))] == ["mix", "classify-intent"]


def test_what_must_not_leave_does_not_leave() -> None:
    mix = BOOK.find("mix", {}, {})
    targets, fallback = mix.places(True)
    assert [place.name for place in (*targets, *fallback)] == ["tiny"]
    assert len(mix.places(False)[0]) == 2
    with pytest.raises(Forbidden) as caught:
        BOOK.find("out", {}, {}).places(True)
    assert caught.value.code == "local_only"
    assert BOOK.team_local_only("blue")
    assert not BOOK.team_local_only("red")
    assert BOOK.tags_local_only({"feature": "secret"})
    assert not BOOK.tags_local_only({"feature": "search", "other": "secret"})
    assert [place.name for place in shadows(mix, True, [0.0, 0.0])] == ["spare"]


def test_weights_are_shares_of_the_first_places() -> None:
    mix = BOOK.find("mix", {}, {})
    grid = [(number + 0.5) / 200 for number in range(200)]
    first = Counter(order(mix.targets, mix.fallback, (u, v))[0].name for u in grid for v in grid)
    assert math.isclose(first["cloud"] / 200**2, 0.05, abs_tol=0.005)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2))
def test_every_place_is_asked_once_and_fallbacks_come_last(draws: list[float]) -> None:
    mix = BOOK.find("mix", {}, {})
    places = order(mix.targets, mix.fallback, draws)
    assert sorted(places[:2], key=repr) == sorted(mix.targets, key=repr)
    assert places[2:] == mix.fallback


def test_shadows_are_drawn() -> None:
    mix = BOOK.find("mix", {}, {})
    assert [place.name for place in shadows(mix, False, [0.24, 0.99])] == ["spare", "cloud"]
    assert [place.name for place in shadows(mix, False, [0.26, 0.5])] == ["cloud"]


# ---- limits ----


def test_a_request_meets_the_limits_of_key_team_and_tag() -> None:
    entitled = Entitlements(SPEC)
    assert entitled.of("k", "", {}) == (Limit("key:k", "requests", "minute", 60),)
    month = Limit("team:red", "dollars", "month", 100 * NANO)
    assert entitled.of("k", "red", {}) == (Limit("key:k", "requests", "minute", 7), month)
    search = Limit("tag:feature=search", "tokens", "minute", 50)
    assert entitled.of("k", "red", {"feature": "search"}, Limits()) == (month, search)
    own = Limits(concurrent_requests=0, gpu_hours_per_day=0.5, device_seconds_per_day=100)
    assert entitled.of("k", "blue", {"feature": "unknown"}, own) == (
        Limit("key:k", "concurrent", "now", 0),
        Limit("key:k", "device_seconds", "day", 100 * NANO),
    )


def test_every_field_of_limits_is_a_limit() -> None:
    for name in Limits.model_fields:
        (limit,) = caps("x", Limits(**{name: 3}))
        assert limit.cap > 0, name


# ---- prices ----

PRICE = Price(input="0.15", output="0.60", cached_input="0.075", as_of="2026-11-01", source="list")


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_tokens_cost_what_the_list_says_to_the_nanodollar(read: int, written: int, cached: int) -> None:
    dollars = by_tokens(PRICE, Used(read, written, cached))
    used = min(cached, read)
    exact = Fraction((read - used) * 150_000 + used * 75_000 + written * 600_000, 1000)
    assert abs(dollars - exact) <= Fraction(1, 2)


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**13), max_size=20))
def test_device_time_costs_its_share_of_the_hour(price: int, times: list[int]) -> None:
    assert by_device(price, 3600 * NANO) == price
    exact = Fraction(price * sum(times), 3600 * NANO)
    assert abs(sum(by_device(price, each) for each in times) - exact) <= Fraction(len(times) + 1, 2)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_shares_of_an_engine_add_up_to_its_busy_time(steps: list[tuple[float, bool]]) -> None:
    share, now, busy = Share(), 100.0, 0.0
    running: list[float] = []
    charged = 0.0
    for wait, begins in steps:
        now += wait
        busy += wait if running else 0.0
        if begins or not running:
            running.append(share.begin(now))
        else:
            charged += share.end(running.pop(0), now)
    while running:
        charged += share.end(running.pop(), now)
    assert math.isclose(charged, busy, abs_tol=1e-6)


def test_a_pace_is_twice_the_largest_that_was_seen_and_forgets_slowly() -> None:
    pace = Pace()
    assert pace.worst(10) == 10 * 50_000_000
    pace.seen(100, 1_000_000)
    assert pace.worst(10) == 200_000
    pace.seen(0, 5)
    for _ in range(2000):
        pace.seen(100, 100)
    assert 20 <= pace.worst(10) <= 2000


# ---- retries and health ----


def test_pauses_grow_are_drawn_and_follow_what_the_upstream_asks_for() -> None:
    reset = Attempt("reset")
    assert pause(1, reset, 0.99, elsewhere=True) == 0
    assert [pause(number, reset, 1.0, elsewhere=False) for number in (1, 2, 3, 10)] == [0.1, 0.2, 0.4, 5.0]
    assert pause(3, reset, 0.0, elsewhere=False) == 0
    asked = Attempt("status", 429, 2.0)
    assert pause(1, asked, 0.5, elsewhere=False) == pytest.approx(2.05)
    assert pause(1, asked, 0.5, elsewhere=True) == 0
    assert pause(1, Attempt("status", 429, 60.0), 0.5, elsewhere=False) is None
    assert not ejects(asked)
    assert not ejects(Attempt("status", 401))
    assert ejects(Attempt("status", 500))
    assert ejects(reset)


def test_a_replica_that_fails_is_left_alone_for_longer_and_longer_and_comes_back_slowly() -> None:
    health, now, times = Health(), 0.0, []
    assert health.weight(now) == 1
    for _ in range(IN_A_ROW - 1):
        health.failed(now)
        assert health.weight(now) == 1
    for _ in range(9):  # once out, the next failure is enough
        health.failed(now)
        assert health.weight(now) == 0
        times.append(health.ejected_until - now)
        now = health.ejected_until
        assert 0 < health.weight(now) <= 0.1
    assert times[:4] == [EJECTION, 2 * EJECTION, 4 * EJECTION, 8 * EJECTION]
    assert times[-1] == 300
    assert health.weight(now + WARM_UP / 2) == pytest.approx(0.5)
    assert health.weight(now + WARM_UP) == 1
    health.succeeded(health.failed_at + FORGOTTEN + 1)
    assert health.ejections == 0


def test_one_of_two_failing_is_out_and_a_few_among_many_are_not() -> None:
    flaky, fine = Health(), Health()
    for number in range(RECENT):
        (flaky.failed if number % 2 else flaky.succeeded)(0.0)
        (fine.failed if number % 4 == 0 else fine.succeeded)(0.0)
    assert flaky.weight(0.0) == 0
    assert fine.weight(0.0) == 1


def test_a_probe_takes_out_and_brings_back() -> None:
    health = Health()
    health.probed(False, 1.0)
    assert health.weight(1.0) == 0
    health.probed(True, 50.0)
    assert health.weight(50.0) == pytest.approx(0.1)
    assert health.weight(60.0) == 1
    for _ in range(3):
        health.failed(60.0)
    health.started(61.0)
    assert health.weight(61.0) > 0


def test_an_engine_that_computes_nothing_though_it_has_requests_is_stuck() -> None:
    progress = Progress(patience=30)
    assert progress.seen(2, 100, 0)
    assert progress.seen(2, 100, 29)
    assert not progress.seen(2, 100, 30)
    assert progress.seen(2, 101, 31)
    assert progress.seen(0, 101, 100)
    assert progress.seen(1, 101, 101)  # just begun
    assert not progress.seen(1, 101, 131)


# ---- affinity ----


def test_equal_beginnings_have_equal_hashes() -> None:
    long = bytes(range(256)) * 300
    hashes = prefix_hashes(long)
    assert len(hashes) == MOST_BLOCKS
    assert prefix_hashes(long[: 3 * BLOCK + 100]) == hashes[:3]
    other = prefix_hashes(long[:BLOCK] + b"x" + long[BLOCK + 1 :])
    assert other[0] == hashes[0]
    assert not set(other[1:]) & set(hashes)
    assert prefix_hashes(long, b"salt")[0] != hashes[0]
    assert prefix_hashes(b"short") == ()


def test_prefixes_are_bounded_and_forget_the_ends_of_chains_first() -> None:
    prefixes = Prefixes(most=10)
    first, second = prefix_hashes(b"a" * BLOCK * 6), prefix_hashes(b"b" * BLOCK * 6)
    prefixes.add(first)
    assert prefixes.match(first) == 6
    prefixes.add(second)
    assert len(prefixes) == 10
    assert (prefixes.match(second), prefixes.match(first)) == (6, 4)


candidates = st.lists(
    st.builds(
        Candidate,
        id=st.text(min_size=1, max_size=4),
        in_flight=st.integers(0, 30),
        most=st.integers(0, 30),
        weight=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        waiting=st.integers(0, 30),
        kv_usage=st.floats(0, 1),
        matched=st.integers(0, 128),
    ),
    max_size=6,
)


@given(candidates, st.floats(0, 1, exclude_max=True), st.none() | st.text(max_size=5))
def test_who_is_chosen_can_take_a_request_and_is_well_if_anybody_is(
    among: list[Candidate], draw: float, session: str | None
) -> None:
    index = choose(among, draw, session)
    free = [each for each in among if each.in_flight < each.most]
    if index is None:
        assert not free
        return
    assert among[index] in free
    assert among[index].weight > 0 or not any(each.weight > 0 for each in free)


@given(st.integers(2, 8), st.integers(1, 100), st.randoms(use_true_random=False))
def test_a_hot_prefix_stays_at_home_until_it_spills_over(
    replicas: int, requests: int, random: object
) -> None:
    """All requests have one prefix: no replica ever gets more than its bound."""
    hashes = prefix_hashes(b"hot" * 1000)
    prefixes = [Prefixes() for _ in range(replicas)]
    flying = [0] * replicas
    for number in range(requests):
        among = [
            Candidate(str(index), flying[index], 10_000, 1.0, matched=prefixes[index].match(hashes))
            for index in range(replicas)
        ]
        index = choose(among, random.random())  # type: ignore[attr-defined]
        assert index is not None
        flying[index] += 1
        prefixes[index].add(hashes)
        assert flying[index] <= math.ceil(SLACK * (number + 1) / replicas) + 1
    if requests <= 2:
        assert max(flying) == requests  # with little to do, everything goes where the prefix is


def test_an_idle_fleet_follows_the_prefix_and_a_session_its_replica() -> None:
    idle = [Candidate(name, 0, 10, 1.0, matched=matched) for name, matched in (("a", 0), ("b", 9), ("c", 3))]
    assert choose(idle, 0.99) == 1
    alone = {choose(idle, 0.0, f"session {number}") for number in range(50)}
    assert alone == {0, 1, 2}
    home = choose(idle, 0.0, "me")
    assert home is not None
    without = [each for index, each in enumerate(idle) if index != home]
    moved = choose(without, 0.0, "me")
    assert moved is not None
    assert [choose(idle, draw / 10, "me") for draw in range(10)] == [home] * 10


@pytest.mark.parametrize(
    ("engine", "flags", "told"),
    [
        ("vllm", "{scheduling-policy: priority}", True),
        ("vllm", "{scheduling_policy: priority}", True),
        ("vllm", "{scheduling-policy: fcfs}", False),
        ("vllm", "{}", False),
        ("penstock", "{scheduling-policy: priority}", False),  # it is told the class itself
    ],
)
def test_only_a_vllm_that_schedules_by_priority_is_sent_one(engine: str, flags: str, told: bool) -> None:
    """Any other would refuse a request that has one."""
    model = f"{{weights: demo, pool: box, engine: {engine}, flags: {flags}}}"
    spec = loads(f"pools: {{box: {{hardware: L4}}}}\nmodels: {{m: {model}}}\n")
    assert Book(spec).find("m", {}, {}).targets[0].priorities is told
