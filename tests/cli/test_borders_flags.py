"""Flags made from dataclasses: every kind of field, its help, and what is said of what is not there."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.cli import main
from penstock.cli.config_file import read_config
from penstock.cli.flags import REMOVED, Parser, add_config, add_config_file, add_vllm_flags, make_config
from penstock.cli.flags_page import render
from penstock.cli.values import or_word, parse_json_object, parse_list, parse_origins, parse_size
from penstock.cli.vllm_flags import VllmFlag, _flag
from penstock.core.errors import StartupError


def option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What configurations share."""

    port_number: int = option(8000, "Port to listen on.")


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """One field of each kind."""

    name: str = option("demo", "What to serve", positional=True)
    some_count: int = option(3, "How many")
    some_size: int | None = option(None, "How large, 100% of it", size=True, auto=-1)
    some_share: float = option(0.5, "GPU share.")
    some_text: str | None = option(None, "A text.", metavar="WORD")
    a_switch: bool = option(False, "A switch.")
    another_switch: bool = option(True, "Another one, default on.")
    switch_on: bool = option(True, "On.")
    third_switch: bool | None = option(None, "A third.")
    many_names: tuple[str, ...] = option(("a", "b"), "Several.")
    no_names: tuple[str, ...] = option((), "None so far.")
    one_of: str = option("left", "A side", choices=("left", "right"))
    one_of_more: str = option("up", "A way", choices=("up", "down"), metavar="WAY")
    some_object: Mapping[str, Any] | None = option(None, "An object.")
    empty_text: str = option("", "Nothing.")


def made() -> Parser:
    parser = Parser(prog="tool")
    add_config_file(parser)
    add_config(parser, Config, "Things")
    add_vllm_flags(parser)
    return parser


def config(*words: str) -> Config:
    found: Config = make_config(Config, made().parse_args(list(words)))
    return found


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        made().parse_args(list(words))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tool: ")
    assert "usage" not in error
    return error.removeprefix("tool: ").removesuffix("\n")


# ---- values ----


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), {}),
        (("x",), {"name": "x"}),
        (("--name", "x"), {"name": "x"}),
        (("--some-count", "4"), {"some_count": 4}),
        (("--some_count=4",), {"some_count": 4}),
        (("--some-size", "1Ki"), {"some_size": 1024}),
        (("--some-size", "auto"), {"some_size": -1}),
        (("--some-size", "5", "--some-size", "None"), {"some_size": None}),
        (("--some-size", ""), {"some_size": None}),
        (("--some-share", "1"), {"some_share": 1.0}),
        (("--some-text", "a_b"), {"some_text": "a_b"}),
        (("--some-text", "None"), {"some_text": None}),
        (("--a-switch",), {"a_switch": True}),
        (("--no-another-switch",), {"another_switch": False}),
        (("--third-switch",), {"third_switch": True}),
        (("--no_third_switch",), {"third_switch": False}),
        (("--many-names", "x", "y", "--many-names", "z"), {"many_names": ("x", "y", "z")}),
        (("--one-of", "RIGHT"), {"one_of": "right"}),
        (("--some-object", '{"a": 1}'), {"some_object": {"a": 1}}),
        (("--some-object", "None"), {"some_object": None}),
        (("--some-object.a_b.c", "1"), {"some_object": {"a_b": {"c": 1}}}),
        (("--some_object.a", "x y"), {"some_object": {"a": "x y"}}),
        (("--some-object.a=", "--some-object.b=1=2"), {"some_object": {"a": "", "b": "1=2"}}),
        (("--some-object.a+", "x,y", "--some-object.a+=z"), {"some_object": {"a": ["x", "y", "z"]}}),
        (("--some-object.a", "1", "--some-object.a", "2"), {"some_object": {"a": 2}}),
        (("--some-object.a", "1", "--some-object.a+", "x"), {"some_object": {"a": ["x"]}}),
        (("--port-number", "1"), {"port_number": 1}),
    ],
)
def test_what_is_written_arrives(words: tuple[str, ...], fields: dict[str, Any]) -> None:
    found = config(*words)
    wanted = Config(**fields)
    if "many_names" in fields:
        found = make_config(
            Config, argparse.Namespace(**{**vars(found), "many_names": tuple(found.many_names)})
        )
    assert found == wanted


