"""Streams of tokens against decoding at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.text.detokenizer import Detokenizer

KINDS = ["byte_level", "sentencepiece", "gemma", "metaspace", "wordpiece"]
EXACT = ["byte_level", "sentencepiece", "gemma"]
EMOJI = "👩‍👩‍👧‍👦 🏳️‍🌈 ✌🏽 é 你好"
TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=EMOJI + "ab ", max_size=20),
    st.sampled_from([EMOJI, "  two  spaces ", "\n\n\ttabs", "a😀b", " "]),
)
CUTS = st.lists(st.integers(1, 5), max_size=40)


def stream(tokenizer, prompt, ids, cuts=(), skip_special_tokens=True):
    """(pieces as pushed, all of the text)."""
    detokenizer, pieces, at, cuts = Detokenizer(tokenizer, prompt, skip_special_tokens), [], 0, list(cuts)
    while at < len(ids):
        step = cuts.pop() if cuts else 1
        pieces.append(detokenizer.push(ids[at : at + step]))
        at += step
    return pieces, "".join(pieces) + detokenizer.flush()


def rest(tokenizer, prompt, ids, skip_special_tokens=True):
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens)
    return whole[len(tokenizer.decode(prompt, skip_special_tokens)) :]


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXT, text=TEXT, cuts=CUTS, continued=st.booleans())
@settings(derandomize=True, max_examples=150, deadline=None)
def test_a_stream_equals_decoding_at_once(tokenizers, kind, prompt, text, cuts, continued):
    tokenizer = tokenizers[kind]
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if continued:  # as if the model went on in mid-sentence
        both = tokenizer.encode(prompt + text)
        before, ids = both[: len(both) // 2], both[len(both) // 2 :]
        if tokenizer.decode(before).endswith("\ufffd"):
            return  # the prompt ends in half a character: see below
    pieces, whole = stream(tokenizer, before, ids, cuts)
    assert whole == rest(tokenizer, before, ids)
    if kind in EXACT and "\ufffd" not in prompt + text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", EXACT)
@given(text=TEXT, cuts=CUTS)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_every_piece_is_out_as_soon_as_its_characters_are_whole(tokenizers, kind, text, cuts):
    tokenizer = tokenizers[kind]
    text = text.replace("▁", "_").replace("\ufffd", "?")
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = stream(tokenizer, tokenizer.encode("x"), ids, cuts)
    joined = b"".join(map(tokenizer.token_bytes, ids))
    done, at, shown, steps = 0, 0, "", list(cuts)
    for piece in pieces:
        step = steps.pop() if steps else 1
        done += sum(len(tokenizer.token_bytes(id)) for id in ids[at : at + step])
        at += step
        shown += piece
        assert shown == joined[:done].decode(errors="ignore")


@given(ids=st.lists(st.integers(0, 420), max_size=40), cuts=CUTS, skip=st.booleans())
@settings(derandomize=True, max_examples=300, deadline=None)
def test_byte_level_equals_decoding_for_any_tokens(tokenizers, ids, cuts, skip):
    """Random tokens are mostly invalid UTF-8: every U+FFFD must be there, and no other."""
    tokenizer = tokenizers["byte_level"]
    assert stream(tokenizer, [], ids, cuts, skip)[1] == tokenizer.decode(ids, skip)


def fallback_text(data):
    """What a run of byte tokens shows: its characters, and U+FFFD for each byte that is in none."""
    out = ""
    while data:
        for n in (1, 2, 3, 4):
            try:
                out, data = out + data[:n].decode(), data[n:]
                break
            except UnicodeDecodeError:
                continue
        else:
            out, data = out + "\ufffd", data[1:]
    return out


@given(runs=st.lists(st.binary(min_size=1, max_size=6), max_size=6), cuts=CUTS)
@example(runs=[b"\xf0\x9f\x98", b"\xe4\xbd"], cuts=[])
@settings(derandomize=True, max_examples=300, deadline=None)
def test_byte_fallback_with_any_bytes(tokenizers, runs, cuts):
    tokenizer = tokenizers["sentencepiece"]
    word = tokenizer.token_id("▁")
    ids = [id for run in runs for id in [*(tokenizer.token_id(f"<0x{b:02X}>") for b in run), word]]
    _, whole = stream(tokenizer, tokenizer.encode("x"), ids, cuts)
    assert whole == "".join(fallback_text(run) + " " for run in runs)
    if all(not _valid_then_invalid(run) for run in runs):
        assert whole == rest(tokenizer, tokenizer.encode("x"), ids)


def _valid_then_invalid(run):
    """Whether decoding at once would spoil good characters of the run."""
    text = fallback_text(run)
    return "\ufffd" in text and text != "\ufffd" * len(run)


@pytest.mark.parametrize("kind", EXACT)
def test_half_a_character_waits_and_comes_out_at_the_end(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("😁", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert detokenizer.push(ids[:-1]).strip() == ""
    assert detokenizer.flush() == "\ufffd" * (1 if kind == "byte_level" else 3)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", EXACT)
def test_invalid_bytes_come_out_once_they_cannot_complete(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt, emoji = tokenizer.encode("x"), tokenizer.encode("x😁")
    start = emoji[len(prompt) : -1]
    letter = tokenizer.encode("xb")[-1]
    assert start
    assert tokenizer.token_text(letter) == "b"
    detokenizer = Detokenizer(tokenizer, prompt)
    assert detokenizer.push(start) == ""
    assert detokenizer.push([letter]) == "\ufffd" * (1 if kind == "byte_level" else len(start)) + "b"


@pytest.mark.parametrize("kind", EXACT)
def test_the_output_completes_a_prompt_that_ends_in_half_a_character(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("x😁y")
    assert stream(tokenizer, ids[:-3], ids[-3:])[1] == "😁y"


def test_the_first_space_stays_after_a_prompt_and_goes_without_one(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert stream(tokenizer, tokenizer.encode("say"), hello)[1] == " hello"
    assert stream(tokenizer, [tokenizer.bos_id], hello)[1] == "hello"
    assert stream(tokenizer, [tokenizer.bos_id], hello, skip_special_tokens=False)[1] == " hello"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_skipped_or_shown(tokenizers, kind):
    tokenizer = tokenizers[kind]
    word = tokenizer.encode("hello", add_special_tokens=False)
    ids = [*word, tokenizer.eos_id]
    prompt = tokenizer.encode("The")
    assert "</s>" not in stream(tokenizer, prompt, ids)[1]
    assert stream(tokenizer, prompt, ids, skip_special_tokens=False)[1] == rest(
        tokenizer, prompt, ids, skip_special_tokens=False
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_token_add_nothing(tokenizers, kind):
    tokenizer = tokenizers[kind]
    word = tokenizer.encode("hello", add_special_tokens=False)
    ids = [5000, *word, 5001, 5002] + [5003] * 40 + word
    assert stream(tokenizer, tokenizer.encode("The"), ids)[1] == rest(tokenizer, tokenizer.encode("The"), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow(tokenizers, kind, monkeypatch):
    tokenizer = tokenizers[kind]
    decoded = []
    original = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer),
        "decode",
        lambda self, ids, skip=True: decoded.append(len(ids)) or original(self, ids, skip),
    )
    unknown = tokenizer.encode("hello") * 200
    stream(tokenizer, tokenizer.encode("hello") * 200, unknown)
    assert max(decoded, default=0) <= 40
