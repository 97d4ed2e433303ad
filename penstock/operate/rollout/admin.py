"""The gateway's admin API, as a rollout needs it: weights of a route, and how its targets do."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from penstock.core.errors import PenstockError, StartupError

from .judge import Figures

_SECONDS = 15.0
_LONGEST = 1 << 20


class Unreachable(PenstockError):
    """The gateway does not answer now."""

    status = 503


class AdminApi:
    """One gateway's."""

    def __init__(self, url: str, key: str) -> None:
        """`url`: http://HOST:PORT, as `gateway.admin` of the spec has it."""
        self.url = url.rstrip("/").removesuffix("/admin/v1").removesuffix("/v1")
        self._key = key
        # no proxies of the environment: the key goes to the gateway
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def weights(self, route: str) -> dict[str, float]:
        """Target → weight. Raises StartupError for what it refuses, Unreachable."""
        answer = self._ask("GET", f"/routes/{_quoted(route)}")
        return {name(each): each["weight"] for each in answer["targets"]}

    def weigh(self, route: str, weights: Mapping[str, float], note: str) -> None:
        """Set all weights of a route."""
        known = self._ask("GET", f"/routes/{_quoted(route)}")["targets"]
        targets = [
            {"model": each["model"], "upstream": each["upstream"], "weight": weights[name(each)]}
            for each in known
        ]
        self._ask("POST", f"/routes/{_quoted(route)}/weights", {"targets": targets, "note": note[:128]})

    def traffic(self, route: str, seconds: float) -> dict[str, Figures]:
        """Target → what it has done in the last `seconds`, by the gateway's clock."""
        answer = self._ask("GET", f"/routes/{_quoted(route)}/traffic?since={max(seconds, 0):.3f}s")
        return {name(each): Figures.read(each) for each in answer["data"]}

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}/admin/v1{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                return json.loads(answer.read(_LONGEST))
        except urllib.error.HTTPError as error:
            with error:
                said = _message(error.read(_LONGEST)) or error.reason
            if error.code >= 500 or error.code == 429:
                raise Unreachable(f"The gateway at {self.url} answers {error.code}: {said}") from None
            if error.code == 404 and "no route" not in said:
                said = "it has no admin API there (gateway.admin in its spec, of this version or later)"
            raise StartupError(
                f"The gateway at {self.url} refuses: {said}",
                advice="--url is its admin API, and --admin-key-env names the variable with the admin key."
                if error.code in (401, 403, 404)
                else "",
            ) from None
        except (OSError, ValueError) as error:  # ValueError: no JSON
            reason = getattr(error, "reason", error)
            raise Unreachable(
                f"The gateway at {self.url} does not answer: {reason}.",
                advice="Start it, or say --url http://HOST:PORT of its admin API.",
            ) from None


def name(target: Mapping[str, Any]) -> str:
    """`model`, or `model@upstream`."""
    return target["model"] if target["upstream"] is None else f"{target['model']}@{target['upstream']}"


def _quoted(route: str) -> str:
    return urllib.parse.quote(route, safe="/:@")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