def test_what_was_not_given_can_be_filled_in() -> None:
    args = made().parse_args(["--some-count", "4"])
    assert make_config(Config, args, some_count=9, some_text="x") == Config(some_count=4, some_text="x")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--some-count", "x"), "argument --some-count: invalid int value: 'x'"),
        (("--some-count", "None"), "argument --some-count: invalid int value: 'None'"),
        (("--some-size", "x"), "argument --some-size: 'x' is not a number such as 8192"),
        (("--some-share", "x"), "argument --some-share: invalid float value: 'x'"),
        (("--one-of", "up"), "argument --one-of: invalid choice: 'up' (choose from 'left', 'right')"),
        (("--some-object", "[]"), "argument --some-object: '[]' is not a JSON object such as {\"key\": 1}"),
        (("--some-object", "{"), "argument --some-object: '{' is not JSON: "),
        (("--some-object.a",), "argument --some-object.a: expected one argument"),
        (("x", "y", "z"), "unrecognized arguments: y z"),
        (("x", "--some-counter", "1"), "unknown flag --some-counter. Did you mean --some-count?"),
        (("--some", "1"), "unknown flag --some. Did you mean --some-count?"),
        (("--som", "1"), "unknown flag --som. Did you mean --some-count?"),
        (("--so", "1"), "unknown flag --so. See tool --help."),
        (("--no-max-loras",), "unknown flag --no-max-loras. Did you mean "),
        (("--swap-space", "1"), f"--swap-space is not a flag here: {REMOVED['--swap-space']}"),
        (("--unknown.a", "1"), "unknown flag --unknown.a. See tool --help."),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(capsys, *words)
    assert found.startswith(error)
    assert "\n" not in found


# ---- help ----


