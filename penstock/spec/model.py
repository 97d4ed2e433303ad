"""The document: one class for each part of `penstock.yaml`, documented where each field is defined.

    Spec ─┬─ pools ◀── models ◀─┐
          ├─ upstreams ◀────────┼── routes ◀── teams · tags (who may, and how much)
          └─ gateway · ledger   └── comparator (the cloud's price for the same tokens)

Names refer to names; `references.py` checks that they lead somewhere.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .units import Bytes, Dollars, Seconds

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
"""What something is called; also what clients write as `model`."""
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A weight, relative to those beside it."""
Count = Annotated[int, Field(ge=0, le=10**15)]
"""Of requests or tokens, in what databases and Redis count exactly."""
Hours = Annotated[float, Field(ge=0, le=2_500_000, allow_inf_nan=False)]
"""Of devices, in nanoseconds of 64 bits."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable. Secrets are never in the file."""
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]
"""Of HTTP."""
HeaderValue = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$")]
"""Of HTTP; plain ASCII."""
ServiceClass = Literal["realtime", "background"]
"""Who waits for an answer: somebody, or nobody."""
Flag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
"""Name of a flag, without its dashes."""


class Part(BaseModel):
    """Base of all parts: unknown keys are refused, nothing changes, docstrings describe fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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


class Model(Part):
    """Weights that an engine of ours serves, on a pool."""

    weights: Annotated[str, Field(pattern=r"^[^-\s]", max_length=4096)]
    """A folder, a Hugging Face id, or `demo` for the bundled model."""
    engine: Literal["penstock", "vllm"] = "penstock"
    """Which engine serves it."""
    pool: Name
    """Which devices it runs on."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Engines with the same weights."""
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
    start: Literal["eager", "lazy"] = "eager"
    """Start with `penstock up`, or with the first request that wants it."""
    keep_alive: Seconds | None = None
    """Leave memory after so long without a request; never if not given."""
    flags: dict[Flag, Any] = {}
    """More flags of the engine, by name without dashes: `max-num-seqs: 64`."""


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


class Target(Part):
    """Where a route leads: a model of ours, or one of an upstream."""

    model: Name
    """A name under `models`; or, with `upstream`, one that it serves."""
    upstream: Name | None = None
    """A name under `upstreams`."""
    weight: Share = 1.0
    """Share of the requests, relative to the other targets."""


class TokenCap(Part):
    """How many tokens a request may ask for."""

    ceiling: Annotated[int, Field(ge=1)] | None = None
    """Most `max_tokens`; more is lowered to it."""
    default: Annotated[int, Field(ge=1)] | None = None
    """`max_tokens` of requests that do not say; the ceiling if not given."""

    @model_validator(mode="after")
    def _ordered(self) -> TokenCap:
        if self.ceiling is not None and self.default is not None and self.default > self.ceiling:
            raise ValueError(f"default {self.default} is over the ceiling {self.ceiling}")
        return self


class Match(Part):
    """Which requests a route takes that did not ask for it by name. All that is given must fit."""

    headers: dict[HeaderName, HeaderValue] = {}
    """Header → value."""
    tags: dict[str, str] = {}
    """Tag → value."""


