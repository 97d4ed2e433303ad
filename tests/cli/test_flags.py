"""Flags: made from the configuration, explained in one line each, and helpful when they are wrong."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

import pytest

from penstock.cli.flags import REMOVED, Parser, make_config
from penstock.cli.main import COMMANDS, main
from penstock.cli.serve import add_arguments, environment_keys
from penstock.cli.values import parse_size
from penstock.cli.vllm_flags import BY_NAME
from penstock.engine.config import EngineConfig
from penstock.server.config import ServerConfig


def parser() -> Parser:
    made = Parser(prog="penstock serve")
    add_arguments(made)
    return made


def engine(*arguments: str) -> EngineConfig:
    config: EngineConfig = make_config(EngineConfig, parser().parse_args(list(arguments)))
    return config


def server(*arguments: str, **more: Any) -> ServerConfig:
    config: ServerConfig = make_config(ServerConfig, parser().parse_args(list(arguments)), **more)
    return config


def test_no_flags_mean_the_defaults_of_the_dataclasses() -> None:
    assert engine() == EngineConfig()
    assert server() == ServerConfig()


def test_spellings() -> None:
    assert engine("models/x").model == "models/x"
    assert engine("--model", "models/x").model == "models/x"
    assert engine("--max_model_len", "8Ki").max_model_len == 8192
    assert engine("--max-model-len=-1").max_model_len == -1
    assert engine("--max-model-len", "auto").max_model_len == -1
    assert engine("--max-model-len", "AUTO").max_model_len == -1
    assert engine("--device-memory-utilization", "0.5").gpu_memory_utilization == 0.5
    assert engine("--kv-cache-memory-bytes", "1.5GiB").kv_cache_memory_bytes == 3 << 29
    assert engine("--no-enable-prefix-caching").enable_prefix_caching is False
    assert engine("--gpu_memory_utilization=0.8").gpu_memory_utilization == 0.8
    assert engine("--batch-invariant").batch_invariant is True
    assert engine("--no-batch-invariant").batch_invariant is False
    assert engine().batch_invariant is None


def test_names_of_vllm() -> None:
    named = server("--h11-max-incomplete-event-size", "8192", "--h11_max_header_count", "64")
    assert (named.max_header_bytes, named.max_header_count) == (8192, 64)


def test_flags_that_may_be_given_several_times() -> None:
    assert server("--api-key", "a", "b", "--api-key", "c").api_key == ("a", "b", "c")
    assert server("--served-model-name", "x", "y").served_model_name == ("x", "y")
    assert server(api_key=("from environment",)).api_key == ("from environment",)
    assert server("--api-key", "a", api_key=("from environment",)).api_key == ("a",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("25.6k", 25600),
        ("1.001k", 1001),
        ("1.5m", 1500000),
        ("2M", 2 << 20),
        ("3g", 3 * 10**9),
        ("3G", 3 << 30),
        ("1t", 10**12),
        ("1T", 1 << 40),
        ("8Ki", 8192),
        ("4gib", 1 << 32),
        ("1.5GiB", 3 << 29),
        ("1TiB", 1 << 40),
        (" 7 ", 7),
    ],
)
def test_sizes_are_vllms(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("", "8192"),
        ("k", "8192"),
        ("eight", "8192"),
        ("8q", "KiB"),
        ("8kk", "KiB"),
        ("1.5", "whole"),
        ("0.0001k", "whole"),
        ("1.5K", "write 1.5k or 1.5KiB"),
        ("8KB", "write 8k or 8KiB"),
        ("2.5gb", "write 2.5g or 2.5GiB"),
    ],
)
def test_sizes_that_are_none_or_two(text: str, instead: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(instead)):
        parse_size(text)


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("float", "float32"), ("Half", "float16")])
def test_vllms_other_names_of_types(name: str, dtype: str) -> None:
    assert engine("--dtype", name).dtype == dtype == EngineConfig(dtype=name.lower()).dtype


def test_none_is_vllms_word_for_no_value() -> None:
    given = ("--revision", "None", "--max-num-seqs", "None", "--chat-template", "", "--seed=None")
    assert engine(*given) == EngineConfig()
    assert server(*given) == ServerConfig()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--swap-space", "--gpu-memory-utilization"),
        ("--num-scheduler-steps", "Drop it"),
        ("--gpu-memory-utilisation", "Did you mean --gpu-memory-utilization?"),
        ("--max-num-seq", "Did you mean --max-num-seqs?"),
        ("--max-num-partial-prefills", "--long-prefill-token-threshold"),
        ("--xyzzy", "--help"),
        ("--temprature", "See penstock serve --help"),
        ("--max-model", "Did you mean --max-model-len?"),
        ("--lora-module", "Did you mean --lora-modules? It is vLLM's, and needs LoRA"),
    ],
)
def test_wrong_flags_say_what_to_use(capsys: pytest.CaptureFixture[str], flag: str, instead: str) -> None:
    for arguments in ([flag, "4"], [f"{flag}=4"], [flag.replace("-", "_").replace("__", "--", 1), "4"]):
        message = refused(capsys, *arguments)
        assert flag in message
        assert instead in message


def test_no_flag_is_both_there_and_explained_away() -> None:
    there = set(parser()._option_string_actions)
    assert not there & set(REMOVED)
    assert not set(BY_NAME) & {"--" + entry.name.replace("_", "-") for entry in fields(ServerConfig)}
    for text in REMOVED.values():
        for named in re.findall(r"(?:use|Use|raise) (--[a-z-]+)", text):
            assert named in there, f"{named} is recommended, but is no flag"


def test_an_unsupported_quantisation_lists_the_supported_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine("-q", "INT8").quantization == "int8"
    message = refused(capsys, "-q", "awq")
    assert "awq" in message
    assert all(name in message for name in ("none", "int8", "w8a8", "int4"))


def test_no_origin_may_call_by_default() -> None:
    assert server().allowed_origins == ()
    assert server("--allowed-origins", "").allowed_origins == ()
    assert server("--allowed-origins", "[]").allowed_origins == ()


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        (["*"], ("*",)),
        (["http://a"], ("http://a",)),
        (["http://a", "https://b.example:8443"], ("http://a", "https://b.example:8443")),
        (['["http://a"]'], ("http://a",)),
        (['["http://a", "http://b"]'], ("http://a", "http://b")),
        (["null", "http://[::1]:3000"], ("null", "http://[::1]:3000")),
    ],
)
def test_origins_in_both_spellings(given: list[str], origins: tuple[str, ...]) -> None:
    assert server("--allowed-origins", *given).allowed_origins == origins


@pytest.mark.parametrize(
    "given",
    ["http://a,http://b", "a.example", "http://a/", "http://a/chat", '["http://a/"]', "[http://a]", "[1]"],
)
def test_origins_that_would_allow_nothing_are_refused(capsys: pytest.CaptureFixture[str], given: str) -> None:
    message = refused(capsys, "--allowed-origins", given)
    assert "--allowed-origins" in message
    assert "http://a" in message or given in message


def test_methods_and_headers_as_json_lists() -> None:
    config = server("--allowed-methods", '["GET", "POST"]', "--allowed-headers", "X-A", "X-B")
    assert config.allowed_methods == ("GET", "POST")
    assert config.allowed_headers == ("X-A", "X-B")


def test_json_flags_in_one_piece_and_in_parts() -> None:
    whole = server("--default-chat-template-kwargs", '{"enable_thinking": false, "a": {"b": [1, "x"]}}')
    assert whole.default_chat_template_kwargs == {"enable_thinking": False, "a": {"b": [1, "x"]}}
    parts = server(
        "--default-chat-template-kwargs.enable_thinking",
        "false",
        "--default_chat_template_kwargs.a.b=[1]",
        "--default-chat-template-kwargs.a.b+",
        "x",
    )
    assert parts == whole


@pytest.mark.parametrize("given", ["{", "[1]", '{"messages": []}', '{"chat_template": "x"}'])
def test_json_flags_that_cannot_be(capsys: pytest.CaptureFixture[str], given: str) -> None:
    try:
        status = main(["serve", "--default-chat-template-kwargs", given])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert "--default-chat-template-kwargs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "keys"),
    [
        ({}, ()),
        ({"VLLM_API_KEY": ""}, ()),
        ({"VLLM_API_KEY": "a,b"}, ("a,b",)),
        ({"PENSTOCK_API_KEY": "a,b"}, ("a", "b")),
        ({"PENSTOCK_API_KEY": "a", "VLLM_API_KEY": "b"}, ("a", "b")),
    ],
)
def test_keys_in_the_environment(environment: dict[str, str], keys: tuple[str, ...]) -> None:
    assert environment_keys(environment) == keys
    assert server(api_key=keys).api_key == keys
    assert server("--api-key", "c", api_key=keys).api_key == ("c",)


def test_help_explains_every_flag_in_one_line() -> None:
    text = parser().format_help()
    assert "--help=vllm" in text
    assert "--enable-lora" not in text, "vLLM's own flags have a page of their own"
    for config in (EngineConfig, ServerConfig):
        for entry in fields(config):
            name = "--" + entry.name.replace("_", "-")
            if entry.metadata.get("positional"):
                name = entry.name
            elif isinstance(entry.default, bool) or entry.type == "bool | None":
                name = name.replace("--", "--[no-]", 1)
            (line,) = [line for line in text.splitlines() if re.match(rf"  {re.escape(name)}( |$)", line)]
            assert len(line.split(maxsplit=1)[1]) > 20, line
    assert not re.search(r"^ {20,}\S", text, re.MULTILINE), "a help text is folded"


def test_bad_values_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--dtype" in refused(capsys, "--dtype", "int3")
    assert main(["serve", "--max-num-seqs", "0"]) == 2
    assert "--max-num-seqs must be at least 1, got 0." in capsys.readouterr().err
    assert main(["serve", "--gpu-memory-utilization", "1.5"]) == 2
    assert "(0, 1], got 1.5" in capsys.readouterr().err
    assert main(["serve", "--no-enable-chunked-prefill"]) == 2
    assert "always on" in capsys.readouterr().err
    assert main(["serve", "--tensor-parallel-size", "4"]) == 2
    assert "not implemented" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: penstock {command}" in capsys.readouterr().out


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["surf"])
    assert "'serve'" in capsys.readouterr().err
