"""Requests to one server: from the cache, else asked, else asked again after a while.

    what comes back                               what becomes of it
    200                                           an answer, kept
    400, 413, 422 and other 4xx                   a Refusal: a user would have got it, too
    408, 500 and other 5xx, time over,            tried again, then a Refusal; several in a row: ServerDown
    an answer that is none
    429, 502, 503, 504, no connection, or a       tried again, then ServerDown
    broken one
    401, 403, 404, 405                            StartupError: it is the command that is wrong

Nothing that ends in ServerDown is counted, and the same command goes on later.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from penstock.bench.client import reason
from penstock.core.errors import StartupError, brief
from penstock.http.chunks import describe_error
from penstock.http.reading import read_at_most

from .answer import Answer, Refusal, read_answer
from .cache import Cache, key

MOST_ANSWER = 32 << 20
"""Bytes of an answer."""
_DOWN = frozenset({429, 502, 503, 504})
_WRONG = frozenset({401, 403, 404, 405})
_IN_A_ROW = 5
"""Refusals after which a server counts as down, or as one that refuses everything."""
_LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever Retry-After says."""


class ServerDown(Exception):
    """A server does not answer any more; the message says how it went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How a server is asked. Seconds."""

    concurrency: int = 8
    timeout: float = 600.0
    retries: int = 7
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Asker:
    """One server and model. Belongs to one event loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        name: str,
        root: str,
        model: str,
        headers: Mapping[str, str],
        cache: Cache,
        patience: Patience,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            name: as messages call it.
            say: is told when it has to wait for a server that does not answer.
        """
        self.name = name
        self._say = say
        self._waits = False
        self.asked = self.cached = 0
        """Answers that were given now, and before."""
        self._session = session
        self._root = root
        self._model = model
        self._headers = {"Content-Type": "application/json", **headers}
        self._cache = cache
        self._patience = patience
        self._places = asyncio.Semaphore(patience.concurrency)
        self._under_way: dict[str, asyncio.Future[Answer | Refusal]] = {}
        self._refused = 0
        self._answered = False
        self._random = random.Random(0)

    def key(self, path: str, body: Mapping[str, Any]) -> str:
        """The name of its answer to this."""
        return key(path, {**body, "model": self._model})

    async def ask(self, path: str, body: Mapping[str, Any], *, again: bool = False) -> Answer | Refusal:
        """The answer to a request; the same request is under way once at a time.

        Args:
            path: behind the API's root.
            again: whether an answer that is kept does not count.

        Raises ServerDown, StartupError.
        """
        name = self.key(path, body)
        if (other := self._under_way.get(name)) is not None:
            return await asyncio.shield(other)
        if not again and (kept := self._cache.get(name)) is not None:
            self.cached += 1
            self._answered = True
            return kept
        future: asyncio.Future[Answer | Refusal] = asyncio.get_running_loop().create_future()
        self._under_way[name] = future
        try:
            async with self._places:
                answer = await self._try(
                    path, msgspec.json.encode({**body, "model": self._model, "stream": False})
                )
            if isinstance(answer, Answer):
                self._cache.put(name, answer)
                self.asked += 1
                self._waits = False
            self._judge(answer)
            future.set_result(answer)
            return answer
        except BaseException as error:
            if not future.done():
                future.set_exception(error if isinstance(error, Exception) else ServerDown("interrupted"))
                future.exception()  # it is raised here already
            raise
        finally:
            del self._under_way[name]

    def _judge(self, answer: Answer | Refusal) -> None:
        if isinstance(answer, Answer):
            self._refused, self._answered = 0, True
            return
        self._refused += 1
        if self._refused < _IN_A_ROW:
            return
        said = f"{self._refused} requests in a row failed, the last with {_shown(answer)}"
        if answer.status == 0 or answer.status >= 500 or answer.status == 200:
            raise ServerDown(said)
        if not self._answered:
            raise StartupError(
                f"{self.name}: {said}.", advice="It refuses what the set, or --body, asks for."
            )

    async def _try(self, path: str, body: bytes) -> Answer | Refusal:
        """The answer, tried several times."""
        waited = 0
        while True:
            refusal, after = await self._once(path, body)
            if isinstance(refusal, Answer) or after is None:
                return refusal
            down = refusal.status in _DOWN or refusal.status < 0
            if waited >= self._patience.retries:
                if down:
                    times = "once" if waited == 0 else f"{waited + 1} times"
                    raise ServerDown(f"asked {times}, it said at last: {_shown(refusal)}")
                return refusal
            pause = min(0.5 * 2**waited, 30.0) * (0.5 + self._random.random() / 2)
            waited += 1
            if down and not self._waits:  # once, until it answers again
                self._waits = True
                self._say(f"{self.name} does not answer ({_shown(refusal)}); trying again for a while")
            await self._patience.sleep(min(max(pause, after), _LONGEST_WAIT))

    async def _once(self, path: str, body: bytes) -> tuple[Answer | Refusal, float | None]:
        """(what came, seconds after which it is worth another try, or None)

        The status of a refusal is -1 where there was no connection, 0 where time was over.
        """
        asked_at, sent = time.time(), time.perf_counter_ns()
        try:
            async with (
                asyncio.timeout(self._patience.timeout),
                self._session.post(
                    self._root + path, data=body, headers=self._headers, allow_redirects=False
                ) as response,
            ):
                content = await read_body(response, MOST_ANSWER)
        except TimeoutError:
            return Refusal(
                status=0, message=f"no answer within {self._patience.timeout:g} s (--timeout)"
            ), 0.0
        except (aiohttp.ClientError, OSError) as error:
            return Refusal(status=-1, message=reason(error)), 0.0
        latency = time.perf_counter_ns() - sent
        status = response.status
        if status == 200:
            try:
                if content is None:
                    raise ValueError(f"the answer has more than {MOST_ANSWER >> 20} MiB")
                return read_answer(
                    msgspec.json.decode(content),
                    latency=latency,
                    asked_at=asked_at,
                    concurrency=self._patience.concurrency,
                ), None
            except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
                return Refusal(
                    status=200, message=f"no answer that can be read: {brief(str(error), 200)}"
                ), 0.0
        message = describe_error(content or b"")
        if status in _WRONG:
            raise StartupError(
                f"{self.name}: HTTP {status} from {self._root}{path}: {message}.", advice=_advice(status)
            )
        again = status in _DOWN or status >= 500 or status == 408
        return Refusal(status=status, message=message), _retry_after(response) if again else None


