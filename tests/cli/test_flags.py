"""Flags: made from the configuration, explained in one line each, and helpful when they are wrong."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

import pytest

from penstock.cli.flags import ALWAYS_ON, NEUTRAL, NOT_IMPLEMENTED, REMOVED, Parser, make_config, parse_size
from penstock.cli.main import COMMANDS, main
from penstock.cli.serve import add_arguments
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
    assert engine("--kv-cache-memory-bytes", "1.5GiB").kv_cache_memory_bytes == 3 << 29
    assert engine("--no-enable-prefix-caching").enable_prefix_caching is False
    assert engine("--gpu_memory_utilization=0.8").gpu_memory_utilization == 0.8
    assert engine("--batch-invariant").batch_invariant is True
    assert engine("--no-batch-invariant").batch_invariant is False
    assert engine().batch_invariant is None


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
        ("1.5M", 1500000),
        ("4gib", 1 << 32),
        ("1T", 10**12),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "k", "8q", "1.5", "0.0001k", "eight"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


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
        ("--show-hidden-metrics-for-version", "does not implement yet"),
        ("--chat-template-content-format", "does not implement yet"),
        ("--uds", "does not implement yet"),
        ("--logprobs-mode", "does not implement yet"),
        ("--max-log-len", "does not implement yet"),
        ("--api-server-count", "does not implement yet"),
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
    assert not there & NOT_IMPLEMENTED
    for text in REMOVED.values():
        for named in re.findall(r"(?:use|Use|raise) (--[a-z-]+)", text):
            assert named in there, f"{named} is recommended, but is no flag"


@pytest.mark.parametrize("flag", ["-O0", "-O"])
def test_short_flags_of_vllm_are_explained(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert "does not implement yet" in refused(capsys, flag, "3")


def test_an_unsupported_quantisation_lists_the_supported_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine("-q", "INT8").quantization == "int8"
    message = refused(capsys, "-q", "awq")
    assert "awq" in message
    assert all(name in message for name in ("none", "int8", "w8a8", "int4"))


def test_flags_of_vllm_that_change_nothing_are_accepted() -> None:
    given = [word for names, values in NEUTRAL.items() for v in values for word in (names.split()[0], v)]
    short = ["-q", "None", "-pp", "1", "-dp=1", "-tp", "1", "--cpu_offload_gb", "0.0"]
    both = [word for name in ALWAYS_ON for word in (name, name.replace("--", "--no-", 1))]
    words = [*given, *short, *both, "models/x"]
    assert engine(*words) == EngineConfig(model="models/x", tensor_parallel_size=1)
    assert server(*words) == ServerConfig()


def test_the_value_of_a_flag_that_is_not_implemented_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--kv-cache-dtype fp8 asks for" in refused(capsys, "--kv-cache-dtype=fp8")
    assert "--cpu-offload-gb x asks for" in refused(capsys, "--cpu-offload-gb", "x")


def test_no_origin_may_call() -> None:
    assert server("--allowed-origins", "").allowed_origins == ()
    assert server().allowed_origins == ("*",)


def test_help_explains_every_flag_in_one_line() -> None:
    text = parser().format_help()
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
