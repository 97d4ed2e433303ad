"""What is done where and how much of it together; lines of statistics; bills at their borders."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.core.stats import EngineStats, Totals
from penstock.server import tokens, work
from penstock.server.config import ServerConfig
from penstock.server.limits import check_answer, check_body, check_lists, check_messages
from penstock.server.state import State
from penstock.server.stats_log import StatsLog
from penstock.server.tokens import Usable, check_ids, encode_texts
from penstock.server.work import IN_THREAD, Work
from penstock.text.tokenizer import Tokenizer

from .conftest import running
from .test_bills import Bills, event
from .tiny import REPLY

# ---- threads ----


def test_the_event_loop_does_what_is_short_and_threads_what_is_longer() -> None:
    async def scene() -> None:
        here, mine = Work(), threading.get_ident()
        assert await here.do(IN_THREAD, threading.get_ident) == mine
        assert await here.do(IN_THREAD + 1, threading.get_ident) != mine

    asyncio.run(scene())


def test_a_million_characters_are_worked_on_at_a_time() -> None:
    """Whatever they are a part of: it is what bounds the memory."""
    entered: list[int] = []

    def enter(number: int, wait: threading.Event) -> None:
        entered.append(number)
        assert wait.wait(20)

    async def scene() -> None:
        million, gates = Work(), [threading.Event(), threading.Event(), threading.Event()]
        callers = [
            asyncio.create_task(million.run(size, enter, number, gates[number]))
            for number, size in enumerate((600_000, 400_000, 60_000))
        ]
        while len(entered) < 2:
            await asyncio.sleep(0.001)
        assert sorted(entered) == [0, 1]
        assert million._free == 2**20 - 1_000_000
        gates[1].set()
        await callers[1]
        while len(entered) < 3:
            await asyncio.sleep(0.001)
        gates[0].set()
        gates[2].set()
        await asyncio.gather(*callers)
        assert million._free == 2**20

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_who_has_left_the_queue_holds_nobody_up() -> None:
    """Not even who wanted more than there will be for long."""
    ends = {name: threading.Event() for name in ("one", "two", "large", "small")}

    async def scene() -> None:
        ten = Work(10)
        one, two, large, small = (
            asyncio.create_task(ten.run(size, ends[name].wait, 20))
            for name, size in (("one", 5), ("two", 5), ("large", 10), ("small", 5))
        )
        await asyncio.sleep(0)
        large.cancel()
        ends["small"].set()
        ends["one"].set()
        assert await small  # while the other one still runs
        assert not two.done()
        ends["two"].set()
        assert await one
        assert await two

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_the_memory_of_work_is_given_back_by_its_size() -> None:
    async def scene() -> None:
        mine = Work()
        enough = work._WORTH_A_TRIM // work._BYTES
        await mine.run(enough - 1, len, "")
        assert mine._trim is None
        await mine.run(1, len, "")
        assert mine._trim is not None
        mine._trim.cancel()

    asyncio.run(scene())


@given(
    lengths=st.lists(st.integers(0, 3).map(lambda n: n * (tokens._BATCH // 3)), max_size=8),
    extra=st.integers(0, 2),
)
def test_batches_are_neighbours_and_as_many_as_fit(lengths: list[int], extra: int) -> None:
    texts = ["x" * (length + extra) for length in lengths]
    batches = list(tokens._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    sizes = [sum(map(len, batch)) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        assert batch
        assert len(batch) == 1 or size <= tokens._BATCH
    for size, after in zip(sizes, batches[1:], strict=False):
        assert size + len(after[0]) > tokens._BATCH


class Encoder:
    """So many characters are a token; every text that it got is noted."""

    def __init__(self, chars: int = 2) -> None:
        self.chars = chars
        self.got: list[list[str]] = []
        self.threads: set[int] = set()

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        assert add_special_tokens
        self.got.append(list(texts))
        self.threads.add(threading.get_ident())
        return [[ord(text[i]) for i in range(0, len(text), self.chars)] for text in texts]


def encoded(texts: list[str], usable: Usable | None, chars: int = 2) -> tuple[Encoder, list[list[int]]]:
    encoder = Encoder(chars)

    async def scene() -> list[list[int]]:
        state = SimpleNamespace(tokenizer=encoder, work=Work())
        return await encode_texts(cast(State, state), texts, True, usable)

    return encoder, asyncio.run(scene())


@pytest.mark.parametrize("usable", [None, Usable(10, "left", "prompt"), Usable(10, None, "prompt")])
def test_short_texts_are_encoded_together_here_and_now(usable: Usable | None) -> None:
    texts = ["ab" * 100, "", "c" * (IN_THREAD - 200)]
    encoder, ids = encoded(texts, usable)
    assert list(map(len, ids)) == [100, 0, (IN_THREAD - 200) // 2]
    assert encoder.got == [texts]
    assert encoder.threads == {threading.get_ident()}


def test_many_texts_are_encoded_in_threads_and_come_in_order() -> None:
    texts = [chr(97 + number) * 40_000 for number in range(10)]
    encoder, ids = encoded(texts, None)
    assert ids == [[ord(text[0])] * 20_000 for text in texts]
    assert list(map(len, encoder.got)) == [3, 3, 3, 1]
    assert threading.get_ident() not in encoder.threads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [1, 2000, 20_000])
def test_of_a_long_text_not_much_more_is_read_than_is_used(side: str, most: int) -> None:
    text = "".join(chr(32 + number % 1000) for number in range(1_000_000))
    encoder, [ids] = encoded([text], Usable(most, side, "prompt"))
    whole = [ord(text[i]) for i in range(0, len(text), 2)]
    assert ids[-most:] == whole[-most:] if side == "left" else ids[:most] == whole[:most]
    assert len(ids) > 2 * most  # what is next to the cut is not among them
    longest = max(len(part) for batch in encoder.got for part in batch)
    assert longest <= max(IN_THREAD, 16 * most)
    assert longest < len(text)


def test_of_a_text_with_few_tokens_parts_are_read_that_double() -> None:
    """Until there are enough, or until it ends."""
    most = 2000
    encoder, [ids] = encoded(["x" * 1_000_000], Usable(most, "right", "prompt"), chars=40)
    lengths = [len(part) for [part] in encoder.got]
    assert lengths == [32_000, 64_000, 128_000, 256_000]
    assert len(ids) == 6400
    encoder, [ids] = encoded(["x" * 100_000], Usable(most, None, "prompt"), chars=40)
    assert [len(part) for [part] in encoder.got] == [32_000, 64_000, 100_000]
    assert len(ids) == 2500


def test_a_text_that_is_not_long_for_its_use_is_read_at_once() -> None:
    text = "x" * 30_000
    encoder, [ids] = encoded([text], Usable(30_000, None, "prompt"))
    assert len(ids) == 15_000
    assert encoder.got == [[text]]


@given(
    ids=st.lists(st.sampled_from([0, 1, 5, 9, 10, -1, True, 2.0, "3", None, [1], 2**70]), max_size=4),
    size=st.integers(1, 10),
)
def test_only_whole_numbers_of_the_vocabulary_are_token_ids(ids: list[Any], size: int) -> None:
    if all(type(token) is int and 0 <= token < size for token in ids):
        check_ids(ids, size, "tokens")
        return
    with pytest.raises(InvalidRequest) as caught:
        check_ids(ids, size, "tokens")
    assert caught.value.param == "tokens"
    fault = next(token for token in ids if type(token) is not int or not 0 <= token < size)
    told = f"token id {fault}" if type(fault) is int else f"got {type(fault).__name__}."
    assert told in str(caught.value)
    if type(fault) is int:
        assert f"ids 0 to {size - 1}." in str(caught.value)


# ---- limits ----

SMALL = ServerConfig(max_body_values=10)


def calls(arguments: str, count: int = 1) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}] * count}]


def test_values_in_the_arguments_of_calls_count_as_those_of_a_body() -> None:
    ten = json.dumps([1] * 9)
    check_messages(calls(ten), SMALL)
    for arguments, count in ((json.dumps([1] * 11), 1), (ten, 2), ("[" * 1000, 1)):
        with pytest.raises(InvalidRequest, match="--max-body-values") as caught:
            check_messages(calls(arguments, count), SMALL)
        assert caught.value.param is None
    # what is of another form is refused by name, later
    check_messages([{"tool_calls": ["x" * 100, {"function": ["," * 100]}, {"function": {}}, {}]}], SMALL)


@pytest.mark.parametrize("mark", ["[", "{"])
def test_lists_and_objects_just_within_the_limit(mark: str) -> None:
    start = b'{"prompt":                       ['  # a body of a few bytes is not even counted
    check_body(start + mark.encode() * 8, SMALL)
    with pytest.raises(InvalidRequest, match="got 11"):
        check_body(start + mark.encode() * 9, SMALL)


def test_the_refusal_says_how_many_values_there_are_without_token_ids() -> None:
    with pytest.raises(InvalidRequest, match="at most 10, got 15"):
        check_lists({"prompt": [1] * 100}, 115, SMALL)
    with pytest.raises(InvalidRequest, match="at most 10, got 11"):
        check_lists({"prompt": [[1] * 100, [2] * 3, "a"]}, 114, SMALL)
    check_lists({"prompt": [1] * 100}, 110, SMALL)
    check_lists({"tokens": [1] * 100}, 110, SMALL)


def test_an_answer_that_would_be_too_large_may_be_streamed() -> None:
    check_answer(1000, ServerConfig(max_response_bytes=1000), "n")
    with pytest.raises(InvalidRequest, match=r"at most 1000, got 1001\. .* or for a stream\.") as caught:
        check_answer(1001, ServerConfig(max_response_bytes=1000), "n")
    assert caught.value.param == "n"


# ---- bills ----


def test_a_bill_is_counted_once(tokenizer: Tokenizer) -> None:
    """What comes for a choice after its last event changes nothing."""
    bills = Bills(tokenizer)
    bills.batch(event(0, 0.25, FinishReason.STOP, tokens=(5,)))
    bills.batch(event(0, 0.5, FinishReason.STOP, tokens=(5,)))
    bills.late(event(0, 0.75, FinishReason.ABORT))
    assert (bills.sample("sum"), bills.sample("count")) == (0.25, 1)


def test_times_of_a_choice_stay_known(tokenizer: Tokenizer) -> None:
    """The last event of a request that the engine could not tell of any more has none."""
    bills = Bills(tokenizer)
    bills.batch(event(0, 0.25, tokens=(5,), at=3.0, scheduled_at=1.0))
    bills.batch(event(0, 0.5, tokens=(5,), at=7.0, scheduled_at=None))
    usage = bills.generation.usage()
    assert (usage["queue_ms"], usage["prefill_ms"], usage["ttft_ms"]) == (1000.0, 2000.0, 3000.0)
    assert usage["decode_ms"] == 4000.0
    bills.late(Event("r:0", finish=FinishReason.ABORT))
    assert bills.metrics.registry.get_sample_value(
        "vllm:request_decode_time_seconds_sum", {"model_name": "m", "engine": "0"}
    ) == pytest.approx(4.0)
    assert bills.metrics.registry.get_sample_value(
        "vllm:request_queue_time_seconds_sum", {"model_name": "m", "engine": "0"}
    ) == pytest.approx(1.0)


def test_the_longest_budget_stands_for_what_nobody_asked_for(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY)) as server:
        body = {"prompt": [[1] * 250, [1] * 245], "max_tokens": None}  # 6 and 11 are left of OpenAI's 16
        assert server.post("/v1/completions", body).status == 200
        page = server.get("/metrics").body.decode()
    [line] = [line for line in page.splitlines() if line.startswith("vllm:request_params_max_tokens_sum")]
    assert float(line.split()[-1]) == 2 * 11


# ---- the log ----


class Window:
    """A StatsLog with a clock that is set by hand: a line every ten seconds at most."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._now = 0.0
        self._caplog = caplog
        self._log = StatsLog(lambda: self._now)

    def at(self, now: float, busy: float = 0.0, **totals: int) -> list[str]:
        """The lines that this report makes."""
        self._now = now
        self._caplog.clear()
        stats = EngineStats(Totals(**totals), running=2, waiting=3, kv_usage=0.25, busy=busy)
        self._log(stats)
        return [record.getMessage() for record in self._caplog.records]


