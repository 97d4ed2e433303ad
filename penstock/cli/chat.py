"""`penstock chat`: talk to any OpenAI-compatible server from a terminal or a pipe.

In a terminal: prompts, streaming, colours, a line of timings after each answer. In a pipe: each input
line is a turn, and only the answers are printed. Speaks plain HTTP with the standard library, in one
thread, so that Ctrl-C during an answer is an ordinary exception at the place where it is read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, TextIO
from urllib.parse import urlsplit

from penstock.http.chunks import Chunk, describe_error, read_chunk
from penstock.http.sse import DONE, EventDecoder

DEFAULT_URL = "http://localhost:8000/v1"
HELP = """\
/clear          forget the conversation (the system prompt stays)
/system TEXT    set the system prompt; without TEXT, remove it
/help           this list
/quit           end (also: quit, exit, Ctrl-D); Ctrl-C stops a running answer"""

# Control characters from a model could move the cursor or worse; newline and tab are harmless.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `penstock chat`."""
    parser.add_argument(
        "question", nargs="*", help='ask once and end; "-" stands for all of standard input, as one text'
    )
    parser.add_argument("--url", help=f"API root (default: OPENAI_BASE_URL or {DEFAULT_URL})")
    parser.add_argument("--model", help="model name (default: the first that the server lists)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--api-key", metavar="KEY", help="bearer key (default: PENSTOCK_API_KEY or OPENAI_API_KEY)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="(default: the server's)")
    parser.add_argument("--top-p", type=float, metavar="P", help="(default: the server's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: the server's)")
    parser.add_argument("--no-stream", action="store_true", help="print each answer when it is complete")


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends; 1 if a question of a one-shot or piped chat was not answered."""
    url = args.url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
    key = args.api_key or os.environ.get("PENSTOCK_API_KEY") or os.environ.get("OPENAI_API_KEY")
    options = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
    body = {name: value for name, value in options.items() if value is not None}
    try:
        server = Server(api_root(url), key)
        chat = Chat(server, args.model or server.first_model(), body, args.system, stream=not args.no_stream)
    except ChatError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    if args.question:
        text = " ".join(sys.stdin.read() if word == "-" else word for word in args.question)
        return _answer(chat, text)
    return _converse(chat)


class ChatError(Exception):
    """What went wrong with a request and what to do about it, in one line."""


def api_root(url: str) -> str:
    """`http://host:8000`, with or without a trailing slash, is taken to mean `http://host:8000/v1`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ChatError(f"the URL is {url!r}; write it as {DEFAULT_URL}")
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"


class Server:
    """The HTTP side: one OpenAI API root and a key."""

    def __init__(self, root: str, key: str | None, timeout: float = 600.0) -> None:
        self.root = root
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        self._timeout = timeout
        # A proxy set for the outside world cannot reach this machine's own loopback interface.
        local = urlsplit(root).hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(*proxies)

    def models(self) -> list[str]:
        """The names that the server lists."""
        try:
            with self._open("/models", None) as response:
                return [str(model["id"]) for model in json.load(response)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(
                f"{self.root}/models did not answer with a list of models; check --url"
            ) from error

    def first_model(self) -> str:
        """The model to use when none is named."""
        models = self.models()
        if not models:
            raise ChatError(f"{self.root} lists no model; name one with --model")
        return models[0]

    def chat(self, body: dict[str, Any]) -> Generator[Chunk, None, None]:
        """POST a chat completion and yield its chunks; a plain JSON answer is one chunk."""
        decoder = EventDecoder()
        done = False
        try:
            with self._open("/chat/completions", body) as response:
                if response.headers.get_content_type() != "text/event-stream":
                    yield read_chunk(_as_chunk(json.load(response)))
                    return
                while piece := response.read1():
                    for event in decoder.feed(piece):
                        done = done or event == DONE
                        if event != DONE:
                            yield read_chunk(json.loads(event))
        except ValueError as error:
            raise ChatError(f"{self.root} sent something that is not JSON: {error}") from error
        except (OSError, HTTPException) as error:
            raise ChatError(f"the connection to {self.root} broke: {error}") from error
        if not done:
            raise ChatError("the server cut the answer short (no [DONE]); look at its log")

    def _open(self, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, self._headers)
        try:
            response: HTTPResponse = self._opener.open(request, timeout=self._timeout)
            return response
        except urllib.error.HTTPError as error:
            with error:
                message = self._explain(error.code, error.read(), body)
            raise ChatError(message) from None
        except (OSError, HTTPException) as error:
            reason: Any = getattr(error, "reason", error)
            reason = getattr(reason, "strerror", None) or reason
            advice = "start a server (penstock serve MODEL) or correct --url"
            raise ChatError(f"no answer from {self.root}: {reason}; {advice}") from None

    def _explain(self, status: int, answer: bytes, body: dict[str, Any] | None) -> str:
        message = f"HTTP {status} from {self.root}: {describe_error(answer)}"
        if status in (401, 403):
            return f"{message}; pass --api-key or set PENSTOCK_API_KEY or OPENAI_API_KEY"
        if status == 404 and body is not None:
            with contextlib.suppress(ChatError):
                return f"{message.rstrip('.')}; it has: {', '.join(self.models()) or 'no models'} (--model)"
        return message


def _as_chunk(answer: Any) -> Any:
    """A whole chat completion in the shape of a stream's chunk."""
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        return answer
    return {**answer, "choices": [{**choice, "delta": choice.get("message")} for choice in answer["choices"]]}


@dataclass
class Timing:
    """When the pieces of one answer came, in seconds from the sending of its question."""

    first: float | None = None
    last: float = 0.0
    chunks: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None

    def line(self) -> str:
        """`12 tokens · first after 45 ms · 33.1 tok/s · 0.021 device seconds`."""
        counted = self.usage.get("completion_tokens")
        tokens = self.chunks if counted is None else int(counted)
        parts = [f"{'about ' if counted is None else ''}{tokens} token{'' if tokens == 1 else 's'}"]
        if self.first is not None:
            parts.append(f"first after {self.first * 1000:.0f} ms")
            if tokens > 1 and self.last > self.first:
                parts.append(f"{(tokens - 1) / (self.last - self.first):.1f} tok/s")
        elif self.last:
            parts.append(f"after {self.last * 1000:.0f} ms")
        if (seconds := self.usage.get("device_seconds")) is not None:
            parts.append(f"{seconds:.3g} device seconds")
        if self.finish_reason == "length":
            parts.append("cut at the token limit")
        return " · ".join(parts)


class Chat:
    """A conversation: its messages, and the next answer."""

    def __init__(
        self,
        server: Server,
        model: str,
        body: dict[str, Any],
        system: str | None = None,
        *,
        stream: bool = True,
    ) -> None:
        self.server = server
        self.model = model
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.timing = Timing()
        self._body = body
        self._stream = stream

    def ask(self, text: str) -> Generator[Chunk, None, None]:
        """Send `text` after the conversation so far and yield the answer's chunks.

        The turn is kept when the answer ends or is interrupted; after an error it is forgotten, so
        that the conversation stays one of questions and answers.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *self.turns, question],
            **self._body,
        }
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        self.timing = timing = Timing()
        answer: list[str] = []
        sent = time.perf_counter()
        try:
            with contextlib.closing(self.server.chat(body)) as chunks:
                for chunk in chunks:
                    if chunk.error is not None:
                        raise ChatError(f"the server reported an error: {chunk.error}")
                    if chunk.is_token:
                        timing.last = time.perf_counter() - sent
                        timing.first = timing.last if self._stream and timing.first is None else timing.first
                        timing.chunks += 1
                    timing.usage = dict(chunk.usage or timing.usage)
                    timing.finish_reason = chunk.finish_reason or timing.finish_reason
                    answer.append(chunk.text)
                    yield chunk
        except ChatError:
            answer.clear()
            raise
        finally:
            if any(answer):
                self.turns += [question, {"role": "assistant", "content": "".join(answer)}]


def _answer(chat: Chat, text: str) -> int:
    """Print the answer to `text` as it comes: 0 if complete, 1 after an error, 130 if the user stopped it."""
    fancy = sys.stdout.isatty()
    answer = chat.ask(text)
    try:
        with contextlib.closing(answer):
            for chunk in answer:
                if fancy and chunk.reasoning:
                    _write(sys.stdout, f"\033[2m{chunk.reasoning.translate(_CONTROLS)}\033[0m")
                _write(sys.stdout, chunk.text.translate(_CONTROLS) if fancy else chunk.text)
    except ChatError as error:
        if chat.timing.chunks:
            _write(sys.stdout, "\n")
        _complain(error)
        return 1
    except KeyboardInterrupt:
        _write(sys.stdout, "\033[2m [stopped]\033[0m\n" if fancy else "\n")
        return 130
    _write(sys.stdout, f"\n\033[2m{chat.timing.line()}\033[0m\n" if fancy else "\n")
    return 0


def _converse(chat: Chat) -> int:
    """Read turns until the input ends; the status for `run`."""
    fancy = sys.stdin.isatty() and sys.stdout.isatty()
    if fancy:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        print(f"{chat.model} at {chat.server.root}; /help lists the commands")
    status = 0
    while True:
        try:
            line = input("> " if fancy else "").strip()
        except EOFError:
            if fancy:
                print()
            break
        except KeyboardInterrupt:
            if not fancy:
                return 130
            print("\n(Ctrl-D or /quit ends)")
            continue
        if line in ("/quit", "quit", "exit"):
            break
        if line.startswith("/"):
            _command(chat, line)
        elif line:
            status = max(status, _answer(chat, line))
    # In a terminal the user has seen every error; a script has only the status.
    return 0 if fancy else status


def _command(chat: Chat, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/clear":
        chat.turns.clear()
    elif name == "/system":
        chat.system = rest.strip() or None
    elif name == "/help":
        print(HELP)
    else:
        _complain(f"unknown command {name}; /help lists the commands")


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


def _complain(what: object) -> None:
    sys.stdout.flush()
    print(f"penstock chat: {what}", file=sys.stderr)
