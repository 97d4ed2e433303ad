"""One streamed request to an OpenAI-compatible server, with the time of every chunk.

Knows the wire, not the load: when to send is `load`'s matter, what the times mean is `report`'s.
A request never raises for what the server did; it ends as a record that says what happened.

    intended    sent        chunk_times[0]   …   chunk_times[-1]   finished
       │ client  │   TTFT        │      ITL · ITL · ITL  │            │
       └─ queue ─┴───────────────┴───────────────────────┴────────────┘
                 └──────────────────── E2E latency ───────────────────┘
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from penstock.bench.errors import BenchError
from penstock.bench.load import Clock
from penstock.bench.prompts import Prompt
from penstock.http.chunks import describe_error, read_chunk
from penstock.http.sse import DONE, EventDecoder


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what they all have in common."""

    base_url: str
    """Scheme, host and port, without the endpoint's path."""
    endpoint: str
    """`/v1/completions` or `/v1/chat/completions`."""
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields for every request body: sampling parameters and the like."""
    timeout: float | None = None
    """Seconds until a request is given up; None waits for ever."""

    @property
    def chat(self) -> bool:
        """Whether the endpoint takes messages instead of a prompt."""
        return self.endpoint.endswith("/chat/completions")

    def encode(self, prompt: Prompt) -> bytes:
        """The JSON body of the request for `prompt`; fields of `body` win over the defaults."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(
            {"model": self.model, **prompt.body(chat=self.chat), **stream, **self.body}
        )


class Outcome(Enum):
    """How a request ended."""

    UNFINISHED = "unfinished"  # the run was over before the request was
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds of the run's clock."""

    index: int
    intended: float
    """When the request was due."""
    sent: float | None = None
    """When it left, after any wait for a free place."""
    chunk_times: list[float] = field(default_factory=list)
    """Arrival of each chunk that carries generated tokens; one chunk may carry several."""
    finished: float | None = None
    """Arrival of the last chunk with a choice, or the moment of failure."""
    outcome: Outcome = Outcome.UNFINISHED
    cause: str | None = None
    """Short and the same for all failures of a kind, to group by: `HTTP 503`, `timeout`, …"""
    message: str | None = None
    """What the server or the transport said about this failure."""
    prompt_tokens: int | None = None
    output_tokens: int = 0
    tokens_from_usage: bool = False
    """False when the server sent no usage and `output_tokens` counts chunks."""
    cached_tokens: int | None = None
    """Prompt tokens served from the prefix cache, where the server says so."""
    device_seconds: float | None = None
    """Device time that the request used, where the server says so."""
    finish_reason: str | None = None

    def fail(self, cause: str, message: str, now: float) -> None:
        """End the record as failed."""
        self.outcome, self.cause, self.message, self.finished = Outcome.FAILED, cause, message, now

    def read_usage(self, usage: Mapping[str, Any]) -> None:
        """Take over what the server counted."""
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        if usage.get("completion_tokens") is not None:
            self.output_tokens, self.tokens_from_usage = usage["completion_tokens"], True
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = details.get("cached_tokens", self.cached_tokens)
        self.device_seconds = usage.get("device_seconds", self.device_seconds)


