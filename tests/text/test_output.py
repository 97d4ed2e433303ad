"""From events to output: text, stop strings, stop tokens, logprobs and the reason of the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.plan import Event, TokenLogprob
from penstock.core.request_spec import FinishReason
from penstock.core.sampling_params import SamplingParams
from penstock.text.detokenizer import Detokenizer
from penstock.text.output import (
    OutputProcessor,
    Pending,
    decode_logprob,
    decode_prompt,
    decode_prompt_logprobs,
)

KINDS = ["byte_level", "sentencepiece"]


def make_processor(tokenizer, **params):
    return OutputProcessor(
        tokenizer, tokenizer.encode("The"), SamplingParams(**{"max_tokens": 500, **params})
    )


def words(tokenizer, text):
    """Output tokens for `text` after a prompt, in which the first space counts."""
    return tokenizer.encode(text.removeprefix(" ") if tokenizer.drops_first_space else text, False)


def run(processor, batches, finish=FinishReason.LENGTH, **last):
    """All deltas of a sequence whose tokens arrive in these batches."""
    deltas = [processor.push(Event("r", tokens=tuple(batch))) for batch in batches[:-1]]
    return [*deltas, processor.push(Event("r", tokens=tuple(batches[-1]), finish=finish, **last))]


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet="ab 😀é你", min_size=1, max_size=20), size=st.integers(1, 5))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_plain_text(tokenizers, kind, text, size):
    tokenizer = tokenizers[kind]
    ids = words(tokenizer, " " + text)
    processor = make_processor(tokenizer)
    deltas = run(processor, [ids[i : i + size] for i in range(0, len(ids), size)])
    assert text_of(deltas) == " " + text
    assert [id for delta in deltas for id in delta.token_ids] == ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert processor.generated == len(ids)
    assert not any(delta.logprobs for delta in deltas)


@given(
    text=st.text(alphabet="ab \n😀", min_size=1, max_size=20),
    stop=st.text(alphabet="ab \n😀", min_size=1, max_size=3),
    size=st.integers(1, 4),
    include=st.booleans(),
    minimum=st.integers(0, 6),
)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_stop_strings_whatever_the_batches(tokenizers, text, stop, size, include, minimum):
    tokenizer = tokenizers["byte_level"]
    ids = words(tokenizer, text)
    processor = make_processor(
        tokenizer, stop=(stop,), include_stop_str_in_output=include, min_tokens=minimum
    )
    deltas = run(processor, [ids[i : i + size] for i in range(0, len(ids), size)])
    # characters are complete after the token that ends them
    lengths = [
        len(b"".join(map(tokenizer.token_bytes, ids[: n + 1])).decode(errors="ignore"))
        for n in range(len(ids))
    ]
    free = lengths[min(minimum, len(ids)) - 1] if minimum else 0
    start = text.find(stop, max(0, free + 1 - len(stop)))
    [final] = [delta for delta in deltas if delta.finish_reason is not None]
    if start < 0:
        assert (text_of(deltas), final.finish_reason, final.stop_reason) == (text, "length", None)
        assert not any(delta.stop_found for delta in deltas)
        return
    assert text_of(deltas) == text[: start + len(stop) * include]
    assert (final.finish_reason, final.stop_reason, final.stop_found) == ("stop", stop, True)
    used = next(n + 1 for n, length in enumerate(lengths) if length >= start + len(stop))
    assert processor.generated == used
    assert sum(len(delta.token_ids) for delta in deltas) == used


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=st.text(alphabet="ab 😀é你", min_size=1, max_size=20),
    stop=st.sampled_from(["", "ab", "é你", "a b"]),
    told=st.integers(0, 40),
)
@settings(derandomize=True, max_examples=150, deadline=None)
def test_who_resumes_says_the_rest(tokenizers, kind, text, stop, told):
    """Also in the middle of a character, and of what may become a stop string."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    told %= len(ids)
    params = {"stop": (stop,)} if stop else {}
    whole = make_processor(tokenizer, **params)
    pieces = run(whole, [[token] for token in ids])
    first, rest = make_processor(tokenizer, **params), make_processor(tokenizer, **params)
    began = [first.push(Event("r", (token,))) for token in ids[:told]]
    if not rest.resume(ids[:told]):
        assert first.finished
        return
    ended = run(rest, [[token] for token in ids[told:]])
    assert text_of([*began, *ended]) == text_of(pieces)
    assert rest.generated == whole.generated


