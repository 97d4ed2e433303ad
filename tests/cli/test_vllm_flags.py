"""Every flag of vLLM 0.32 is known: ours, accepted where it asks for what is so, or answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.flags import Parser, make_config
from penstock.cli.flags_page import render
from penstock.cli.serve import add_arguments
from penstock.cli.vllm_flags import BY_NAME, VllmFlag
from penstock.engine.config import EngineConfig
from penstock.server.config import ServerConfig

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "flags.md"
THEIRS = [
    (line.split()[0], [word for word in line.split()[1:] if not word.startswith("{")])
    for line in (HERE.parent.parent / "penstock" / "check" / "tables" / "vllm-0.32.txt")
    .read_text()
    .splitlines()
    if not line.startswith("#")
]
FLAGS = list({flag.name: flag for flag in BY_NAME.values()}.values())


def parser() -> Parser:
    made = Parser(prog="penstock serve")
    add_arguments(made)
    return made


PARSER = parser()


def accepted(*words: str) -> None:
    """They are read, and change nothing."""
    args = PARSER.parse_args(list(words))
    assert make_config(EngineConfig, args) == EngineConfig()
    assert make_config(ServerConfig, args) == ServerConfig()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        PARSER.parse_args(list(words))
    assert caught.value.code == 2
    return capsys.readouterr().err


def spellings(flag: VllmFlag, value: str | bool) -> list[list[str]]:
    """Every way of writing a flag with this value."""
    if isinstance(value, bool):
        name = flag.name if value else flag.name.replace("--", "--no-", 1)
        return [
            [name],
            [f"--{name[2:].replace('-', '_')}"],
            *([[flag.short]] if value and flag.short else []),
        ]
    assert not flag.is_switch
    words = [[name, value] for name in (*flag.names, f"--{flag.name[2:].replace('-', '_')}")]
    return [*words, [f"{flag.name}={value}"]]


def test_the_list_is_whole() -> None:
    assert len(THEIRS) == 316
    assert len({name for _, names in THEIRS for name in names if name.startswith("--")}) == 317


@pytest.mark.parametrize(("kind", "names"), THEIRS, ids=[names[0] for _, names in THEIRS])
def test_every_flag_of_vllm_is_known(kind: str, names: list[str]) -> None:
    known = PARSER._option_string_actions
    assert set(names) <= set(known)
    flag = BY_NAME.get(names[0])
    if flag is not None:
        assert {"switch": flag.is_switch, "value": flag.nargs is None, "values": flag.nargs == "+"}.get(
            kind, flag.nargs == "?"
        )
        assert kind != "switch" or f"--no-{names[0][2:]}" in known


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_what_asks_for_nothing_is_accepted(flag: VllmFlag) -> None:
    values = flag.switch or ["anything" if value == "*" else value for value in flag.values] or ["None"]
    for value in values:
        for words in spellings(flag, value):
            accepted(*words)


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if not flag.changes_nothing], ids=lambda flag: flag.name
)
def test_everything_else_is_answered(flag: VllmFlag, capsys: pytest.CaptureFixture[str]) -> None:
    other = (not flag.switch[0]) if flag.is_switch else "something else"
    for words in spellings(flag, other):
        message = refused(capsys, *words)
        assert flag.why in message
        assert "unknown" not in message
        assert all(value in message for value in flag.values)


@pytest.mark.parametrize(
    ("words", "parent"),
    [
        (["--compilation-config.mode", "3"], "--compilation-config"),
        (["--compilation_config.pass_config.fuse=1"], "--compilation-config"),
        (["-cc.mode=3"], "-cc"),
        (
            ["--speculative-config.model=x", "--speculative-config.num_speculative_tokens", "3"],
            "--speculative",
        ),
        (["--limit-mm-per-prompt.image+", "1,2"], "--limit-mm-per-prompt"),
        (["-O3"], "-O"),
        (["-O=3"], "-O"),
        (["-O", "3"], "-O"),
    ],
)
def test_parts_of_json_are_answered_as_their_flag(
    words: list[str], parent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *words)
    assert parent in message
    assert "needs" in message


def test_all_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--enable-lora", "--kv-cache-dtype=fp8", "--xyzzy", "1", "-pp", "2")
    assert all(name in message for name in ("--enable-lora", "--kv-cache-dtype fp8", "--xyzzy", "-pp 2"))
    assert message.count("\n") == 4


def test_the_last_word_wins() -> None:
    accepted("-pp", "4", "--pipeline-parallel-size", "1", "--enable-lora", "--no-enable-lora")


def test_values_are_compared_by_what_they_mean() -> None:
    accepted("--cpu-offload-gb", "0.0", "--additional-config", "{ }", "--kv-cache-dtype", "AUTO")
    accepted("--limit-mm-per-prompt={}", "--mm-processor-cache-gb", "4.0", "--hf-token")


def test_secrets_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--hf-token", "hf_secret")
    assert "HF_TOKEN" in message
    assert "secret" not in message


def test_long_values_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(refused(capsys, "--compilation-config", '{"a": "' + "x" * 5000 + '"}')) < 300


@pytest.mark.parametrize(
    ("word", "there", "not_there"),
    [
        ("vllm", ["--enable-lora", "--grpc-port", "--nnodes, -n"], ["--max-model-len "]),
        ("all", ["--enable-lora", "--max-model-len "], []),
        ("lora", ["--enable-lora", "--max-loras"], ["--grpc-port", "--port"]),
        ("max_model", ["--max-model-len"], ["--enable-lora"]),
        ("xyzzy", ["No flag has 'xyzzy'"], []),
    ],
)
def test_help_on_a_word(
    word: str, there: list[str], not_there: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        PARSER.parse_args([f"--help={word}"])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert all(name in text for name in there)
    assert not any(name in text for name in not_there)


def test_the_page_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == render(), (
        "write it again: python -m penstock.cli.flags_page > docs/flags.md"
    )


def test_the_page_has_every_flag() -> None:
    page = render()
    for _, names in THEIRS:
        assert any(f"`{name}`" in page or f"`--[no-]{name[2:]}`" in page for name in names) or names == [
            "--model"
        ]
