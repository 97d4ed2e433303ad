"""Fields that are known and not served: the one value that changes nothing, and every other one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.core.errors import InvalidRequest, StartupError, UnsupportedParameter
from penstock.server.config import ServerConfig
from penstock.server.conversation import normalise
from penstock.server.fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, HARMLESS, TOKENIZE_NEUTRAL, Rule
from penstock.server.fields import check as check_fields
from penstock.server.ignored import Ignored
from penstock.server.near import Names
from penstock.server.protocol import Body, ChatRequest, CompletionRequest, decode

TABLES = {"chat": CHAT_NEUTRAL, "completions": COMPLETION_NEUTRAL, "tokenize": TOKENIZE_NEUTRAL}


def check(
    fields: dict[str, Any],
    implemented: tuple[str, ...] = (),
    neutral: dict[str, Rule] | None = None,
    *,
    strict: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """(what is kept of them, what is ignored)"""
    ignored = Ignored(strict=strict)
    neutral = neutral or {}
    kept = check_fields(fields, implemented, neutral, Names((*implemented, *neutral)), ignored)
    return kept, list(ignored.names)


#: Field → OpenAI's or vLLM's defaults, however they may be written, and values that ask for something.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "audio": ([], [{}, {"voice": "alloy"}]),
    "early_stopping": ([False, 0, "off"], [True, 1, "never"]),
    "ec_transfer_params": ([{}], [{"a": 1}]),
    "function_call": (["none", "auto"], ["f", {"name": "f"}, "", "XXnoneXX"]),
    "functions": ([[]], [[{}]]),
    "guided_choice": ([], [["a"], []]),
    "guided_decoding_backend": ([], ["auto"]),
    "guided_grammar": ([], ["root"]),
    "guided_json": ([], [{}]),
    "guided_json_object": ([], [True]),
    "guided_regex": ([], ["a"]),
    "guided_whitespace_pattern": ([], [" "]),
    "kv_transfer_params": ([{}], [{"a": 1}]),
    "logits_processors": ([[]], [["f"]]),
    "max_output_tokens": ([], [5]),
    "media_io_kwargs": ([{}], [{"image": {}}]),
    "mm_processor_kwargs": ([{}], [{"a": 1}]),
    "modalities": ([["text"]], [["audio"], ["text", "audio"], [], "text"]),
    "prediction": ([], [{"type": "content", "content": ""}]),
    "prompt_embeds": ([[]], ["x"]),
    "repetition_detection": ([], [{}]),
    "return_mm_kwargs": ([True, 1], [False, 0, "maybe"]),
    "return_token_offsets": ([False, 0.0], [True, 1]),
    "routed_experts_prompt_start": ([0, "0", False], [1, -1, True]),
    "tools": ([[]], [[{"type": "function"}]]),
    "verbosity": (["medium"], ["low", "high"]),
    "watermarking": ([False, 0], [True, 1, {}]),
    "web_search_options": ([], [{}]),
}


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, rules in TABLES.items() for name in rules if name in VALUES]
)
def test_what_changes_nothing_is_taken_and_everything_else_refused_or_named(table: str, name: str) -> None:
    neutral, others = VALUES[name]
    for value in neutral:
        for strict in (False, True):
            assert check({name: value}, (), TABLES[table], strict=strict) == ({}, []), value
    for value in others:
        if name in HARMLESS:
            assert check({name: value}, (), TABLES[table]) == ({}, [name]), value
        for strict in (True,) if name in HARMLESS else (False, True):
            with pytest.raises(UnsupportedParameter, match=name) as caught:
                check({name: value}, (), TABLES[table], strict=strict)
            assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_what_would_change_the_answer_is_never_ignored() -> None:
    """Of what is, another value has no effect in vLLM either, or none on what is said."""
    assert sorted(HARMLESS) == [
        "early_stopping",
        "max_tool_calls",
        "prediction",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "verbosity",
    ]


def test_every_one_of_them_is_known() -> None:
    assert set(VALUES) == set().union(*TABLES.values())


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
def test_whole_numbers_have_64_bits(value: int) -> None:
    assert check({"seed": value}, ("seed",)) == ({"seed": value}, [])
    beyond = value + (1 if value > 0 else -1)
    with pytest.raises(InvalidRequest, match="64 bits") as caught:
        check({"seed": beyond}, ("seed",))
    assert caught.value.param == "seed"
    # however they are written
    assert decode({"prompt": "a", "seed": str(value)}, CompletionRequest, Ignored()).seed == value
    for written in (beyond, str(beyond), f" {beyond}.0"):
        with pytest.raises(InvalidRequest) as caught:
            decode({"prompt": "a", "seed": written}, CompletionRequest, Ignored())
        assert caught.value.param == "seed"


def test_of_long_names_no_near_one_is_looked_for() -> None:
    """Comparing takes the square of their length."""
    known = "a" * 63
    for strict in (False, True):
        with pytest.raises(InvalidRequest) as caught:
            check({"a" * 64: 1}, (known,), strict=strict)
        assert str(caught.value).endswith(f". Did you mean {known}?")
        assert caught.value.code == "unknown_parameter"
    kept, [named] = check({"a" * 65: 1}, (known,))
    assert kept == {}
    assert len(named) == 64
    with pytest.raises(InvalidRequest) as caught:
        check({"a" * 65: 1}, (known,), strict=True)
    assert str(caught.value) == f"Unrecognized request argument supplied: {named}."
    assert (caught.value.param, caught.value.code) == (named, "unknown_parameter")


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
        ({"stream": 2.0}, "Invalid type for stream: expected bool, got float."),
        ({"user": 5, "truncation_side": 1.0}, "Invalid type for truncation_side: expected str, got float."),
        ({"stop_token_ids": [1, 2.5]}, "Invalid type for stop_token_ids[1]: expected int, got float."),
        (
            {"stream_options": {"include_usag": 1}},
            "Unrecognized request argument supplied: stream_options.include_usag. "
            "Did you mean include_usage?",
        ),
        ({"stream_options": {"include_usage": 2}}, "Invalid type for stream_options.include_usage: "),
    ],
)
def test_a_wrong_type_is_named_as_json_has_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode({"prompt": "a", **fields}, CompletionRequest, Ignored())
    assert str(caught.value).startswith(message)
    assert str(caught.value) == message or message.endswith(": ")
    assert str(caught.value.param) in message


@pytest.mark.parametrize(
    ("shape", "least", "name", "texts"),
    [
        (CompletionRequest, {"prompt": "a"}, "logprobs", False),
        (CompletionRequest, {"prompt": "a"}, "prompt_logprobs", False),
        (ChatRequest, {"messages": []}, "top_logprobs", False),
        (ChatRequest, {"messages": []}, "prompt_logprobs", False),
        (CompletionRequest, {"prompt": "a"}, "max_tokens", True),
        (ChatRequest, {"messages": []}, "top_k", True),
    ],
)
def test_in_some_fields_vllm_reads_no_text_as_a_number(
    shape: type[Body], least: dict[str, Any], name: str, texts: bool
) -> None:
    def read(value: Any) -> Any:
        return getattr(decode({**least, name: value}, shape, Ignored()), name)

    for value in (3, 3.0):
        assert read(value) == 3
        assert type(read(value)) is int
    if texts:
        assert read("3") == 3
    else:
        with pytest.raises(InvalidRequest, match=f"^Invalid type for {name}: expected int") as caught:
            read("3")
        assert (caught.value.param, caught.value.code) == (name, "invalid_type")
    with pytest.raises(InvalidRequest):
        read(2.5)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^Missing required parameter: messages\.$") as caught:
        decode({"messages": None}, ChatRequest, Ignored())
    assert caught.value.param == "messages"
