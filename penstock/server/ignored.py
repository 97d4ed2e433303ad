"""What is ignored in a request, said each time: in a header of its answer, and now and then in the log.

    Ignored      one request's names ──▶ X-Penstock-Ignored: verbosity, messages[].audio
    IgnoredLog   the server's: one line per name and hour

Names come from clients, who can make them up: they are shown cut and in safe characters, and counted, so that
neither header, log nor memory grows with them. It knows no field.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from starlette.types import Scope

from penstock.core.errors import InvalidRequest, brief
from penstock.http.errors import add_header

from .near import LONGEST, Names

logger = logging.getLogger("penstock.requests")

HEADER = b"x-penstock-ignored"
_LONGEST_HEADER = 1024
"""Bytes of its value."""
_MOST_NAMES = 64
"""Different unknown names in one request; each is compared with the known ones."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
"""What no header, and no list separated by commas, may have in a name."""
_HOUR = 3600.0
_REMEMBERED = 256
"""Names whose last line in the log is remembered."""


class Ignored:
    """The names that one request sends for nothing."""

    def __init__(self, *, strict: bool = False) -> None:
        """strict: refuse unknown names, as --strict-fields wants it."""
        self.strict = strict
        self.names: dict[str, None] = {}
        """In the order of the request, each once."""
        self.renamed: Callable[[str], str] = str
        """What the dialect calls a field that a chat's code finds."""

    def add(self, name: str) -> None:
        """A name that is known to change nothing here; of a field in a list, such as `messages[].audio`."""
        self.names[self.renamed(name)] = None

    def unknown(self, name: str, names: Names, where: str = "") -> None:
        """A name that is none of `names`, in the object `where` ("" for the request itself).

        Raises InvalidRequest, naming it, if it is a typing error for one of them, if the server is strict, or
        if the request makes up too many.
        """
        full = self.renamed(f"{where}.{made_up(name)}" if where else made_up(name))
        if full in self.names:
            return
        near = names.near(name)
        if near is not None or self.strict:
            error = InvalidRequest(
                f"Unrecognized request argument supplied: {full}.",
                param=full,
                advice=f"Did you mean {near}?" if near else "",
            )
            error.code = "unknown_parameter"
            raise error
        if len(self.names) >= _MOST_NAMES:
            raise InvalidRequest(
                f"The request has more than {_MOST_NAMES} fields that this server does not know, {full} "
                "among them.",
                param=full,
            )
        self.names[full] = None

    def header(self) -> bytes:
        """The value of the header."""
        value = ""
        for name in self.names:
            longer = f"{value}, {shown(name)}" if value else shown(name)
            if len(longer) > _LONGEST_HEADER - len(", ..."):
                return f"{value}, ...".encode()
            value = longer
        return value.encode()

    def tell(self, scope: Scope, log: IgnoredLog) -> None:
        """Say them in the header of the answer and in the log; if there are any."""
        if self.names:
            add_header(scope, HEADER, self.header())
            log.say(self.names)


class IgnoredLog:
    """Lines about ignored names, for a whole server."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds."""
        self._clock = clock
        self._said_at: dict[str, float] = {}
        """Oldest first."""
        self._full_at = -_HOUR

    def say(self, names: Iterable[str]) -> None:
        """A line for each name that has had none for an hour; past a number of names, one for all others."""
        now = self._clock()
        for name in map(shown, names):
            said_at = self._said_at.get(name)
            if said_at is not None and now - said_at < _HOUR:
                continue
            self._said_at.pop(name, None)
            if len(self._said_at) >= _REMEMBERED and not self._forget(now):
                if now - self._full_at >= _HOUR:
                    self._full_at = now
                    logger.info(
                        "Requests have more than %d different names that are ignored; others are not logged "
                        "for an hour, X-Penstock-Ignored has them.",
                        _REMEMBERED,
                    )
                continue
            self._said_at[name] = now
            logger.info("The field %s of requests is ignored here (one line per name and hour).", name)

    def _forget(self, now: float) -> bool:
        """Drop the oldest name if its hour is over."""
        oldest = next(iter(self._said_at))
        if now - self._said_at[oldest] < _HOUR:
            return False
        del self._said_at[oldest]
        return True


def made_up(name: str) -> str:
    """The name of a field that a client made up, as a message may show it."""
    return brief(name, LONGEST)


def shown(name: str) -> str:
    """A name as a header and a line of the log may show it."""
    return _UNSAFE.sub("?", name)