def test_after_a_stop_string_nothing_more_comes(tokenizers):
    tokenizer = tokenizers["byte_level"]
    processor = make_processor(tokenizer, stop=("b",))
    first = processor.push(Event("r", tokens=tuple(words(tokenizer, "abc"))))
    assert (first.text, first.stop_found, first.finish_reason) == ("a", True, "stop")
    assert processor.finished
    late = Event("r", tokens=tuple(words(tokenizer, "more")), finish=FinishReason.ABORT)
    assert processor.push(late) == Pending()
    assert processor.generated == len(first.token_ids)


@pytest.mark.parametrize(
    ("params", "stop_reason", "shown"),
    [
        ({}, None, "hello"),
        ({"include_stop_str_in_output": True}, None, "hello"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, None, "hello</s>"),
        ({"skip_special_tokens": False}, None, "hello"),
    ],
)
def test_the_end_of_sequence_token_is_counted_but_not_shown(tokenizers, params, stop_reason, shown):
    tokenizer = tokenizers["byte_level"]
    ids = [*words(tokenizer, "hello"), tokenizer.eos_id]
    processor = make_processor(tokenizer, **params)
    [delta] = run(processor, [ids], FinishReason.STOP)
    assert (delta.text, delta.token_ids, delta.logprobs) == (shown, ids, [])
    assert (delta.finish_reason, delta.stop_reason, delta.stop_found) == ("stop", stop_reason, False)
    assert processor.generated == len(ids)