def help_on(capsys: pytest.CaptureFixture[str], word: str) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        made().parse_args([word])
    assert not caught.value.code
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_help_has_a_line_for_each_flag(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_on(capsys, "--help")
    assert lines[0] == "usage: tool [MODEL] [flags]"
    assert [line for line in lines if line.startswith(("--", "name"))] == [
        "--config FILE flags from a YAML file, `max-model-len: 8192`; those of the command line win",
        "name what to serve (default: demo)",
        "--some-count N how many (default: 3)",
        "--some-size N how large, 100% of it",
        "--some-share X GPU share (default: 0.5)",
        "--some-text WORD a text",
        "--[no-]a-switch a switch (default: off)",
        "--[no-]another-switch another one, default on",
        "--[no-]switch-on on (default: on)",
        "--[no-]third-switch a third",
        "--many-names NAME [NAME ...] several (default: a b)",
        "--no-names NAME [NAME ...] none so far",
        "--one-of OF left|right: a side (default: left)",
        "--one-of-more WAY up|down: a way (default: up)",
        "--some-object JSON an object",
        "--empty-text TEXT nothing",
        "--port-number N port to listen on (default: 8000)",
    ]
    assert "Things:" in lines
    text = " ".join(lines)
    assert (
        "Every flag of vLLM 0.32 is known: tool --help=vllm and docs/flags.md say which are accepted" in text
    )
    assert "--help=WORD shows the flags with a word in their name." in text


def test_help_on_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_on(capsys, "--help=SOME_SH") == ["--some-share X GPU share (default: 0.5)"]
    assert help_on(capsys, "--help=one-of") == [
        "--one-of OF left|right: a side (default: left)",
        "--one-of-more WAY up|down: a way (default: up)",
    ]
    assert help_on(capsys, "--help=xyzzy") == ["No flag has 'xyzzy' in its name. See tool --help."]
    everything, theirs = help_on(capsys, "--help=all"), help_on(capsys, "--help=vllm")
    assert everything[0].startswith("usage: tool")
    assert everything[-len(theirs) :] == theirs
    assert not any("--some-count" in line for line in theirs)
    assert any("--enable-lora" in line for line in theirs)
    assert any("--enable-lora" in line for line in help_on(capsys, "--help=lora"))


# ---- files of flags ----


def test_a_file_stands_under_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("name: x\nsome_count: 5\na-switch: true\nanother-switch: false\nmany-names: [p, q]\n")
    found = config("--config", str(file), "--some-count", "6")
    assert (found.name, found.some_count, found.a_switch, found.another_switch) == ("x", 6, True, False)
    assert tuple(found.many_names) == ("p", "q")
    file.write_text("some-count: x\n")
    assert said(capsys, "--config", str(file)).startswith(
        f"{file}: some-count: argument --some-count: invalid"
    )
    file.write_text("some-cuont: 1\nenable-lora: true\nsome-size: 7\n")
    problems = said(capsys, "--config", str(file), "--swap-space", "4").split("\n")
    assert problems[0] == f"{file}: some-cuont: unknown flag --some-cuont. Did you mean --some-count?"
    assert problems[1].startswith("--swap-space is not a flag here")
    assert problems[2].startswith(f"{file}: enable-lora: --enable-lora is vLLM's, and needs LoRA")
    # what the command line takes back is no problem
    file.write_text("enable-lora: true\n")
    assert config("--config", str(file), "--no-enable-lora") == Config()


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("", []),
        ("a_b: 1", [("a-b", ["--a-b=1"])]),
        ("a: true", [("a", ["--a"])]),
        ("a: false", [("a", ["--no-a"])]),
        ("b: true", [("b", ["--b=true"])]),
        ("a: null", [("a", ["--a=None"])]),
        ("a: [1, x, true]", [("a", ["--a=1", "--a=x", "--a=true"])]),
        ("a: [[1]]", [("a", ["--a=[[1]]"])]),
        ("a: [{b: 1}]", [("a", ['--a=[{"b": 1}]'])]),
        ("a: {b_c: 1}", [("a", ['--a={"b_c": 1}'])]),
        ("a_b.c_d: 1\na-b.e: 2", [("a-b", ['--a-b={"c_d": 1, "e": 2}'])]),
        ("a.b.c: 1", [("a", ['--a={"b": {"c": 1}}'])]),
    ],
)
def test_entries_of_a_file(tmp_path: Path, text: str, entries: list[tuple[str, list[str]]]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    assert read_config(str(file), switches=["--a", "--no-a", "--b"]) == entries


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- a", "write one flag a line, such as `max-model-len: 8192`."),
        ("a", "write one flag a line"),
        ("1: 2", "1 is not the name of a flag, such as max-model-len."),
        ("--a: 2", "'--a' is not the name of a flag"),
        ("config: x", "config: a file cannot name another."),
        ("a: 1\nb: 2\na: 3", "line 3: a stands there twice."),
        ("a-b: 1\na_b: 3", "a_b stands there twice."),
        ("a: 1\na.b: 2", "a.b: a is given in one piece already."),
        ("a: {b: {c: 1, c: 2}}", "line 1: c stands there twice."),
        ("a: [", "line 1: expected the node content, but found '<stream end>'."),
        ("? [a]\n: 1\n? [b]\n: 2", "line 1: found unhashable key."),
        ("a: 1\n\tb: 2", "line 2: "),
    ],
)
def test_files_that_are_none_name_the_place(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_config(str(file), switches=[])
    assert str(caught.value).startswith(f"{file}: {why}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^--config {tmp_path}: Is a directory"):
        read_config(str(tmp_path), switches=[])
    (tmp_path / "latin").write_bytes(b"a: \xe9")
    with pytest.raises(ValueError, match=f"^--config {tmp_path}/latin: not UTF-8"):
        read_config(str(tmp_path / "latin"), switches=[])


# ---- values by themselves ----


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("-1", -1), ("1k", 1000), ("1K", 1024), ("1m", 10**6), ("1M", 1 << 20), ("1g", 10**9)),
        *(("1G", 1 << 30), ("1t", 10**12), ("1T", 1 << 40), ("1ki", 1 << 10), ("1Mi", 1 << 20)),
        *(("1gib", 1 << 30), ("1TIB", 1 << 40), ("0.5KiB", 512), ("2 k", 2000), ("-0.001k", -1)),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1b", "'1b' has no unit that is known: k, m, g, t, K, M, G, T, KiB … TiB"),
        ("1kbb", "has no unit"),
        ("1KB", "'1KB' may mean powers of 1000 or of 1024: write 1k or 1KiB"),
        ("3tb", "write 3t or 3TiB"),
        ("1xb", "has no unit"),
        ("1.5M", "'1.5M': M is binary and takes whole numbers; write 1.5m or 1.5MiB"),
        ("1.5", "'1.5' is not a whole number"),
        ("0.3KiB", "'0.3KiB' is not a whole number"),
        ("1k2", "is not a number such as 8192, 8k (8,000), 8K (8,192) or 4GiB"),
        ("+1", "is not a number"),
        (".5k", "is not a number"),
    ],
)
def test_sizes_that_are_none(text: str, why: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_size(text)
    assert why in str(caught.value)


def test_words_beside_values() -> None:
    parse = or_word(int, {"auto": -1, "None": None})
    assert [parse(text) for text in ("5", "auto", "None")] == [5, -1, None]
    assert parse.__name__ == "int"
    with pytest.raises(ValueError, match="invalid literal"):
        parse("none")


def test_lists_and_objects() -> None:
    assert parse_list("a b") == ["a b"]
    assert parse_list(' ["a", "b"]') == ["a", "b"]
    assert parse_list("[]") == []
    assert parse_json_object('{"a": [1]}') == {"a": [1]}
    for text, why in (("[a]", "is not a JSON list: "), ("[1]", "is not a list of texts")):
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            parse_list(text)
    fine = ["*", "null", "http://a", "https://a.b:8", "app+x.y-z://h", ""]
    for origin in fine:
        assert parse_origins(origin) == [origin]
    for origin in ("a", "http://", "http://a/", "http://a,b", "http://a b", "1x://a", "**"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no origin: write scheme://host"):
            parse_origins(origin)


# ---- rows of the table of vLLM's flags ----


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        ("--a-b=1", VllmFlag("--a-b", None, None, (), ("1",), "w")),
        ("--a,-a=x|y", VllmFlag("--a", "-a", None, (), ("x", "y"), "w")),
        ("--a+", VllmFlag("--a", None, "+", (), (), "w")),
        ("--a?", VllmFlag("--a", None, "?", (), (), "w")),
        ("--a=on", VllmFlag("--a", None, None, (True,), (), "w")),
        ("--a=off", VllmFlag("--a", None, None, (False,), (), "w")),
        ("--a=any", VllmFlag("--a", None, None, (True, False), (), "w")),
        ("--a=*", VllmFlag("--a", None, None, (), ("*",), "w")),
    ],
)
def test_rows(row: str, flag: VllmFlag) -> None:
    assert _flag(row, "w") == flag
    assert flag.names == ((flag.name, flag.short) if flag.short else (flag.name,))
    assert flag.is_switch == (row in ("--a=on", "--a=off", "--a=any"))
    assert flag.changes_nothing == (row in ("--a=any", "--a=*"))


