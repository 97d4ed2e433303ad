"""`penstock chat`, piece by piece: its flags, what it sends, what it says when something is wrong."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from penstock.cli import chat
from penstock.cli.chat import Chat, ChatError, Server, Timing, _as_chunk, api_root
from penstock.http.chunks import Chunk


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penstock chat")
    chat.add_arguments(parser)
    return parser.parse_args(list(words))


# ---- flags ----


def test_without_flags_everything_is_the_servers() -> None:
    assert vars(parsed()) == {
        "question": [],
        "url": None,
        "model": None,
        "system": None,
        "api_key": None,
        "temperature": None,
        "top_p": None,
        "max_tokens": None,
        "no_stream": False,
    }


def test_help_says_what_each_flag_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    for flag, value in (
        ("--url", "URL"),
        ("--model", "MODEL"),
        ("--system", "TEXT"),
        ("--api-key", "KEY"),
        ("--temperature", "T"),
        ("--top-p", "P"),
        ("--max-tokens", "N"),
    ):
        assert re.search(rf"^  {flag} {value} ", text, re.MULTILINE), flag
    assert "http://localhost:8000/v1" in text
    assert text.count("(default: the server's)") == 3


# ---- servers ----


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h", "http://h/v1"),
        ("http://h/", "http://h/v1"),
        ("http://h//", "http://h/v1"),
        ("http://h/x/", "http://h/x"),
        ("http://h/X", "http://h/X"),
        ("https://h:1/v1", "https://h:1/v1"),
    ],
)
def test_the_root_is_v1_where_no_path_is_given(url: str, root: str) -> None:
    assert api_root(url) == root


@pytest.mark.parametrize("url", ["", "h", "//h", "ws://h", "https://"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ChatError) as caught:
        api_root(url)
    assert str(caught.value) == f"the URL is {url!r}; write it as http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("root", "proxied"),
    [
        ("http://localhost:1/v1", False),
        ("http://127.0.0.1/v1", False),
        ("http://[::1]:8/v1", False),
        ("http://10.0.0.1/v1", True),
        ("http://localhost.example/v1", True),
    ],
)
def test_a_proxy_is_for_the_world_outside(root: str, proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    opener = Server(root, None)._opener
    schemes = {name for handler in opener.handlers for name in vars(handler) if name == "http_open"}
    assert bool(schemes) == proxied


def test_a_key_is_sent_as_a_bearer_token() -> None:
    assert Server("http://h/v1", None)._headers == {"Content-Type": "application/json"}
    assert Server("http://h/v1", "k")._headers == {
        "Content-Type": "application/json",
        "Authorization": "Bearer k",
    }


@pytest.mark.parametrize(
    ("status", "body", "ending"),
    [
        (401, {}, "said so; pass --api-key or set PENSTOCK_API_KEY or OPENAI_API_KEY"),
        (403, None, "said so; pass --api-key or set PENSTOCK_API_KEY or OPENAI_API_KEY"),
        (404, {}, "said so; it has: a, b (--model)"),
        (404, None, "said so"),
        (500, {}, "said so"),
    ],
)
def test_errors_come_with_what_to_do(
    status: int, body: Any, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server("http://h/v1", None)
    monkeypatch.setattr(server, "models", lambda: ["a", "b"])
    answer = b'{"error": {"message": "said so"}}'
    assert server._explain(status, answer, body) == f"HTTP {status} from http://h/v1: {ending}"
    monkeypatch.setattr(server, "models", list)
    if status == 404 and body is not None:
        assert server._explain(status, answer, body).endswith("said so; it has: no models (--model)")
        last = b'{"error": {"message": "There is no X."}}'
        assert server._explain(status, last, body).endswith("There is no X; it has: no models (--model)")

    def none() -> list[str]:
        raise ChatError("gone")

    monkeypatch.setattr(server, "models", none)
    if status == 404:
        assert server._explain(status, answer, body).endswith("said so")


def test_a_whole_answer_is_read_as_a_chunk() -> None:
    answer = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"x": 1}}
    assert _as_chunk(answer) == {
        "choices": [
            {"message": {"content": "a"}, "finish_reason": "stop", "delta": {"content": "a"}},
        ],
        "usage": {"x": 1},
    }
    for other in ([1], {"choices": None}, {"error": "x"}, "text"):
        assert _as_chunk(other) == other


# ---- conversations ----


class Scripted:
    """A server that answers with these chunks, and remembers what it was asked."""

    root = "http://h/v1"

    def __init__(self, *chunks: Chunk) -> None:
        self.chunks = chunks
        self.asked: list[dict[str, Any]] = []
        self.closed = 0

    def chat(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        try:
            yield from self.chunks
        finally:
            self.closed += 1


def talk(server: Scripted, *, stream: bool = True, system: str | None = None, **body: Any) -> Chat:
    return Chat(server, "m", body, system, stream=stream)  # type: ignore[arg-type]


HI = Chunk(text="Hi", is_token=True, has_choice=True)
END = Chunk(finish_reason="length", usage={"completion_tokens": 3}, has_choice=True)


def test_a_turn_is_kept_with_its_answer() -> None:
    server = Scripted(HI, Chunk(reasoning="hm", is_token=True), END)
    conversation = talk(server, system="Be brief.", temperature=0)
    assert [chunk.text for chunk in conversation.ask("one")] == ["Hi", "", ""]
    list(conversation.ask("two"))
    system, one, two = (
        {"role": role, "content": content}
        for role, content in (("system", "Be brief."), ("user", "one"), ("user", "two"))
    )
    said = {"role": "assistant", "content": "Hi"}
    assert [asked["messages"] for asked in server.asked] == [[system, one], [system, one, said, two]]
    assert conversation.turns == [one, said, two, said]
    assert {key: server.asked[0][key] for key in ("model", "temperature", "stream", "stream_options")} == {
        "model": "m",
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing = conversation.timing
    assert (timing.chunks, timing.usage, timing.finish_reason) == (2, {"completion_tokens": 3}, "length")
    assert timing.first is not None
    assert 0 < timing.first <= timing.last
    assert server.closed == 2


def test_without_a_stream_there_is_no_first_token() -> None:
    server = Scripted(HI)
    conversation = talk(server, stream=False)
    list(conversation.ask("one"))
    assert set(server.asked[0]) == {"model", "messages"}
    assert conversation.timing.first is None
    assert conversation.timing.last > 0


def test_what_fails_or_says_nothing_is_forgotten_and_what_is_stopped_is_kept() -> None:
    failing = talk(Scripted(HI, Chunk(error="died")))
    with pytest.raises(ChatError, match="the server reported an error: died"):
        list(failing.ask("one"))
    assert failing.turns == []
    silent = talk(Scripted(END))
    list(silent.ask("one"))
    assert silent.turns == []
    stopped = talk(server := Scripted(HI, HI))
    answer = stopped.ask("one")
    next(answer)
    answer.close()
    assert [turn["content"] for turn in stopped.turns] == ["one", "Hi"]
    assert server.closed == 1


def test_a_stop_in_a_pipe_ends_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Scripted):
        def chat(self, body: dict[str, Any]) -> Any:
            yield HI
            raise KeyboardInterrupt

    assert chat._answer(talk(Stopped()), "one") == 130
    assert capsys.readouterr().out == "Hi\n"


@pytest.mark.parametrize(("terminal", "prompt", "status"), [(True, "> ", 0), (False, "", 1)])
def test_a_prompt_is_for_a_terminal_and_a_status_for_a_script(
    terminal: bool, prompt: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    prompts: list[str] = []
    lines = iter(["one", ""])

    def typed(text: str = "") -> str:
        prompts.append(text)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(chat.sys.stdin, "isatty", lambda: terminal)
    monkeypatch.setattr(chat.sys.stdout, "isatty", lambda: terminal)
    assert chat._converse(talk(Scripted(Chunk(error="died")))) == status
    assert prompts == [prompt] * 3
    shown = capsys.readouterr()
    assert ("m at http://h/v1; /help lists the commands" in shown.out) == terminal
    assert shown.err == "penstock chat: the server reported an error: died\n"


@pytest.mark.parametrize(
    ("timing", "line"),
    [
        (Timing(), "about 0 tokens"),
        (Timing(chunks=1), "about 1 token"),
        (Timing(usage={"completion_tokens": 1}, first=0.0015, last=1.0), "1 token · first after 2 ms"),
        (Timing(usage={"completion_tokens": 0}, chunks=4), "0 tokens"),
        (
            Timing(chunks=2, first=0.5, last=1.0),
            "about 2 tokens · first after 500 ms · 2.0 tok/s",
        ),
        (Timing(chunks=5, first=1.0, last=1.0), "about 5 tokens · first after 1000 ms"),
        (Timing(chunks=5, last=1.25), "about 5 tokens · after 1250 ms"),
        (Timing(usage={"device_seconds": 0.0}), "about 0 tokens · 0 device seconds"),
        (Timing(usage={"device_seconds": 0.12345}), "about 0 tokens · 0.123 device seconds"),
        (Timing(finish_reason="length"), "about 0 tokens · cut at the token limit"),
        (Timing(finish_reason="stop"), "about 0 tokens"),
    ],
)
def test_the_line_of_timings(timing: Timing, line: str) -> None:
    assert timing.line() == line


@pytest.mark.parametrize("code", [*range(32), 127, 128, 159, 160, 233])
def test_what_could_move_the_cursor_is_left_out(code: int) -> None:
    character = chr(code)
    kept = character in "\n\t" or code >= 160
    assert f"a{character}b".translate(chat._CONTROLS) == (f"a{character}b" if kept else "ab")
