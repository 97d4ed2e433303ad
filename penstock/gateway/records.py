"""Who asks, and what is written of it: the two records that the whole gateway shares."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.spec.model import Limits
from penstock.spec.parts import ServiceClass

Settlement = Literal["open", "settled", "estimated", "unsettled"]
"""Of a row: under way; what the upstream said at the end; reckoned from metrics or bytes; never told, and
charged at its reservation."""
Verdict = Literal["", "passed", "failed", "open", "closed"]
"""On an attempt of a route that escalates: none was looked for; its answer is good; it is not; the verifier
itself failed, and the answer passed without it (`open`), or did not (`closed`)."""


class Principal(msgspec.Struct, frozen=True):
    """Who asks: a key, as it was when the request came."""

    key_id: str
    """Public id of the key; the secret is nowhere."""
    key_name: str = ""
    team: str = ""
    tags: dict[str, str] = {}
    """The key's own; a request cannot change them."""
    routes: tuple[str, ...] | None = None
    """Routes that it may use; None is all."""
    local_only: bool = False
    """Its requests never leave the house."""
    service_class: ServiceClass = "realtime"
    """Of all its requests; team, tags and routes may make it `background` as well."""
    limits: Limits | None = None
    """Its own, in place of its team's key_limits and of the spec's; None where it has none."""


class Rate(msgspec.Struct, frozen=True):
    """A price by tokens, as it was when the request went out; see spec.model.Price."""

    input: int
    output: int
    cached_input: int | None
    per: int


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the bill of one engine of several says, until those of the others are there."""

    seconds: int | None = None
    """Nanoseconds of a device; None where the bill will never come."""
    input: int = 0
    output: int = 0
    cached: int = 0


class Asked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt: who was asked, and all that prices the engine's bill, whoever reads it and whenever."""

    replica: str
    upstream: str
    model: str
    pool: str = ""
    device: str = ""
    devices: int = 1
    device_price: int | None = None
    """Nanodollars of a device and hour."""
    price: Rate | None = None
    comparator: Rate | None = None
    bill: str = ""
    """What the engine calls it; empty where it sends no bills."""
    after: str = ""
    """Where the engine's feed was before: the bill is behind it. Empty where that is not known."""
    part: int | None = None
    """Nanoseconds times devices that its row is charged for it by estimate, where other engines made the rest
    of the answer. The bill replaces that, and nothing else."""
    rough: bool = False
    """A bill of another part will never come: with this one, too, the row is an estimate."""
    behind: int = 0
    """Tokens of the answer that the client had when it was asked: it goes on with a stream that broke."""
    gave: int | None = None
    """Tokens of the answer that came of it before another engine went on; of rows of killed workers."""
    told: Told | None = None
    """Its bill, where the row waits for those of other engines."""
    lost: bool = False
    """It failed, and its answer is not the row's: its device time is nobody's."""

    @property
    def on_devices(self) -> bool:
        """Whether what it uses is device time of ours."""
        return bool(self.device)


class Row(msgspec.Struct, kw_only=True):
    """One request in the ledger. Written once when it is let through (`open`), and once when it has ended."""

    id: str
    """Request id, the same in header, logs and upstream."""
    at: int
    """Unix time of its arrival, nanoseconds."""
    key_id: str
    key_name: str = ""
    team: str = ""
    tags: dict[str, str] = {}
    """`feature` and others."""
    endpoint: str = ""
    """Path, as /v1/chat/completions."""
    route: str = ""
    upstream: str = ""
    """Where the answer came from: a model of ours, or the name of an upstream."""
    replica: str = ""
    model: str = ""
    """What the upstream calls it."""
    status: int = 0
    """HTTP status that the client got; 499 if it had gone."""
    end: str = ""
    """How it ended: `done`, `client_gone`, `upstream_failed`, `cut`, `refused`, `killed`; `escalated`: an
    attempt whose answer the client did not get, because a dearer one was asked for."""
    attempts: int = 0
    """Upstreams that were asked."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """Of the input, read from the upstream's cache."""
    device_seconds: int | None = None
    """Nanoseconds times devices; None where nobody knows (a cloud)."""
    device_seconds_estimated: bool = False
    failed: tuple[tuple[str, str], ...] = ()
    """Upstream and model of each attempt that failed, whoever answered after it."""
    lost_device_seconds: int = 0
    """Nanoseconds times devices of attempts that failed before another one answered: not in
    `device_seconds`, and charged to nobody."""
    pool: str = ""
    """Whose devices it used; empty for a cloud."""
    device: str = ""
    """Kind of device, as the pool names it."""
    dollars: int | None = None
    """Nanodollars; None where no price is known."""
    lost_dollars: int = 0
    """Nanodollars that clouds with a price by tokens took for attempts that came to nothing: not in
    `dollars`, and charged to nobody. Attempts on devices of ours are in `lost_device_seconds`."""
    lost_estimated_dollars: int = 0
    """Of these, reckoned: from a stream's events and the prompt's bytes, since nobody told the tokens."""
    comparator_dollars: int | None = None
    """Nanodollars that the route's cloud comparator takes for the same tokens."""
    waited: int = 0
    """Nanoseconds until it was sent upstream."""
    first_byte: int | None = None
    """Nanoseconds from arrival until the answer's first byte."""
    total: int | None = None
    """Nanoseconds from arrival until the end."""
    settlement: Settlement = "open"
    reserved_tokens: int = 0
    reserved_dollars: int = 0
    reserved_device_seconds: int = 0
    """What it was let through with, at most; what an `unsettled` row is charged."""
    escalated_from: str | None = None
    """Of an escalated request's final row: the id of its attempt's row, which is one of its own."""
    verifier: str = ""
    """Of an attempt: whose word counted, by name; `attempt` where there was no answer to look at."""
    verdict: Verdict = ""
    score: float | None = None
    """What the verifier measured, where it measures something: a mean log-probability, a length."""
    reason: str = ""
    """Why it did not pass, without a word of the answer."""
    unverified: bool = False
    """The client got an attempt's answer that no verifier has passed: one failed open, or nobody dearer could
    be asked."""
    outcome: str | None = None
    """How it turned out, as was told later: `success`, `failure`, or a score from 0 to 1."""
    uncapped: bool = False
    """It generated without any bound: neither request nor route gave `max_tokens`."""
    context: int | None = None
    """Longest context of who answered, in tokens; None where the spec does not say."""
    note: str = ""
    """What hooks and retries did, in a few words."""
    owed: tuple[Asked, ...] = ()
    """Attempts whose bills have not come yet; those that are not `lost` settle the row."""

    @property
    def provisional(self) -> bool:
        """Whether a bill may still change what it is charged."""
        return any(not asked.lost for asked in self.owed)
