import argparse
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.bench.startup import free_port
from penstock.cli import chat
from tests.bench.fake_server import FakeServer, Reply


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "PENSTOCK_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    """Standard output or input that calls itself a terminal, and may do something on certain text."""

    def __init__(self, text: str = "", on_write: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(text)
        self._on_write = on_write

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        self._on_write(text)
        return written


class Talk:
    """What a run of `penstock chat` left behind."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err


@pytest.fixture
def talk(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Talk]:
    def run(*words: str, stdin: io.StringIO | str = "", stdout: io.StringIO | None = None) -> Talk:
        parser = argparse.ArgumentParser()
        chat.add_arguments(parser)
        where = () if "--url" in words else ("--url", server.url)
        out = stdout if stdout is not None else io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
            patch.setattr("sys.stdout", out)
            status = chat.run(parser.parse_args([*where, *words]))
        return Talk(status, out.getvalue(), capsys.readouterr().err)

    return run


def contents(request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request["messages"]]


@pytest.mark.parametrize("flags", [(), ("--no-stream",)])
def test_one_question(server: FakeServer, talk: Callable[..., Talk], flags: tuple[str, ...]) -> None:
    done = talk(*flags, "What", "is a Pod?")
    assert (done.status, done.out, done.err) == (0, "Hello world!\n", "")
    assert contents(server.requests[0]) == [("user", "What is a Pod?")]
    assert server.requests[0]["model"] == "fake-model"
    assert server.requests[0].get("stream", False) is not bool(flags)