@pytest.fixture
def window(caplog: pytest.LogCaptureFixture) -> Window:
    caplog.set_level("INFO", "penstock.server")
    return Window(caplog)


def test_a_line_has_what_was_done_since_the_last_one(window: Window) -> None:
    before = {"steps": 100, "prompt_tokens": 1000, "generation_tokens": 500}
    assert window.at(1000.0, busy=7.0, **before, prefix_queries=50, prefix_hits=40) == []
    assert window.at(1009.9, busy=9.0, **before, prefix_queries=50, prefix_hits=40) == []
    after = {"steps": 120, "prompt_tokens": 1100, "generation_tokens": 550}
    # of the first report of all there is none before it: its totals belong to this window
    assert window.at(1010.0, busy=9.0, **after, prefix_queries=70, prefix_hits=45) == [
        "running 2, waiting 3; prompt 110.0 tok/s, generation 55.0 tok/s; KV cache 25.0%, "
        "prefix hits 64.3%; device busy 90%, 75.0 ms per step"
    ]
    later = {"steps": 130, "prompt_tokens": 1300, "generation_tokens": 950}
    assert window.at(1030.0, busy=14.0, **later, prefix_queries=90, prefix_hits=50) == [
        "running 2, waiting 3; prompt 10.0 tok/s, generation 20.0 tok/s; KV cache 25.0%, "
        "prefix hits 25.0%; device busy 25%, 500.0 ms per step"
    ]


def test_after_a_pause_a_new_window_begins(window: Window) -> None:
    window.at(1000.0)
    [line] = window.at(1030.0, prompt_tokens=60)  # a long step is no pause
    assert "prompt 2.0 tok/s" in line
    assert window.at(1060.1, prompt_tokens=60) == []
    [line] = window.at(1070.1, prompt_tokens=360)
    assert "prompt 30.0 tok/s" in line


def test_nothing_is_divided_by_nothing_and_no_share_is_above_one(window: Window) -> None:
    window.at(1000.0)
    [line] = window.at(1010.0, busy=99.0)
    assert "prefix hits 0.0%; device busy 100%, 99000.0 ms per step" in line
