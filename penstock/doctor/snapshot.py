"""What a running engine tells of itself over HTTP, and what this machine shows if the engine is on it.

Nothing here judges. What cannot be had is None, with the reason where one is of use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from penstock.bench.errors import BenchError
from penstock.http.reading import read_at_most
from penstock.observe.page import MOST_BYTES, Page

_HERE = ("localhost", "127.0.0.1", "::1")
_SECONDS = 10.0
_MOST_JSON = 4 << 20
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the doctor runs: of use where that is the engine's machine or pod. Bytes."""

    shm: int | None = None
    """Size of /dev/shm."""
    memory: int | None = None
    """What may be used: the container's limit, else the machine's memory."""
    limited: bool = False
    """Whether that is a limit of a container."""
    used: int | None = None
    """Of that limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look at an engine."""

    url: str
    health: Mapping[str, int] = field(default_factory=dict)
    """Path of a probe → status."""
    page: Page | None = None
    page_problem: str = ""
    """Why there is no page."""
    version: str | None = None
    model: str | None = None
    max_model_len: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    """Settings by vLLM's names, from wherever they are told."""
    machine: Machine | None = None
    """None where the engine is elsewhere."""

    @property
    def engine(self) -> str:
        """penstock, vllm, gateway (of ours), or unknown."""
        if self.page is None:
            return "unknown"
        if self.page.has("penstock:gateway_"):
            return "gateway"
        if self.page.has("penstock:"):
            return "penstock"
        return "vllm" if self.page.has("vllm:") else "unknown"

    def number(self, name: str) -> float | None:
        """A setting that is a number."""
        try:
            value = float(self.config[name])
        except (KeyError, ValueError):
            return None
        return value if abs(value) < 1e18 else None


async def look(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> Snapshot:
    """Ask everything once. Raises BenchError where nobody answers at all."""
    health: dict[str, int] = {}
    problem = "nobody answers"
    for path in ("/health", "/livez", "/readyz"):
        try:
            health[path], _ = await _get(session, url + path, headers, _MOST_JSON)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
    if not health:
        raise BenchError(f"no server at {url}: {problem}; correct the URL, or look into its log: --logs FILE")
    page, page_problem = None, ""
    try:
        status, body = await _get(session, f"{url}/metrics", headers, MOST_BYTES)
        if status == 200:
            page = Page(body.decode("utf-8", "replace"))
        else:
            page_problem = f"/metrics answers {status}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        page_problem = f"/metrics: {error}"
    models = await _json(session, f"{url}/v1/models", headers)
    version = await _json(session, f"{url}/version", headers)
    server = await _json(session, f"{url}/server_info?config_format=json", headers)
    card = _first(models)
    length = card.get("max_model_len")
    return Snapshot(
        url=url,
        health=health,
        page=page,
        page_problem=page_problem,
        version=_text(version.get("version")),
        model=_text(card.get("id")),
        max_model_len=length if isinstance(length, int) and not isinstance(length, bool) else None,
        config=settings(page, server),
        machine=this_machine() if urlsplit(url).hostname in _HERE else None,
    )


def settings(page: Page | None, server: Mapping[str, Any]) -> dict[str, str]:
    """Settings from the metrics' information and, where a vLLM is started with VLLM_SERVER_DEV_MODE=1, from
    /server_info; the page's win."""
    found: dict[str, str] = {}
    config = server.get("vllm_config")
    if isinstance(config, Mapping):
        for part in config.values():
            if isinstance(part, Mapping):
                found |= {str(name): str(value) for name, value in part.items() if _plain(value)}
    if page is not None:
        for name, value in page.labels("vllm:vllm_config_info").items():
            found[name.partition("_config_")[2] or name] = value
        found |= page.labels("vllm:cache_config_info")
        found |= page.labels("penstock:engine_config_info")
    return {name: value for name, value in found.items() if value not in ("None", "")}


def this_machine() -> Machine:
    """What can be seen here."""
    try:
        found = os.statvfs("/dev/shm")
        shm: int | None = found.f_frsize * found.f_blocks
    except OSError:
        shm = None
    limit, used = _whole(_CGROUP / "memory.max"), _whole(_CGROUP / "memory.current")
    try:
        total: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        total = None
    limited = limit is not None and (total is None or limit < total)
    return Machine(shm=shm, memory=limit if limited else total, limited=limited, used=used)


def _whole(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


async def _get(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], most: int
) -> tuple[int, bytes]:
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    async with session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as answer:
        body = await read_at_most(answer, most)
        if len(body) > most:
            raise ValueError(f"the answer has more than {most:,} bytes")
        return answer.status, body


async def _json(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> Mapping[str, Any]:
    """An object; empty for whatever else comes."""
    try:
        status, body = await _get(session, url, headers, _MOST_JSON)
        answer = msgspec.json.decode(body) if status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, Mapping) else {}


def _first(models: Mapping[str, Any]) -> Mapping[str, Any]:
    data = models.get("data")
    first = data[0] if isinstance(data, list) and data else None
    return first if isinstance(first, Mapping) else {}


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