def open_session() -> aiohttp.ClientSession:
    """A session without limits of its own: the load decides what is in flight and for how long."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=None)
    )


async def send_request(
    session: aiohttp.ClientSession,
    target: Target,
    prompt: Prompt,
    record: RequestRecord,
    clock: Clock = time.perf_counter,
) -> None:
    """Send one request and fill its record; a cancelled request stays unfinished."""
    body = target.encode(prompt)
    record.prompt_tokens = prompt.input_tokens
    record.sent = clock()
    try:
        async with asyncio.timeout(target.timeout):
            await _stream(session, target, body, record, clock)
    except TimeoutError:
        record.fail("timeout", f"no complete answer within {target.timeout} s (--request-timeout)", clock())
    except aiohttp.ClientConnectorError as error:
        record.fail("cannot connect", reason(error), clock())
    except (aiohttp.ClientError, OSError) as error:
        where = "mid-stream" if record.chunk_times else "before the first token"
        record.fail(f"connection lost {where}", f"{type(error).__name__}: {error}", clock())


async def _stream(
    session: aiohttp.ClientSession, target: Target, body: bytes, record: RequestRecord, clock: Clock
) -> None:
    headers = {"Content-Type": "application/json", **target.headers}
    async with session.post(target.base_url + target.endpoint, data=body, headers=headers) as response:
        if response.status != 200:
            record.fail(f"HTTP {response.status}", describe_error(await response.read()), clock())
            return
        if response.content_type == "application/json":
            text = describe_error(await response.read())
            record.fail("not a stream", f"the server answered JSON to a streaming request: {text}", clock())
            return
        decoder = EventDecoder()
        done = False
        last_choice: float | None = None
        # Read to the end even after [DONE]: only then can the connection carry another request.
        async for piece in response.content.iter_any():
            now = clock()
            for event in decoder.feed(piece):
                if event == DONE:
                    done = True
                    continue
                try:
                    chunk = read_chunk(msgspec.json.decode(event))
                except msgspec.DecodeError as error:
                    record.fail("invalid JSON in stream", f"{error}: {event[:200]!r}", now)
                    return
                if chunk.error is not None:
                    record.fail("error in stream", chunk.error, now)
                    return
                if chunk.is_token:
                    record.chunk_times.append(now)
                    if not record.tokens_from_usage:
                        record.output_tokens += 1
                if chunk.has_choice:
                    last_choice = now
                record.finish_reason = chunk.finish_reason or record.finish_reason
                if chunk.usage is not None:
                    record.read_usage(chunk.usage)
    now = clock()
    if not done:
        record.fail(
            "stream cut", f"the stream ended after {len(record.chunk_times)} chunks without {DONE}", now
        )
    elif last_choice is None:
        record.fail("empty stream", f"{DONE} came without any choice", now)
    else:
        # A model may end at once: the chunk that says so is then all there is to time.
        record.chunk_times = record.chunk_times or [last_choice]
        record.outcome, record.finished = Outcome.COMPLETED, last_choice


def split_base_url(base_url: str) -> str:
    """Normalise `--base-url`: with or without a trailing slash or `/v1`; http and https only."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise BenchError(f"--base-url is {base_url!r}; write it as http://HOST:PORT")
    return base_url.rstrip("/").removesuffix("/v1")


async def get_json(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    """GET `url`: its status, and its JSON or, failing that, its text; BenchError if nobody answers."""
    return await _ask(session, "GET", url, headers, None)


async def post_json(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], body: object
) -> tuple[int, Any]:
    """POST `body` as JSON to `url`; answers as `get_json` does."""
    return await _ask(session, "POST", url, headers, body)


async def _ask(
    session: aiohttp.ClientSession, method: str, url: str, headers: Mapping[str, str], body: object
) -> tuple[int, Any]:
    try:
        timeout = aiohttp.ClientTimeout(total=30)
        async with session.request(method, url, headers=headers, json=body, timeout=timeout) as response:
            text = await response.text(errors="replace")
            try:
                return response.status, msgspec.json.decode(text)
            except msgspec.DecodeError:
                return response.status, text
    except (aiohttp.ClientError, OSError) as error:
        raise BenchError(
            f"no server at {url}: {reason(error)}; start one (penstock serve MODEL) or correct --base-url"
        ) from error


def reason(error: Exception) -> str:
    """The operating system's words where it has some; aiohttp wraps them in its own."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number and number > 0 else str(error) or type(error).__name__


async def find_model(session: aiohttp.ClientSession, base_url: str, headers: Mapping[str, str]) -> str:
    """The first model that the server lists."""
    url = f"{base_url}/v1/models"
    status, answer = await get_json(session, url, headers)
    if status in (401, 403):
        raise BenchError(f"{url} answered HTTP {status}; pass --api-key or set OPENAI_API_KEY")
    if status != 200:
        raise BenchError(
            f"{url} answered HTTP {status}: {describe_error(answer)}; name the model with --model"
        )
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise BenchError(f"{url} lists no model; name one with --model") from None
