"""The document: one class for each part of `penstock.yaml`, documented where each field is defined.

    Spec ─┬─ pools ◀── models ◀─┐
          ├─ upstreams ◀────────┼── routes ◀── teams · tags (who may, and how much)
          └─ gateway · ledger   └── comparator (the cloud's price for the same tokens)

Routes are in `routes.py`, what only a cluster has in `cluster.py`. Names refer to names; `references.py`
checks that they lead somewhere.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .cluster import Cluster, Job, Nodes, Scale
from .parts import (
    Count,
    Flag,
    HeaderName,
    HeaderValue,
    Hours,
    Image,
    Label,
    Name,
    Part,
    ServiceClass,
    Variable,
)
from .routes import Route
from .units import Bytes, Dollars, Seconds


class Pool(Part):
    """Devices of one kind, bought in one way."""

    hardware: str = "cpu"
    """Kind of device, as the catalogue names it: `cpu`, `L4`, `A100-80GB`, `H100`, …"""
    count: Annotated[int, Field(ge=1)] = 1
    """Devices in the pool."""
    price_per_hour: Dollars | None = None
    """US dollars for one device and hour. Without it, device-seconds are counted, and dollars are not."""
    price_as_of: datetime.date | None = None
    """When that price was looked up."""
    price_source: str | None = None
    """Where it was looked up."""
    purchase: Literal["on-demand", "spot", "owned"] = "on-demand"
    """How it is paid for."""
    mig: Annotated[str, Field(pattern=r"^[1-7]g\.\d+gb(\+me(\.all)?|\+gfx|-me)?$")] | None = None
    """Cut into such slices, as `3g.40gb`; `count` and prices are then of slices."""
    time_slicing: Annotated[int, Field(ge=2, le=64)] | None = None
    """So many pods share one device without walls between them: for development."""
    nodes: Nodes = Nodes()
    """Of a cluster."""


class Slo(Part):
    """What a model's users may expect; percentiles are over requests."""

    ttft_p95: Seconds | None = None
    """Time to the first token."""
    ttft_p99: Seconds | None = None
    """The same, of all but one in a hundred."""
    itl_p95: Seconds | None = None
    """Time between tokens."""
    itl_p99: Seconds | None = None
    """The same, of all but one in a hundred."""
    e2e_p95: Seconds | None = None
    """Time of a whole answer."""
    e2e_p99: Seconds | None = None
    """The same, of all but one in a hundred."""