def test_a_stop_token_is_cut_or_kept(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = words(tokenizer, "hello!")
    for include, shown in ((False, "hello"), (True, "hello!")):
        processor = make_processor(tokenizer, stop_token_ids=(ids[-1],), include_stop_str_in_output=include)
        [delta] = run(processor, [ids], FinishReason.STOP, stop_reason=ids[-1])
        assert (delta.text, delta.stop_reason) == (shown, ids[-1])


def test_what_was_held_back_comes_out_at_the_end(tokenizers):
    tokenizer = tokenizers["byte_level"]
    processor = make_processor(tokenizer, stop=("hello world",))
    held = processor.push(Event("r", tokens=tuple(words(tokenizer, "say hello"))))
    assert held.text == "say "
    last = processor.push(Event("r", tokens=(tokenizer.eos_id,), finish=FinishReason.STOP))
    assert (last.text, last.finish_reason) == ("hello", "stop")


def test_half_a_character_at_the_end(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = words(tokenizer, "a😁")
    deltas = run(make_processor(tokenizer), [[id] for id in ids[:-1]])
    assert text_of(deltas) == "a\ufffd"
    stopped = run(make_processor(tokenizer, stop=("\ufffd",)), [ids[:-1]])
    assert (text_of(stopped), stopped[-1].stop_reason) == ("a", "\ufffd")


@pytest.mark.parametrize(
    ("finish", "wanted"),
    [(FinishReason.ABORT, "abort"), (FinishReason.ERROR, "error"), (FinishReason.LENGTH, "length")],
)
def test_other_ends(tokenizers, finish, wanted):
    [delta] = run(make_processor(tokenizers["byte_level"]), [[]], finish)
    assert (delta.finish_reason, delta.text, delta.token_ids) == (wanted, "", [])


def test_a_stop_string_beats_the_engines_reason(tokenizers):
    tokenizer = tokenizers["byte_level"]
    [delta] = run(make_processor(tokenizer, stop=("lo",)), [words(tokenizer, "hello")], FinishReason.LENGTH)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("hel", "stop", "lo")


def test_logprobs_of_whole_tokens_and_of_parts(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = words(tokenizer, " the😁")
    entries = tuple(
        TokenLogprob(token=id, logprob=-0.5, rank=2, top=((ids[0], -0.1), (id, float("-inf")))) for id in ids
    )
    processor = make_processor(tokenizer, logprobs=2)
    delta = processor.push(Event("r", tokens=tuple(ids), logprobs=entries))
    assert [entry.token_id for entry in delta.logprobs] == ids
    whole, last = delta.logprobs[0], delta.logprobs[-1]
    assert (whole.token, whole.width, whole.rank, whole.logprob) == (" the", 4, 2, -0.5)
    assert [entry.token for entry in delta.logprobs[1:]] == [""] * (len(ids) - 2) + ["😁"]
    assert [(entry.token, entry.rank, entry.logprob) for entry in last.top] == [
        ("\ufffd the", 1, -0.1),  # what the other token would have made of the character
        ("😁", 2, -9999.0),
    ]
    assert not last.top[0].top


@pytest.mark.parametrize("kind", KINDS)
@given(
    prompt=st.text(alphabet="ab 😀é你€", min_size=1, max_size=12),
    text=st.text(alphabet="ab 😀é你€", min_size=1, max_size=12),
    size=st.integers(1, 5),
    skip=st.booleans(),
    at=st.integers(0, 12),
)
@settings(derandomize=True, max_examples=150, deadline=None)
def test_tokens_join_to_the_text_and_widths_tell_where_they_stand(
    tokenizers, kind, prompt, text, size, skip, at
):
    tokenizer = tokenizers[kind]
    before, ids = tokenizer.encode(prompt), words(tokenizer, " " + text)
    ids.insert(min(at, len(ids)), tokenizer.eos_id)  # with ignore_eos it may come anywhere
    processor = OutputProcessor(
        tokenizer,
        before,
        SamplingParams(max_tokens=99, logprobs=0, skip_special_tokens=skip, ignore_eos=True),
    )
    entries: list = []
    shown = ""
    for i in range(0, len(ids), size):
        batch = tuple(ids[i : i + size])
        pending = processor.push(
            Event("r", tokens=batch, logprobs=tuple(TokenLogprob(id, -1.0, 1) for id in batch))
        )
        entries += pending.logprobs
        shown += pending.text
    shown += processor.push(Event("r", finish=FinishReason.LENGTH)).text
    read = list(decode_prompt(tokenizer, before[0], [TokenLogprob(id, -1.0, 1) for id in before[1:]], prompt))
    assert read[0].logprob is None
    place = 0
    whole = prompt + shown
    for entry in (*read, *entries):
        assert whole[place : place + entry.width] == (entry.token if entry.width else "")
        place += entry.width
    assert place in (len(whole), len(whole) - shown.endswith("\ufffd"))


def test_logprobs_end_with_the_stop_string(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [id for letter in "abcd" for id in words(tokenizer, letter)]
    entries = tuple(TokenLogprob(id, -1.0, 1) for id in ids)
    processor = make_processor(tokenizer, logprobs=0, stop=("bc",))
    delta = processor.push(Event("r", tokens=tuple(ids), logprobs=entries))
    assert (delta.text, len(delta.token_ids), len(delta.logprobs)) == ("a", 3, 3)


def test_special_tokens_have_their_names_in_logprobs(tokenizers):
    tokenizer = tokenizers["byte_level"]
    entry = TokenLogprob(tokenizer.eos_id, -1.0, 1)
    for skip, width in ((False, 4), (True, 0)):
        decoded = decode_logprob(tokenizer, Detokenizer(tokenizer, (), skip), entry)
        assert (decoded.token, decoded.width) == ("</s>", width)


def test_prompt_logprobs_have_vllms_shape(tokenizers):
    tokenizer = tokenizers["byte_level"]
    the, world = words(tokenizer, " the")[0], words(tokenizer, "w")[0]
    entries = [
        TokenLogprob(the, -3.0, 7, ((world, -0.5), (the, -3.0))),
        TokenLogprob(world, float("-inf"), 9, ()),
    ]
    assert list(decode_prompt_logprobs(tokenizer, the, entries)) == [
        None,
        {
            the: {"logprob": -3.0, "rank": 7, "decoded_token": " the"},
            world: {"logprob": -0.5, "rank": 1, "decoded_token": "w"},
        },
        {world: {"logprob": -9999.0, "rank": 9, "decoded_token": "w"}},
    ]