def test_options_reach_the_server(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.models = ["one", "two"]
    server.key = "secret"
    sampling = ("--temperature", "0", "--top-p", "0.5", "--max-tokens", "7")
    assert talk("--model", "two", "--system", "Be brief.", "--api-key", "secret", *sampling, "Hi").status == 0
    request = server.requests[0]
    assert contents(request) == [("system", "Be brief."), ("user", "Hi")]
    assert [request[key] for key in ("model", "temperature", "top_p", "max_tokens")] == ["two", 0, 0.5, 7]


def test_url_and_keys_from_the_environment(
    server: FakeServer, talk: Callable[..., Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "inner"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "outer")
    assert talk("--url", "", "Hi").status == 1
    monkeypatch.setenv("PENSTOCK_API_KEY", "inner")
    assert talk("--url", "", "Hi").status == 0


def test_a_dash_stands_for_all_of_standard_input(server: FakeServer, talk: Callable[..., Talk]) -> None:
    talk("Summarise:", "-", stdin="one\ntwo\n")
    assert contents(server.requests[0]) == [("user", "Summarise: one\ntwo\n")]


def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(
    server: FakeServer, talk: Callable[..., Talk]
) -> None:
    server.script = [Reply(tokens=("Hello",)), Reply(tokens=("A small", " group")), Reply()]
    done = talk(stdin="Hi\n\nWhat is a Pod?\nquit\nnever sent\n")
    assert (done.status, done.out, done.err) == (0, "Hello\nA small group\n", "")
    assert [contents(request) for request in server.requests] == [
        [("user", "Hi")],
        [("user", "Hi"), ("assistant", "Hello"), ("user", "What is a Pod?")],
    ]


@pytest.mark.parametrize("last", ["quit", "exit", "/quit", ""])
def test_ways_to_end(talk: Callable[..., Talk], server: FakeServer, last: str) -> None:
    assert talk(stdin=last).status == 0
    assert server.requests == []


def test_commands_change_the_conversation(server: FakeServer, talk: Callable[..., Talk]) -> None:
    done = talk("--system", "old", stdin="Hi\n/system new\n/clear\nHi again\n/system\nBye\n/help\n/x\n")
    assert [contents(request)[0] for request in server.requests] == [
        ("system", "old"),
        ("system", "new"),
        ("user", "Hi again"),
    ]
    assert contents(server.requests[1]) == [("system", "new"), ("user", "Hi again")]
    assert "/clear" in done.out
    assert done.err == "penstock chat: unknown command /x; /help lists the commands\n"


def test_a_terminal_gets_prompts_and_a_line_of_timings(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.script = [Reply(usage={"device_seconds": 0.0213})]
    done = talk(stdin=Terminal("Hi\n"), stdout=Terminal())
    assert done.status == 0
    assert "fake-model at " in done.out
    assert "Hello world!\n\033[2m3 tokens · first after " in done.out
    assert " tok/s · 0.0213 device seconds\033[0m\n" in done.out


def test_the_line_of_timings() -> None:
    timing = chat.Timing(
        first=0.1, last=1.1, chunks=3, usage={"completion_tokens": 5}, finish_reason="length"
    )
    assert timing.line() == "5 tokens · first after 100 ms · 4.0 tok/s · cut at the token limit"
    assert chat.Timing(first=0.1, last=0.1, chunks=1).line() == "about 1 token · first after 100 ms"
    assert chat.Timing(last=0.5, chunks=1, usage={"completion_tokens": 9}).line() == "9 tokens · after 500 ms"


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    server: FakeServer, talk: Callable[..., Talk]
) -> None:
    server.script = [Reply(tokens=("a\033[31mb\x07\n\tc",))]
    assert "a[31mb\n\tc" in talk(stdin=Terminal("Hi\n"), stdout=Terminal()).out
    assert talk("Hi").out == "a\033[31mb\x07\n\tc\n"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.script = [Reply(tokens=("Well", ", then", " more"), hold_at=2), Reply(tokens=("Yes",))]

    def interrupt(text: str) -> None:
        if text == ", then":
            raise KeyboardInterrupt

    done = talk(stdin=Terminal("Tell me\nGo on\n"), stdout=Terminal(on_write=interrupt))
    assert done.status == 0
    assert "Well, then\033[2m [stopped]" in done.out
    assert "Yes" in done.out
    assert contents(server.requests[1]) == [
        ("user", "Tell me"),
        ("assistant", "Well, then"),
        ("user", "Go on"),
    ]


def test_ctrl_c_in_a_one_shot_is_its_status(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.script = [Reply(hold_at=1)]

    def interrupt(text: str) -> None:
        if text == "Hello":
            raise KeyboardInterrupt

    assert talk("Hi", stdout=Terminal(on_write=interrupt)).status == 130


def test_ctrl_c_at_the_prompt_says_how_to_end(server: FakeServer, talk: Callable[..., Talk]) -> None:
    class Keys(Terminal):
        """Ctrl-C, then the end of input."""

        presses = 0

        def readline(self, size: int | None = -1, /) -> str:
            self.presses += 1
            if self.presses == 1:
                raise KeyboardInterrupt
            return ""

    done = talk(stdin=Keys(), stdout=Terminal())
    assert done.status == 0
    assert "(Ctrl-D or /quit ends)" in done.out


@pytest.mark.parametrize(
    ("reply", "out", "complaint"),
    [
        (
            Reply(error={"message": "engine died"}),
            "Hello world!\n",
            "the server reported an error: engine died",
        ),
        (Reply(done=False), "Hello world!\n", "the server cut the answer short (no [DONE])"),
        (Reply(cut=True), "Hello world!\n", "broke: "),
        (Reply(raw="{half"), "Hello world!\n", "sent something that is not JSON"),
        (Reply(status=400, body={"error": {"message": "too long"}}), "", "HTTP 400 from "),
        (Reply(body={"error": "odd"}), "", "the server reported an error: odd"),
    ],
)
def test_an_error_is_one_line_and_the_chat_goes_on_without_that_turn(
    server: FakeServer, talk: Callable[..., Talk], reply: Reply, out: str, complaint: str
) -> None:
    server.script = [reply, Reply(tokens=("Fine",))]
    done = talk(stdin="Hi\nAnd now?\n")
    assert (done.status, done.out) == (1, out + "Fine\n")
    assert done.err.startswith("penstock chat: ")
    assert complaint in done.err
    assert done.err.count("\n") == 1
    assert contents(server.requests[1]) == [("user", "And now?")]


def test_a_wrong_key_says_where_a_key_is_given(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.key = "secret"
    done = talk("Hi")
    assert done.status == 1
    assert "HTTP 401" in done.err
    assert "Invalid key; pass --api-key or set PENSTOCK_API_KEY" in done.err


def test_an_unknown_model_lists_the_known_ones(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.models = ["one", "two"]
    done = talk("--model", "nobody", "Hi")
    assert done.status == 1
    assert "`nobody` does not exist; it has: one, two (--model)" in done.err


@pytest.mark.parametrize("flags", [(), ("--model", "m")])
def test_no_server(talk: Callable[..., Talk], flags: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    done = talk("--url", url, *flags, "Hi")
    assert done.status == 1
    assert f"no answer from {url}: Connection refused; start a server" in done.err
    assert done.err.count("\n") == 1


def test_a_server_without_models(server: FakeServer, talk: Callable[..., Talk]) -> None:
    server.models = []
    assert "lists no model; name one with --model" in talk("Hi").err


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"),
        ("https://h/openai/v1", "https://h/openai/v1"),
    ],
)
def test_the_root_of_the_api(url: str, root: str) -> None:
    assert chat.api_root(url) == root


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://"])
def test_a_url_must_be_one(talk: Callable[..., Talk], url: str) -> None:
    done = talk("--url", url, "Hi")
    assert done.status == 1
    assert f"the URL is '{url}'; write it as http://localhost:8000/v1" in done.err