class Load(Part):
    """What comes to a model, for planning: how often, and how long requests are."""

    rate: Annotated[float, Field(gt=0, lt=1e9)] | None = None
    """Requests a second, on average: they decide how many replicas there are; `replicas`, if not given."""
    peak: Annotated[float, Field(gt=0, lt=1e9)] | None = None
    """The same at the busiest; twice the rate if not given."""
    prompt: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a prompt as a rule; 1000 if not given."""
    output: Annotated[int, Field(ge=1)] | None = None
    """Tokens of an answer as a rule, at which targets are judged; if not given, the `default` of its routes'
    `max_tokens`, else 200."""

    @model_validator(mode="after")
    def _ordered(self) -> Load:
        if self.peak is not None and self.rate is None:
            raise ValueError(f"peak {self.peak:g} has no rate beside it")
        if self.peak is not None and self.rate is not None and self.peak < self.rate:
            raise ValueError(f"peak {self.peak:g} is less than rate {self.rate:g}")
        return self


class Model(Part):
    """Weights that an engine of ours serves, on a pool."""

    weights: Annotated[str, Field(pattern=r"^[^-\s]", max_length=4096)]
    """A folder, a Hugging Face id, or `demo` for the bundled model."""
    engine: Literal["penstock", "vllm"] = "penstock"
    """Which engine serves it."""
    pool: Name
    """Which devices it runs on."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Engines with the same weights; in `penstock plan` and `penstock compile` at least so many, and as many
    as `load` takes."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Devices of the pool that each replica takes (tensor parallel)."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest context in tokens; the model's own if not given."""
    quantization: str | None = None
    """As `--quantization`."""
    memory: Bytes | None = None
    """KV cache of each replica in bytes, as `--kv-cache-memory-bytes`. If not given, `penstock up` shares
    what is free among all models."""
    slo: Slo | None = None
    """Targets, for planning, alerts and reports."""
    load: Load | None = None
    """What comes to it, for planning; `penstock up` passes it by."""
    start: Literal["eager", "lazy"] = "eager"
    """Start with `penstock up`, or with the first request that wants it."""
    keep_alive: Seconds | None = None
    """Leave memory after so long without a request; never if not given."""
    flags: dict[Flag, Any] = {}
    """More flags of the engine, by name without dashes: `max-num-seqs: 64`."""
    scale: Scale | None = None
    """On a cluster: more replicas when the load is high. Without it, there are always `replicas`."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """On a cluster: nodes that the devices of each replica are on; a LeaderWorkerSet where there are
    several."""
    image: Image | None = None
    """On a cluster: another container image for its engine."""


class Price(Part):
    """What an upstream takes for tokens, in US dollars, on a date."""

    input: Dollars
    """For `per` input tokens."""
    output: Dollars
    """For `per` output tokens."""
    cached_input: Dollars | None = None
    """For `per` input tokens that were read from its cache; as `input` if not given."""
    per: Annotated[int, Field(ge=1)] = 1_000_000
    """Tokens that the prices are for."""
    batch: Annotated[float, Field(gt=0, le=1)] | None = None
    """What batches pay of these prices, as 0.5 for half; all of them if not given."""
    as_of: datetime.date
    """When they were looked up. A price without a date is no price."""
    source: Annotated[str, Field(min_length=1)]
    """Where they were looked up."""


class UpstreamModel(Part):
    """A model that an upstream serves."""

    name: str | None = None
    """What the upstream calls it, if not as here."""
    price: Price | None = None
    """Its price by tokens. Without it, its requests have no dollars in the ledger."""
    context: Annotated[int, Field(ge=1)] | None = None
    """Longest context in tokens."""


class Upstream(Part):
    """Somebody else's server: another Penstock, a vLLM, a cloud."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")]
    """Base URL, with or without its `/v1`."""
    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")], ...] = ()
    """More replicas of the same server."""
    discover: bool = False
    """The name in `url` has an address for each replica, as a headless Service of Kubernetes has, and they
    change: it is looked up every five seconds, and each address is a replica of its own. Needs http."""
    kind: Literal["penstock", "vllm", "openai", "anthropic"] = "openai"
    """Its dialect: what it answers about health, usage and device time."""
    api_key_env: Variable | None = None
    """Environment variable with its key."""
    trusts_gateway: bool = False
    """A Penstock whose `--gateway-key` is the key: teams go along as tenants, and final bills are read."""
    priorities: bool = False
    """A vLLM with `--scheduling-policy priority`: requests of the class `background` go there with a
    `priority` behind all others. A Penstock that trusts the gateway is told the class itself."""
    headers: dict[HeaderName, HeaderValue] = {}
    """Headers that are sent with every request."""
    pool: Name | None = None
    """The pool whose price its device-seconds have, if it runs on devices of ours."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Devices of that pool that each replica takes."""
    local: bool | None = None
    """Whether data stays in the house; if not given, whether `pool` is."""
    models: dict[Name, UpstreamModel]
    """What it serves."""
    files: bool = False
    """It has `/v1/files` and `/v1/batches`. Needs `kind: openai` or `penstock`."""
    max_connections: Annotated[int, Field(ge=1)] = 1000
    """Most requests at a time, for each replica."""
    timeout_connect: Seconds = 5.0
    """Until a connection stands."""
    timeout_headers: Seconds = 600.0
    """Until the answer begins."""
    timeout_idle: Seconds = 60.0
    """Between two pieces of a stream."""

    @property
    def replicas(self) -> tuple[str, ...]:
        """All its base URLs, without a trailing slash or `/v1`."""
        return tuple(url.rstrip("/").removesuffix("/v1").rstrip("/") for url in (self.url, *self.urls))

    @property
    def in_house(self) -> bool:
        """Whether requests that must not leave may go there."""
        return self.pool is not None if self.local is None else self.local


class Limits(Part):
    """How much one key, team or tag may use. What is not given is not limited."""

    requests_per_minute: Count | None = None
    """In the last sixty seconds, at any time."""
    tokens_per_minute: Count | None = None
    """Input and output tokens together."""
    concurrent_requests: Count | None = None
    """Under way at the same time."""
    dollars_per_day: Dollars | None = None
    """A day is UTC's."""
    dollars_per_month: Dollars | None = None
    """A month is UTC's."""
    device_seconds_per_day: Seconds | None = None
    """Seconds of one device; a request on two devices takes two each second."""
    gpu_hours_per_day: Hours | None = None
    """Device-hours; the same budget as `device_seconds_per_day`, in other words."""
    gpu_hours_per_month: Hours | None = None
    """The same for a month."""


class Team(Part):
    """Who pays together."""

    limits: Limits = Limits()
    """Of all its keys together."""
    key_limits: Limits = Limits()
    """Of each of its keys, where the key has none of its own."""
    routes: tuple[Name, ...] | None = None
    """Routes that its keys may use; all if not given."""
    local_only: bool = False
    """Its requests never leave the house."""
    service_class: ServiceClass = "realtime"
    """`background`: engines that schedule by priority serve all others first."""


class Tag(Part):
    """One value of a tag, as the feature `search`."""

    limits: Limits = Limits()
    """Of all requests with it together."""
    local_only: bool = False
    """Requests with it never leave the house."""
    service_class: ServiceClass = "realtime"
    """`background`: engines that schedule by priority serve all others first."""


