"""Stop strings against a plain search in the whole text."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.stop import StopChecker, StopStrings

TEXT = st.text(alphabet="ab\n<", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n<", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text, cuts):
    """`text` in pieces."""
    borders = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]


def run(pieces, stops, include):
    checker, out = StopChecker(stops, include), []
    for piece in pieces:
        emitted, matched = checker.push(piece)
        out.append(emitted)
        if matched is not None:
            assert checker.push("more") == ("", None)
            assert checker.flush() == ""
            return "".join(out), matched
    return "".join(out) + checker.flush(), None


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=12), include=st.booleans())
@settings(derandomize=True, max_examples=500, deadline=None)
def test_equals_a_search_in_the_whole_text(text, stops, cuts, include):
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if ends:
        end, start, stop = min(ends)
        wanted = (text[: end if include else start], stop)
    else:
        wanted = (text, None)
    assert run(cut(text, cuts), stops, include) == wanted


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=12))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_holds_back_only_what_may_begin_a_stop_string(text, stops, cuts):
    checker, seen, shown = StopChecker(stops), "", ""
    for piece in cut(text, cuts):
        emitted, matched = checker.push(piece)
        seen, shown = seen + piece, shown + emitted
        if matched is not None:
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        assert not any(  # and everything that may begin one
            stop.startswith(seen[-n:]) for n in range(len(held) + 1, len(seen) + 1) for stop in stops
        )


def test_nothing_is_held_back_when_the_stop_string_stays():
    checker = StopChecker(["END"], include=True)
    assert checker.push("the EN") == ("the EN", None)
    assert checker.push("D of it") == ("D", "END")


@pytest.mark.parametrize(("pieces", "wanted"), [(["abcd"], ("a", "bc")), (["a", "b", "c", "d"], ("a", "bc"))])
def test_the_match_that_ends_first_wins_however_the_text_is_cut(pieces, wanted):
    assert run(pieces, ["abcd", "bc"], False) == wanted


def test_text_before_min_tokens_can_begin_but_not_complete_a_match():
    checker = StopChecker(["END"])
    assert checker.push("END E", search=False) == ("END ", None)
    assert checker.push("ND END") == ("", "END")
    checker = StopChecker(["END"])
    assert checker.push("END", search=False) == ("END", None)
    assert checker.push("; END") == ("; ", "END")


def test_flush_gives_back_what_was_held():
    checker = StopChecker(["<|end|>"])
    assert checker.push("a <|en") == ("a ", None)
    assert checker.flush() == "<|en"
    assert checker.flush() == ""


@pytest.mark.parametrize("stop", ["ab" * 8000 + "c", "a" * 16_000])
def test_a_long_stop_string_costs_memory_in_proportion(stop):
    tracemalloc.start()
    try:
        checker = StopChecker([stop])
        assert checker.push("x" + stop[:1000]) == ("x", None)
        assert checker.push("d") == (stop[:1000] + "d", None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 600 * len(stop)


def steps_of(checker, text):
    """How often the automaton follows an edge, or its way back, for a text."""

    class Counting(list):
        looked = 0

        def __getitem__(self, state):
            Counting.looked += 1
            return list.__getitem__(self, state)

    checker._stops._after = Counting(checker._stops._after)
    for character in text:
        checker.push(character)
    return Counting.looked


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param(["a" * length for length in range(101, 160)], id="many lengths"),
        pytest.param([f"{'a' * 100}{number}" for number in range(500)], id="one beginning"),
        pytest.param(["a" * 100 + "b"], id="a beginning that breaks off again and again"),
    ],
)
def test_the_work_is_linear_in_the_text_whatever_the_stop_strings(stops):
    text = ("a" * 99 + "c") * 50
    assert steps_of(StopChecker(stops), text) <= 3 * len(text)


def test_streams_share_what_is_compiled():
    stops = StopStrings(["END"])
    first, second = StopChecker(stops), StopChecker(stops)
    assert first.push("a E") == ("a ", None)
    assert second.push("ND") == ("ND", None)
    assert first.push("ND") == ("", "END")


def test_many_stop_strings_of_one_beginning():
    stops = [f"<{number}>" for number in range(5000)]
    assert run(list("a <b> <49 <4999>."), stops, False) == ("a <b> <49 ", "<4999>")
