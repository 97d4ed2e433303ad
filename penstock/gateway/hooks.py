"""Hooks: somebody else's word on requests and answers (a filter for PII, a guard against jailbreaks).

    before   {id, endpoint, route, key_id, team, tags, body}        before the meter sees the request
    after    the same with {status, answer}; of a stream {status, events}, when the client has them already
             ─▶ {}  ·  {"refuse": "why"}  ·  {"body": …}, {"answer": …} instead  ·  {"tags": {…}} for the row

A hook is an HTTP server that is sent this by POST, or a Python callable, plain or async (a plain one runs in
a thread). One that is late, raises, or answers something else has failed: `on_failure` says whether requests
pass then. What hooks did is in the row's note.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.core.errors import InvalidRequest, PenstockError, Unavailable, brief
from penstock.spec.model import Hook

from .outside import OUTSIDE, Hanging, Outside, find

logger = logging.getLogger("penstock.gateway")

MOST_EVENTS = 1 << 20
"""Bytes of a stream that hooks see."""
_TAG_LENGTH = 128


class Refused(InvalidRequest):
    """A hook does not let it through."""

    status = 403
    code = "refused_by_hook"


class HookFailed(Unavailable):
    """A hook has failed, and nothing may pass without it."""

    code = "hook_failed"


class _Elsewhere(Exception):
    """A hook is outside of the house, where the request must not go."""


@dataclass(slots=True)
class Verdict:
    """What the hooks of one request said."""

    refusal: PenstockError | None = None
    instead: Any = None
    """Another body, or another answer."""
    tags: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def told(
    id: str, endpoint: str, route: str, owner: tuple[str, str, Mapping[str, str]], body: Mapping[str, Any]
) -> dict[str, Any]:
    """What hooks and verifiers are told of every request.

    Args:
        owner: the key's id, its team, and the request's tags.
        body: as the upstream gets it.
    """
    key_id, team, tags = owner
    entries = {"id": id, "endpoint": endpoint, "route": route, "key_id": key_id, "team": team}
    return {**entries, "tags": tags, "body": body}


class Hooks:
    """All of a spec, in its order; each sees what the ones before it made of the request."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        """Raises StartupError for a callable that cannot be found."""
        self._hooks = [
            (_name(hook), hook, None if hook.python is None else find(hook.python, "gateway.hooks"))
            for hook in hooks
        ]
        self._outside = Outside("hook")

    def wants(self, when: Literal["before", "after"], route: str) -> bool:
        """Whether somebody looks."""
        return any(
            hook.when == when and (hook.routes is None or route in hook.routes) for _, hook, _ in self._hooks
        )

    async def ask(
        self,
        when: Literal["before", "after"],
        route: str,
        about: dict[str, Any],
        rewrites: str,
        stays: Callable[[Mapping[str, str]], bool],
    ) -> Verdict:
        """Ask them all, up to the first that refuses.

        Args:
            about: what they are told.
            rewrites: name of the entry of `about` that they may replace; empty: none.
            stays: whether it must not leave the house, with these tags: who is outside of it is not asked,
                and has failed.
        """
        verdict = Verdict()
        for name, hook, function in self._hooks:
            if hook.when != when or (hook.routes is not None and route not in hook.routes):
                continue
            try:
                if hook.url is not None and not hook.local and stays(about["tags"]):
                    raise _Elsewhere(OUTSIDE)
                async with asyncio.timeout(hook.timeout):
                    said = await self._outside.ask(hook.url, function, about)
                self._take(said, name, about, rewrites, verdict)
            except TimeoutError:
                self._failed(hook, name, f"no answer within {hook.timeout:g} s", verdict)
            except (Hanging, _Elsewhere) as error:
                self._failed(hook, name, str(error), verdict)
            except Exception as error:  # whose message may quote the request
                self._failed(hook, name, type(error).__name__, verdict)
            if verdict.refusal is not None:
                break
        return verdict

    async def close(self) -> None:
        """End connections and threads."""
        await self._outside.close()

    def _take(self, said: Any, name: str, about: dict[str, Any], rewrites: str, verdict: Verdict) -> None:
        """Take in one answer. Raises ValueError where it is none."""
        if said is None:
            return
        if not isinstance(said, dict) or not set(said) <= {"refuse", "body", "answer", "tags"}:
            raise ValueError("it did not answer with refuse, body, answer or tags")
        tags = said.get("tags") or {}
        if not isinstance(tags, dict) or not all(map(_is_tag, (*tags, *tags.values()))):
            raise ValueError("its tags are no texts that can be tags")
        if tags:
            verdict.tags |= tags
            about["tags"] = {**about["tags"], **tags}
            verdict.notes.append(f"{name}: tags {', '.join(sorted(tags))}")
        if rewrites and said.get(rewrites) is not None:
            if not isinstance(said[rewrites], dict):
                raise ValueError(f"its {rewrites} is no object")
            verdict.instead = about[rewrites] = said[rewrites]
            verdict.notes.append(f"{name}: rewrote the {rewrites}")
        if said.get("refuse"):
            verdict.refusal = Refused(f"Refused: {brief(str(said['refuse']), 300)}")
            verdict.notes.append(f"{name}: refused")

    def _failed(self, hook: Hook, name: str, why: str, verdict: Verdict) -> None:
        logger.error("the hook %s failed: %s", name, why)
        verdict.notes.append(f"{name}: failed")
        if hook.on_failure == "closed":
            verdict.refusal = HookFailed("A filter of this gateway does not answer.", retry_after=5)


def _name(hook: Hook) -> str:
    return hook.python or str(hook.url).partition("?")[0]


def _is_tag(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= _TAG_LENGTH and text.isprintable()