@pytest.mark.parametrize("row", ["a", "-a", "--A", "--a==", "--a=1 2"])
def test_what_is_no_row(row: str) -> None:
    if row == "--a==":
        assert _flag(row, "w").values == ("=",)
        return
    with pytest.raises(ValueError, match="is no row of the table"):
        _flag(row, "w")


def test_what_is_served_and_what_is_answered() -> None:
    one, two, none = _flag("--a=1", "x"), _flag("--a=None|auto", "x"), _flag("--a", "x: not implemented")
    assert [one.serves(given) for given in ("1", "1.0", " 1", "2", "", None)] == [
        *(True, True, True, False, False, True)
    ]
    assert [two.serves(given) for given in ("AUTO", "none", "x")] == [True, True, False]
    assert [none.serves(given) for given in ("", "None", "[]", "x", ["x"], [])] == [True] * 3 + [
        False
    ] * 2 + [True]
    switch = _flag("--a=off", "x")
    assert (switch.serves(False), switch.serves(True)) == (True, False)
    assert one.answer("--a", "2") == "--a 2 is vLLM's, and needs x. Drop it, or give it as 1."
    assert two.answer("--a", ["p", "q"]).startswith("--a p q is vLLM's")
    assert two.answer("--a", "x").endswith("give it as None or auto.")
    assert (
        none.answer("--a", None)
        == "--a is vLLM's, and needs x: not implemented. Drop it, or serve with vLLM."
    )
    assert switch.answer("--a", True) == "--a is vLLM's, and needs x. Drop it."
    assert one.answer("--a", "y" * 59).startswith(f"--a {'y' * 59} is")
    assert one.answer("--a", "y" * 60).startswith(f"--a {'y' * 56}... is")
    assert "secret" not in _flag("--hf-token", "x").answer("--hf-token", "secret")


# ---- the commands ----


def test_the_page_is_printed_by_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "penstock.cli.flags_page")
    runpy.run_module("penstock.cli.flags_page", run_name="__main__")
    assert capsys.readouterr().out == render()


def test_the_command_line_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["penstock", "--version"])
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().out == f"penstock {penstock.__version__}\n"
    with pytest.raises(SystemExit):
        main.main(["chat", "--help"])
    text = capsys.readouterr().out
    assert main.COMMANDS["chat"][1:] in text
    for name, summary in main.COMMANDS.items():
        assert main._sentence(summary) == summary[0].upper() + summary[1:] + "."
        assert callable(main.load(name).run)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StartupError("no port.", advice="Choose one."), 2, "penstock chat: no port. Choose one.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_command_that_ends_by_an_error(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("penstock.cli.chat.run", run)
    assert main.main(["chat"]) == status
    assert capsys.readouterr().err == said
