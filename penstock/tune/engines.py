"""The engine between two runs: started again by `penstock up` with other flags, or left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from penstock.core.errors import StartupError
from penstock.gateway.local.control import Held, path_for
from penstock.observe.page import Page

SEQS = "max-num-seqs"
TOKENS = "max-num-batched-tokens"

#: device → (max-num-seqs, max-num-batched-tokens) where no flag says it; as each engine has them.
_DEFAULTS = {
    ("penstock", True): (64, 256),
    ("penstock", False): (256, 8192),
    # vLLM 0.32 chooses by device and by how it was started; these are its server's on most
    ("vllm", True): (256, 4096),
    ("vllm", False): (256, 8192),
}
_HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of an engine's limits; None for what is not."""

    seqs: int | None = None
    tokens: int | None = None


class Fixed:
    """An engine of somebody else's: it cannot be started again, so the load changes in its place."""

    def __init__(self, url: str, headers: Mapping[str, str], known: Known) -> None:
        self.url, self.headers, self.known = url, headers, known
        self.slo: Mapping[str, float] = {}


class Managed:
    """A replica of `penstock up`."""

    def __init__(self, held: Held) -> None:
        told = held.told
        self._held = held
        self.url = str(told["url"])
        self.headers = {"Authorization": f"Bearer {told['key']}"}
        self.known = known(told["arguments"], str(told["engine"]), cpu=told["device"] == "cpu")
        self.slo = targets(told["slo"])
        self.now: Mapping[str, int] = dict(told["flags"])
        """The flags that it runs with, beside the spec's."""

    @classmethod
    async def take(cls, path: Path, model: str, replica: int) -> Managed:
        """Hold it. Raises OSError where no `up` listens, StartupError where it refuses."""
        return cls(await Held.take(path, model, replica))

    async def start(self, flags: Mapping[str, int]) -> float | None:
        """Have it run with these flags beside the spec's; seconds of the restart, None if it runs so already.

        Raises StartupError where it does not start with them.
        """
        if flags == self.now:
            return None
        self.now = dict(flags)
        return await self._held.restart(flags)

    async def keep(self) -> None:
        """Leave it as it runs now."""
        await self._held.keep()

    def close(self) -> None:
        """Let go of it; `up` starts it again with the spec's flags, unless it is to be kept."""
        self._held.close()


def control_of(url: str) -> Path | None:
    """Where the `penstock up` behind a URL would listen; None for a URL that is not on this machine."""
    parts = urlsplit(url)
    if parts.hostname not in _HERE:
        return None
    try:
        path = path_for(parts.port or (443 if parts.scheme == "https" else 80))
    except StartupError:
        return None
    return path if path.exists() else None


def known(arguments: Sequence[str], engine: str, *, cpu: bool) -> Known:
    """The limits that a command line sets, the last one winning, else the engine's defaults."""
    seqs, tokens = _DEFAULTS.get((engine, cpu), (None, None))
    given = {SEQS: seqs, TOKENS: tokens}
    words = list(arguments)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if word.startswith("--") and name in given:
            text = value if equals else next(iter(words[index + 1 : index + 2]), "")
            number = _whole(text)
            given[name] = given[name] if number is None else number
    if given[SEQS] == seqs and seqs is not None and (given[TOKENS] or seqs) < seqs and engine == "penstock":
        given[SEQS] = given[TOKENS]  # a step has a token for every request
    return Known(seqs=given[SEQS], tokens=given[TOKENS])


def limits(page: Page | None) -> Known:
    """The limits that an engine's metrics tell: ours, and some versions of vLLM's."""
    if page is None:
        return Known()
    told = {**page.labels("vllm:vllm_config_info"), **page.labels("penstock:engine_config_info")}

    def number(name: str) -> int | None:
        text = told.get(name) or told.get(f"scheduler_config_{name}") or ""
        return int(text) if text.isdecimal() else None

    return Known(seqs=number("max_num_seqs"), tokens=number("max_num_batched_tokens"))


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}


def _whole(text: str) -> int | None:
    unit = text[-1:] if text[-1:].isalpha() else ""
    number = text[: len(text) - len(unit)]
    return int(number) * _UNITS[unit] if number.isdecimal() and unit in _UNITS else None


_SPEC = {"ttft_p95": "ttft", "itl_p95": "tpot", "e2e_p95": "e2el"}
"""Of a spec's `slo`, in seconds."""


def targets(slo: Mapping[str, Any]) -> dict[str, float]:
    """A spec's targets at the 95th percentile, in ms under our names. That on the time between tokens bounds
    its mean over a request."""
    return {ours: float(slo[theirs]) * 1000 for theirs, ours in _SPEC.items() if theirs in slo}
