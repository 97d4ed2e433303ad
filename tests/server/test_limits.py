"""What is counted before it is worked on, and what each limit says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.core.errors import ContextLengthExceeded, InvalidRequest, PayloadTooLarge, StartupError, quote
from penstock.server import limits
from penstock.server.config import ServerConfig
from penstock.server.limits import LIMITS, check_body, check_lists
from penstock.text.tokenizer import Tokenizer

from .conftest import running
from .tiny import REPLY

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
SMALL = ServerConfig(max_body_values=10)


# ---- values of a body ----


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": [1] * 12},
        {"metadata": [[]] * 12},
        {"metadata": [{}] * 12},
        {"metadata": ["a"] * 12},
        {"metadata": {str(name): 0 for name in range(12)}},
        {"metadata": [[[["a", 1]]]] * 3},
        {"prompt": ["a"] * 12},
        {"prompt": "a", "n": [[7] * 12]},
        {"tokens": "a", "n": [7] * 12},
    ],
)
def test_values_are_counted_wherever_they_are(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    with pytest.raises(InvalidRequest, match=r"at most 10, got \d+\. .* set by --max-body-values\."):
        check_lists(fields, check_body(body, SMALL), SMALL)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "[{,:" * 20},
        {"prompt": '","' * 20},
        {"prompt": '\\"[,\\\\' * 20},
        {"prompt": "\\"},
        {"prompt": [7] * 100},
        {"prompt": [[7] * 100, [7] * 100]},
        {"tokens": [7] * 100},
        {"prompt": "a", "metadata": [1] * 6},
    ],
)
def test_neither_what_stands_in_texts_counts_nor_token_ids(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    check_lists(fields, check_body(body, SMALL), SMALL)


def test_a_body_of_just_the_limit() -> None:
    fields = {"metadata": [1] * 8}  # the object, a name, the list, eight numbers; less the object itself
    count = check_body(json.dumps(fields).encode(), SMALL)
    assert count == 10
    check_lists(fields, count, SMALL)
    with pytest.raises(InvalidRequest, match="got 11"):
        check_body(json.dumps({"metadata": [1] * 9}).encode(), SMALL)


# ---- through the server ----

CASES = [
    (TEXT, {"prompt": ["a", "b"], "n": 3}, "max_choices", 6, "prompt"),
    (TEXT, {"prompt": ["a", "b", "c"]}, "max_choices", 3, "prompt"),
    (TEXT, {"prompt": "a", "stop": ["x", "y", "z"]}, "max_stop_strings", 3, "stop"),
    (TEXT, {"prompt": "a", "stop": ["xy", "z"]}, "max_stop_chars", 3, "stop"),
    (TEXT, {"prompt": "a", "stop": "xyz"}, "max_stop_chars", 3, "stop"),
    (TEXT, {"prompt": "a", "logit_bias": {"1": 1, "2": 1, "3": 1}}, "max_listed_tokens", 3, "logit_bias"),
    (TEXT, {"prompt": "a", "allowed_token_ids": [1, 2, 3]}, "max_listed_tokens", 3, "allowed_token_ids"),
    (TEXT, {"prompt": "a", "stop_token_ids": [1, 2, 3]}, "max_listed_tokens", 3, "stop_token_ids"),
    (
        TEXT,
        {"prompt": "ab", "n": 3, "logit_bias": {"1": 1}, "stop_token_ids": [1, 2]},
        "max_choice_tokens",
        9,
        "stop_token_ids",
    ),
    (CHAT, {"messages": HI * 3}, "max_messages", 3, "messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 3}]},
        "max_messages",
        4,
        "messages",
    ),
    (
        TEXT,
        {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 1},
        "max_response_bytes",
        3 * 2 * 128,
        "prompt_logprobs",
    ),
    (
        CHAT,
        {"messages": HI, "max_tokens": 1, "return_prompt_text": True},
        "max_response_bytes",
        43,
        "messages",
    ),
    (
        TEXT,
        {"prompt": "abc", "n": 2, "max_tokens": 1, "return_token_ids": True},
        "max_response_bytes",
        48,
        "prompt",
    ),
    (
        TEXT,
        {"prompt": "abc", "max_tokens": 4, "logprobs": 0},
        "max_response_bytes",
        4 * (8 + 128),
        "logprobs",
    ),
    (TEXT, {"prompt": "abc", "max_tokens": 4}, "max_response_bytes", 4 * 8, "max_tokens"),
    ("/tokenize", {"prompt": "abc"}, "max_tokenize_length", 3, "prompt"),
    ("/tokenize", {"messages": HI}, "max_tokenize_length", 43, "messages"),
    ("/detokenize", {"tokens": [1, 2, 3]}, "max_tokenize_length", 3, "tokens"),
]


@pytest.mark.parametrize(("path", "fields", "limit", "size", "param"), CASES)
def test_each_limit_is_a_flag_that_its_refusal_names(
    tokenizer: Tokenizer, says: Any, path: str, fields: dict[str, Any], limit: str, size: int, param: str
) -> None:
    with running(tokenizer, says(REPLY), **{limit: size}) as server:
        served = server.post(path, fields)
        assert served.status == 200, served.body
    with running(tokenizer, says(REPLY), **{limit: size - 1}) as server:
        refused = server.post(path, fields)
        assert refused.status == 400, refused.body
        assert f"at most {size - 1}, got {size}" in refused.error["message"]
        assert f"--{limit.replace('_', '-')}" in refused.error["message"]
        assert refused.error["param"] == param


def test_every_limit_has_its_case() -> None:
    assert {limit for _, _, limit, _, _ in CASES} | {"max_body_values"} == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_nothing_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(StartupError, match=f"--{name.replace('_', '-')} must be at least 1"):
        ServerConfig(**{name: 0})


# ---- quoting ----


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("short", "'short'"),
        (12, "12"),
        (True, "True"),
        (None, "None"),
        (1.5, "1.5"),
        ({"type": "json"}, "{'type': 'json'}"),
        ([1, 2], "[1, 2]"),
        (10**100, "<integer of 333 bits>"),
        (-(2**255), str(-(2**255))),
    ],
)
def test_a_quoted_value(value: object, wanted: str) -> None:
    assert quote(value) == wanted


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        ["x"] * 10**6,
        {str(key): [0] * 100 for key in range(10_000)},
        [[[[[["x" * 100] * 9] * 9] * 9] * 9]],
    ],
)
def test_a_quoted_value_is_a_line_at_most(value: object) -> None:
    assert len(quote(value)) <= 80


@pytest.mark.parametrize("error", [InvalidRequest, ContextLengthExceeded, PayloadTooLarge])
def test_whatever_a_refusal_quotes_is_cut(error: type[InvalidRequest]) -> None:
    refusal = error("x" * 10_000, param="y" * 10_000, advice="z" * 10_000)
    assert len(str(refusal)) <= 4001
    assert len(refusal.param or "") == 200
    assert error("short", param="n").param == "n"


# ---- texts that are longer than anything that can be used of them ----


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 20, -1])
def test_the_kept_tokens_of_a_long_text_are_those_of_the_whole(
    tokenizer: Tokenizer, says: Any, monkeypatch: pytest.MonkeyPatch, side: str, keep: int
) -> None:
    text = " ".join(map(str, range(20_000)))
    longest = []
    encode = Tokenizer.encode_batch

    def noted(self: Tokenizer, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        longest.append(max(map(len, texts)))
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", noted)
    with running(tokenizer, says("")) as server:
        fields = {"prompt": text, "truncate_prompt_tokens": keep, "truncation_side": side, "max_tokens": 4}
        answer = server.post(TEXT, fields)
        assert answer.status == 200, answer.body
        (asked,) = server.engine.adds
    ids = tokenizer.encode(text)
    count = 252 if keep == -1 else keep
    assert asked.prompt == tuple(ids[-count:] if side == "left" else ids[:count])
    assert max(longest) < len(text) / 4


def test_a_text_of_which_a_part_is_too_long_is_refused(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says("")) as server:
        error = server.post(TEXT, {"prompt": "x" * 100_000}).error
    assert error["code"] == "context_length_exceeded"
    assert "100000 characters in the prompt, of which the first 16384 are 16384 tokens" in error["message"]


def test_limits_are_documented() -> None:
    from pathlib import Path

    page = (Path(limits.__file__).parents[2] / "docs" / "api.md").read_text()
    config = ServerConfig()
    for name in LIMITS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `--{name.replace('_', '-')}`"))
        assert f"{getattr(config, name):,}" in row
