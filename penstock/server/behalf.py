"""What a gateway adds to a request that it relays: whose it is, who waits, and where another engine was lost.

    X-Penstock-Tenant         whose request it is              from a key of --gateway-key only
    X-Penstock-Class          realtime, or background          likewise
    X-Penstock-Stream-Tokens  1: ids of a stream's tokens come along, in comments that clients do not see
                                 (: prompt COUNT CACHED, once, and : tokens ID,ID,… before each chunk)
    generated_token_ids       (a field) what another engine had generated: the answer goes on behind it

A stream whose engine is lost goes on at another one with the ids of its comments: greedy or seeded, the text
is what it would have been, since draws are numbered and penalties count what was generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, quote
from penstock.core.request_spec import ServiceClass
from penstock.http.auth import PermissionDenied, caller, is_trusted
from penstock.http.exchange import header, respond
from penstock.http.ids import acceptable

from .bills import MOST
from .protocol import Request
from .state import State
from .tokens import check_ids


@dataclass(frozen=True, slots=True)
class Behalf:
    """Whose request it is, as its headers say."""

    tenant: str = ""
    service_class: ServiceClass = ServiceClass.REALTIME
    tells_tokens: bool = False
    """The ids of a stream's tokens come along."""

    @classmethod
    def of(cls, scope: Scope) -> Behalf:
        """Raises PermissionDenied for what only a gateway may say, and InvalidRequest for what is nothing."""
        tenant, asked = header(scope, b"x-penstock-tenant"), header(scope, b"x-penstock-class")
        tells = header(scope, b"x-penstock-stream-tokens") == "1"
        if tenant is None and asked is None:
            return cls(tells_tokens=tells)
        need_trust(scope, "The headers X-Penstock-Tenant and X-Penstock-Class are")
        if tenant is not None and not acceptable(tenant):
            raise InvalidRequest("X-Penstock-Tenant must be 1 to 256 printable characters.")
        try:
            service_class = ServiceClass(asked or ServiceClass.REALTIME)
        except ValueError:
            known = " or ".join(ServiceClass)
            raise InvalidRequest(f"X-Penstock-Class must be {known}, got {quote(asked)}.") from None
        return cls(tenant or "", service_class, tells)


def need_trust(scope: Scope, what: str) -> None:
    """Raise PermissionDenied unless the caller has a key of --gateway-key. what: `…, which is`."""
    if not is_trusted(scope):
        raise PermissionDenied(
            f"{what} for gateways only.",
            advice="Start the server with --gateway-key, and present that key.",
        )


def owner_of(scope: Scope) -> str:
    """Whose is what a request makes: his tenant's where a gateway says so, else his key's. Raises as
    `Behalf.of`."""
    tenant = Behalf.of(scope).tenant
    return f"tenant {tenant}" if tenant else f"key {caller(scope)}"


async def list_bills(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The final bills behind a cursor, all or those of some requests. For gateways only."""
    need_trust(scope, "The bills are")
    fields = parse_qsl(scope["query_string"].decode("latin-1"))
    query = dict(fields)
    if ids := [value for name, value in fields if name == "id"]:
        page = state.bills.find(ids, query.get("after"))
    else:
        limit = query.get("limit", "1000")
        if not (limit.isdecimal() and len(limit) <= 9):
            raise InvalidRequest(f"limit must be from 1 to {MOST}, got {quote(limit)}.", param="limit")
        page = state.bills.page(query.get("after"), int(limit))
    await respond(send, msgspec.json.encode(page))


def resumed(request: Request, prompts: int, vocab_size: int) -> tuple[int, ...]:
    """What another engine had generated for the one prompt of a request.

    Raises InvalidRequest for ids that are none, and for requests that cannot be gone on with.
    """
    ids = getattr(request, "generated_token_ids", ())
    if not ids:
        return ()
    field = "generated_token_ids"
    check_ids(ids, vocab_size, field)
    several = prompts > 1 or getattr(request, "n", 1) > 1
    repeats = getattr(request, "echo", False)
    told = getattr(request, "logprobs", None) not in (None, False)
    if several or repeats or told or getattr(request, "prompt_logprobs", None) is not None:
        raise InvalidRequest(
            f"{field} goes with one prompt and n of 1, without echo, logprobs and prompt_logprobs.",
            param=field,
        )
    return tuple(ids)