class Length(Part):
    """How long an answer may be; each of its choices."""

    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """As the upstream has counted them; with several choices, of all together."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """The same."""
    min_characters: Annotated[int, Field(ge=0)] | None = None
    """Of its text."""
    max_characters: Annotated[int, Field(ge=0)] | None = None
    """The same."""


class Verifier(Part):
    """One way to tell a good answer. Exactly one of `mean_logprob`, `json_schema`, `regex`, `not_regex`,
    `length`, `finish_reason`, `url` and `python`."""

    name: Name | None = None
    """What the ledger calls it; if not given, which of these it is."""
    mean_logprob: Annotated[float, Field(le=0, allow_inf_nan=False)] | None = None
    """Least mean of the log-probabilities of its tokens, as -0.5. They are asked for, and taken out again
    where the client did not ask. Messages have none."""
    json_schema: dict[str, Any] | None = None
    """Its text is JSON of this schema; `$ref` only within it, and no `patternProperties`."""
    regex: str | None = None
    """Found in its text (Python's `regex`); `(?s)^…$` for all of it."""
    not_regex: str | None = None
    """Not found in its text, as `(?i)i (can't|cannot|don't know)`."""
    length: Length | None = None
    """Its length."""
    finish_reason: tuple[Literal["stop", "length", "content_filter", "tool_calls"], ...] | None = None
    """How it may end, in OpenAI's words whatever the endpoint: `[stop, tool_calls]`."""
    url: str | None = None
    """Is asked by POST, and answers with `{"pass": true}`; or"""
    local: bool = False
    """Whether `url` is in the house. One that is not is not told of what is `local_only`, and has failed."""
    python: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """a callable, as `package.module:function`, plain or async."""
    timeout: Seconds = 1.0
    """How long its word is waited for."""
    on_failure: Literal["open", "closed"] = "closed"
    """Whether an answer passes when the verifier itself fails, is late, or has nothing to look at."""

    @model_validator(mode="after")
    def _one(self) -> Verifier:
        given = [kind for kind in VERIFIERS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a verifier is one of {', '.join(VERIFIERS)}, not {' and '.join(given) or 'none'}"
            )
        if self.local and self.url is None:
            raise ValueError("local is said of a url; everything else is in the house")
        return self

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return next(kind for kind in VERIFIERS if getattr(self, kind) is not None)


VERIFIERS = ("mean_logprob", "json_schema", "regex", "not_regex", "length", "finish_reason", "url", "python")
"""Fields of a verifier of which it has one."""


class Escalation(Part):
    """A route's targets are a cheap attempt; what does not pass is asked of somebody dearer."""

    verifiers: Annotated[tuple[Verifier, ...], Field(min_length=1)]
    """In this order, up to the first that the answer does not pass."""
    to: tuple[Target, ...] = ()
    """Who is asked then: by weight, the others where one cannot answer; or"""
    route: Name | None = None
    """the targets and fallbacks of another route, under its `max_tokens`, `context`, `retries` and
    `local_only`."""
    attempt_timeout: Seconds | None = None
    """How long the attempt may take; longer counts as an error of it."""
    on_error: Literal["escalate", "fail"] = "escalate"
    """What becomes of a request whose attempt fails: nobody answers, or not to the end."""
    on_refusal: Literal["answer", "escalate"] = "answer"
    """What becomes of one that the attempt's upstream refuses (4xx), as for a prompt that is too long for
    it."""
    on_unavailable: Literal["answer", "fail"] = "answer"
    """Where nobody dearer can answer, or may (`local_only`): the attempt's answer, marked, or the error."""

    @model_validator(mode="after")
    def _somewhere(self) -> Escalation:
        if bool(self.to) == (self.route is not None):
            raise ValueError("escalate has either to or route")
        return self


class Route(Part):
    """A name that clients ask for, and where it leads."""

    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    """By weight: a canary is a target with a small one."""
    fallback: tuple[Target, ...] = ()
    """In this order, when no target can answer."""
    escalate: Escalation | None = None
    """When targets and fallback are only a first attempt: how its answer is judged, and who is asked next."""
    shadow: tuple[Target, ...] = ()
    """Get a copy of each request (`weight` is a probability); nobody waits for them or pays for them."""
    aliases: tuple[Name, ...] = ()
    """Other names of the route, as capabilities: `classify-intent`."""
    match: tuple[Match, ...] = ()
    """Requests that come here whatever model they name."""
    max_tokens: TokenCap = TokenCap()
    """Of each request."""
    context: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and answer together."""
    sticky: HeaderName | None = None
    """Header whose value keeps a session on one replica."""
    comparator: Target | None = None
    """The cloud model whose price for the same tokens stands beside each row of the ledger."""
    local_only: bool = False
    """Never leaves the house, whatever the targets say."""
    service_class: ServiceClass = "realtime"
    """`background`: engines that schedule by priority serve all others first."""
    extra_costs: bool = False
    """Requests may have what an upstream takes more for than its prices by tokens: tools that it runs itself
    (web search, file search, code interpreter, MCP), a dearer `service_tier`. That is in no reservation, and
    in no row."""
    shared_ids: bool = False
    """Requests may name what the upstream's account has (item_reference, stored prompts, vector stores,
    containers). All keys share that account: whoever knows an id can use it."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """More attempts before the first token, or for the rest of a stream that breaks, at other replicas where
    there are some."""
    wait: Seconds = 300.0
    """How long requests wait for a model that is starting."""
    max_waiting: Annotated[int, Field(ge=0)] = 256
    """How many requests wait for it at most."""


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
