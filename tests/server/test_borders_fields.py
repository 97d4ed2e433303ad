"""Fields that are known and not served: the one value that changes nothing, and every other one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.core.errors import InvalidRequest, StartupError, UnsupportedParameter
from penstock.server.config import ServerConfig
from penstock.server.conversation import normalise
from penstock.server.fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, TOKENIZE_NEUTRAL, check
from penstock.server.protocol import (
    ChatRequest,
    CompletionRequest,
    TokenizeChatRequest,
    _integer_fields,
    decode,
)

TABLES = {"chat": CHAT_NEUTRAL, "completions": COMPLETION_NEUTRAL, "tokenize": TOKENIZE_NEUTRAL}

#: Field → OpenAI's or vLLM's defaults, and values that ask for something.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "audio": ([], [{}, {"voice": "alloy"}]),
    "bad_words": ([[], ""], [["x"], 0]),
    "best_of": ([1], [2, 0, True, "1"]),
    "early_stopping": ([False], [True, 0, "never"]),
    "ec_transfer_params": ([{}], [{"a": 1}]),
    "function_call": (["none", "auto"], ["f", {"name": "f"}, "", "XXnoneXX"]),
    "functions": ([[]], [[{}]]),
    "guided_choice": ([], [["a"], []]),
    "guided_decoding_backend": ([], ["auto"]),
    "guided_grammar": ([], ["root"]),
    "guided_json": ([], [{}]),
    "guided_regex": ([], ["a"]),
    "guided_whitespace_pattern": ([], [" "]),
    "include_reasoning": ([True], [False, 1]),
    "kv_transfer_params": ([{}], [{"a": 1}]),
    "length_penalty": ([1, 1.0], [0.5, 2, "1"]),
    "logits_processors": ([[]], [["f"]]),
    "logprob_token_ids": ([[]], [[1]]),
    "media_io_kwargs": ([{}], [{"image": {}}]),
    "mm_processor_kwargs": ([{}], [{"a": 1}]),
    "modalities": ([["text"]], [["audio"], ["text", "audio"], [], "text"]),
    "prediction": ([], [{"type": "content", "content": ""}]),
    "prompt_embeds": ([[]], ["x"]),
    "repetition_detection": ([], [{}]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {}, "text"]),
    "return_mm_kwargs": ([True], [False, 1]),
    "return_token_offsets": ([False], [True, 0]),
    "routed_experts_prompt_start": ([0], [1, False]),
    "structured_outputs": ([{}], [{"regex": "a"}]),
    "suffix": ([""], ["b"]),
    "thinking_token_budget": ([-1], [1, 0, 100]),
    "tool_choice": (["none", "auto"], ["required", {"type": "function"}]),
    "tools": ([[]], [[{"type": "function"}]]),
    "use_beam_search": ([False], [True, 0]),
    "verbosity": (["medium"], ["low", "high"]),
    "vllm_xargs": ([{}], [{"a": 1}]),
    "watermarking": ([False], [True, {}]),
    "web_search_options": ([], [{}]),
}


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, rules in TABLES.items() for name in rules if name in VALUES]
)
def test_what_changes_nothing_is_taken_and_everything_else_refused(table: str, name: str) -> None:
    harmless, others = VALUES[name]
    for value in harmless:
        assert check({name: value}, (), TABLES[table]) == {}
    for value in others:
        with pytest.raises(UnsupportedParameter, match=name) as caught:
            check({name: value}, (), TABLES[table])
        assert caught.value.param == name


def test_every_one_of_them_is_known() -> None:
    shapes = (ChatRequest, CompletionRequest, TokenizeChatRequest)
    implemented = {name for shape in shapes for name in shape.__struct_fields__}
    assert set(VALUES) <= implemented.union(*TABLES.values())


@pytest.mark.parametrize(("n", "best_of", "fine"), [(3, 3, True), (3, 1, False), (1, 1, True)])
def test_the_best_of_n_are_all_of_them(n: int, best_of: int, fine: bool) -> None:
    fields = {"n": n, "best_of": best_of}
    if fine:
        assert check(fields, ("n",), COMPLETION_NEUTRAL) == {"n": n}
    else:
        with pytest.raises(UnsupportedParameter):
            check(fields, ("n",), COMPLETION_NEUTRAL)


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
def test_whole_numbers_have_64_bits(value: int) -> None:
    assert check({"seed": value}, ("seed",), {}) == {"seed": value}
    beyond = value + (1 if value > 0 else -1)
    with pytest.raises(InvalidRequest, match="64 bits") as caught:
        check({"seed": beyond}, ("seed",), {})
    assert caught.value.param == "seed"


def test_of_long_names_no_near_one_is_looked_for() -> None:
    """Comparing takes the square of their length."""
    known = "a" * 63
    for length, hint in ((64, f" Did you mean {known}?"), (65, "")):
        with pytest.raises(InvalidRequest) as caught:
            check({"a" * length: 1}, (known,), {})
        assert str(caught.value).endswith("." + hint)
        assert caught.value.code == "unknown_parameter"


# ---- messages ----


def test_only_tools_and_users_must_say_something() -> None:
    assert normalise([{"role": "function", "name": "f"}]) == [
        {"role": "function", "name": "f", "content": ""}
    ]
    for role in ("system", "developer", "user", "tool"):
        with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content"):
            normalise([{"role": role}])


@pytest.mark.parametrize("calls", [[], None])
def test_no_calls_are_no_field_of_a_message(calls: Any) -> None:
    assert normalise([{"role": "assistant", "content": "a", "tool_calls": calls}]) == [
        {"role": "assistant", "content": "a"}
    ]


def test_calls_are_handed_on_with_everything_in_them() -> None:
    call = {"id": "c", "type": "function", "index": 3, "function": {"name": "f", "strict": True}}
    for arguments, read in (("", {}), (None, {}), ('{"a": [1]}', {"a": [1]}), ({"a": 1}, {"a": 1})):
        function = {**call["function"], "arguments": arguments}  # type: ignore[dict-item]
        [message] = normalise([{"role": "assistant", "tool_calls": [{**call, "function": function}]}])
        assert message["tool_calls"] == [{**call, "function": {**function, "arguments": read}}]


# ---- configuration ----


@pytest.mark.parametrize("name", ["chat_template", "messages"])
def test_variables_of_the_server_leave_the_templates_own_alone(name: str) -> None:
    fine = json.loads('{"mood": "merry"}')
    assert ServerConfig(default_chat_template_kwargs=fine).default_chat_template_kwargs == fine
    with pytest.raises(StartupError, match="--default-chat-template-kwargs") as caught:
        ServerConfig(default_chat_template_kwargs={**fine, name: "x"})
    assert caught.value.param == "--default-chat-template-kwargs"


@pytest.mark.parametrize(
    ("flag", "fine", "wrong"),
    [
        ("--max-logprobs", -1, -2),
        ("--stream-interval", 1, 0),
        ("--chat-template-timeout", 0.01, 0.009),
        ("--chat-template-timeout", 3600, 3601),
        ("--max-choices", 1, 0),
    ],
)
def test_values_of_flags_at_their_ends(flag: str, fine: float, wrong: float) -> None:
    name: Any = flag.removeprefix("--").replace("-", "_")
    ServerConfig(**{name: fine})
    with pytest.raises(StartupError) as caught:
        ServerConfig(**{name: wrong})
    assert caught.value.param == flag
    assert str(caught.value).startswith(f"{flag} ")


# ---- types ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": "x"}, "Invalid type for n: expected int, got str."),
        ({"n": 1.5}, "Invalid type for n: expected int, got float."),
        ({"stream": 1.0}, "Invalid type for stream: expected bool, got float."),
        ({"user": 5, "truncation_side": 1.0}, "Invalid type for truncation_side: expected str, got float."),
        ({"stop_token_ids": [1, 2.5]}, "Invalid type for stop_token_ids[1]: expected int, got float."),
        ({"stream_options": {"a": 1}}, "Unrecognized request argument supplied: stream_options.a."),
    ],
)
def test_a_wrong_type_is_named_as_json_has_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode({"prompt": "a", **fields}, CompletionRequest)
    assert str(caught.value) == message
    assert str(caught.value.param) in message


def test_fields_of_whole_numbers_are_those_that_take_no_others() -> None:
    found = _integer_fields.__wrapped__(CompletionRequest)
    assert {"n", "seed", "top_k", "max_tokens", "logprobs", "stop_token_ids", "priority"} <= found
    others = {"temperature", "top_p", "stream", "stop", "truncation_side", "logit_bias", "neutral", "echo"}
    assert not others & found


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^Missing required parameter: messages\.$") as caught:
        decode({"messages": None}, ChatRequest)
    assert caught.value.param == "messages"