async def read_body(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """All of it; None if it is longer than `most` bytes."""
    body = await read_at_most(response, most)
    return body if len(body) <= most else None


async def describe(
    session: aiohttp.ClientSession,
    name: str,
    root: str,
    model: str | None,
    headers: Mapping[str, str],
    flag: str,
) -> tuple[str, dict[str, Any]]:
    """(the model to ask for, what tells this server from others). Raises StartupError, ServerDown."""
    status, listed = await _get(session, f"{root}/models", headers)
    if status in (401, 403):
        raise StartupError(f"{name}: {root}/models answered HTTP {status}.", advice=_advice(status))
    if status in _DOWN:
        raise ServerDown(f"{root}/models answered HTTP {status}")
    cards = listed.get("data") if status == 200 and isinstance(listed, dict) else None
    known = (
        [card for card in cards if isinstance(card, dict) and "id" in card] if isinstance(cards, list) else []
    )
    if model is None:
        if not known:
            raise StartupError(f"{name}: {root}/models lists no model.", advice=f"Name one with {flag}.")
        model = str(known[0]["id"])
    card = next((card for card in known if card["id"] == model), {})
    status, version = await _get(session, f"{root.removesuffix('/v1')}/version", headers)
    said = version.get("version") if status == 200 and isinstance(version, dict) else None
    about = {name: card[name] for name in ("root", "owned_by", "max_model_len") if card.get(name) is not None}
    return model, {"url": root, "model": model, "version": said, **about}


async def _get(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    try:
        async with (
            asyncio.timeout(30),
            session.get(url, headers=headers, allow_redirects=False) as response,
        ):
            content = await read_body(response, MOST_ANSWER)
    except TimeoutError:
        raise ServerDown(f"no answer from {url} within 30 s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ServerDown(f"no answer from {url}: {reason(error)}") from None
    try:
        return response.status, msgspec.json.decode(content or b"")
    except (msgspec.DecodeError, RecursionError):
        return response.status, None


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Seconds; 0 for none, and for a date."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _shown(refusal: Refusal) -> str:
    return f"HTTP {refusal.status}: {refusal.message}" if refusal.status > 0 else refusal.message


def _advice(status: int) -> str:
    if status in (401, 403):
        return (
            "Its key is read from PENSTOCK_BASELINE_API_KEY, PENSTOCK_CANDIDATE_API_KEY or "
            "PENSTOCK_JUDGE_API_KEY, else from OPENAI_API_KEY."
        )
    return "Correct the URL, or the model's name."
