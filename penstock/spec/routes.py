"""Where requests go, and what is judged of their answers: the routes of `penstock.yaml`.

Route ─┬─ targets, fallback, shadow   by weight, in order, and in vain
       ├─ match · max_tokens · context   which requests, and how large
       └─ escalate ── verifiers ── to   when an answer does not do, who is asked next
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .parts import HeaderName, HeaderValue, Name, Part, ServiceClass, Share
from .units import Seconds


class Target(Part):
    """Where a route leads: a model of ours, or one of an upstream."""

    model: Name
    """A name under `models`; or, with `upstream`, one that it serves."""
    upstream: Name | None = None
    """A name under `upstreams`."""
    weight: Share = 1.0
    """Share of the requests, relative to the other targets; 0 for one that is to get none yet
    (`penstock rollout` raises it)."""


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