class Hook(Part):
    """Somebody who looks at requests or answers: a filter for PII, a guard against jailbreaks."""

    when: Literal["before", "after"]
    """Before the request goes out, or after its answer is whole."""
    url: str | None = None
    """Is asked by POST; or"""
    local: bool = False
    """Whether `url` is in the house. One that is not is not told of what is `local_only`, and has failed."""
    python: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """a callable, as `package.module:function`."""
    timeout: Seconds = 1.0
    """How long its answer is waited for."""
    on_failure: Literal["open", "closed"] = "closed"
    """Whether requests pass when the hook fails."""
    routes: tuple[Name, ...] | None = None
    """Where it looks; everywhere if not given."""

    @model_validator(mode="after")
    def _one(self) -> Hook:
        if (self.url is None) == (self.python is None):
            raise ValueError("a hook has either url or python")
        if self.local and self.url is None:
            raise ValueError("local is said of a url; everything else is in the house")
        return self


class Admin(Part):
    """The admin API: keys are made and revoked, and rows read, over HTTP."""

    key_env: Variable
    """Environment variable with its key, of 16 characters or more; nobody else's."""
    host: str = "127.0.0.1"
    """Address that it listens on, where it has a port of its own."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """A port of its own; if not given, it is at the gateway's, for everybody who reaches that."""


class Files(Part):
    """What may be uploaded to `/v1/files`."""

    max_bytes: Bytes = 200 * 1000 * 1000
    """Largest file; more is answered with 413."""
    max_line_bytes: Bytes = 10 * 1024 * 1024
    """Longest line of a batch's input, which is one request."""
    max_lines: Annotated[int, Field(ge=1)] = 50_000
    """Most requests in a batch's input."""
    max_uploads: Annotated[int, Field(ge=1)] = 8
    """At a time, for each worker; more are answered with 503. Each takes up to twice its size on the disk of
    `ledger.spool`."""
    timeout: Seconds = 600.0
    """Until the upstream has taken a file. How long the client may take is `--timeout-body`."""


class Gateway(Part):
    """The door itself."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes a free one."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes behind the port."""
    ssl_certfile: str | None = None
    """Certificate file (PEM), to serve HTTPS; read again when it changes."""
    ssl_keyfile: str | None = None
    """Its private key (PEM)."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks, as 10.0.0.0/8, whose X-Forwarded-For or Forwarded is believed; `unix` for a Unix
    socket."""
    admin: Admin | None = None
    """The admin API; there is none if not given."""
    metrics_key_env: Variable | None = None
    """Environment variable with the key that `/metrics` wants, of 16 characters or more; whoever reaches the
    gateway may read it, with the dollars of routes, if not given."""
    tracing: bool = False
    """Send OpenTelemetry spans, as the environment variables OTEL_* say; needs `penstock[otel]`."""
    max_body_bytes: Bytes = 10 * 1024 * 1024
    """Largest request body; more is answered with 413."""
    files: Files = Files()
    """Of files and batches, at upstreams with `files: true`."""
    hooks: tuple[Hook, ...] = ()
    """In this order."""
    tag_headers: dict[str, HeaderName] = {"feature": "x-penstock-feature"}
    """Tag → header that it is read from (a key's own tags win)."""
    first_key: bool = True
    """Make a key at the first start, and print it once; in a cluster nothing is printed, since logs are kept
    (`penstock keys create`)."""
    expose_routing: bool = True
    """Say upstream, route, cost and device-seconds in headers of answers."""


class Ledger(Part):
    """Where the rows are."""

    url: str = "sqlite:///penstock.db"
    """SQLAlchemy's URL: SQLite, or postgresql://… (its password from PENSTOCK_LEDGER_PASSWORD)."""
    spool: str = "penstock-spool"
    """Folder of the journals: what has not reached the database yet. On a local disk."""
    counters: str | None = None
    """redis://… where limits are counted there, and not in the database."""
    counters_failure: Literal["open", "closed"] = "closed"
    """Whether requests pass when that cannot be reached."""
    outcome_window: Seconds = 30 * 86_400.0
    """How long after a request its outcome may be told (`POST /v1/outcomes`)."""


class Spec(Part):
    """One `penstock.yaml`."""

    version: Literal[1] = 1
    """Of this format."""
    pools: dict[Name, Pool] = {}
    """Devices, and what they cost."""
    models: dict[Name, Model] = {}
    """What engines of ours serve."""
    upstreams: dict[Name, Upstream] = {}
    """Servers that are there already, and clouds."""
    routes: dict[Name, Route] = {}
    """Models can be asked for by their own name, too, unless a route has that name."""
    teams: dict[Name, Team] = {}
    """Who pays."""
    tags: dict[str, dict[str, Tag]] = {}
    """Tag → value → what holds for it."""
    limits: Limits = Limits()
    """Of each key that has no others."""
    gateway: Gateway = Gateway()
    """Where it listens, and whom it believes."""
    ledger: Ledger = Ledger()
    """Where its rows are."""
    jobs: dict[Label, Job] = {}
    """Work that nobody waits for, on a cluster."""
    cluster: Cluster = Cluster()
    """The Kubernetes cluster that `penstock compile` writes for."""
