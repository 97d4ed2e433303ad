"""Ids that carry their owner and their replica: who did not make a response cannot read, end or continue it.

    resp_68af…            the upstream's
    resp_68af….Zm9vYmF…   the client's: 4 bytes of the replica's name, 12 of a MAC over id, replica and key

Nothing is stored, so any gateway with the same secret knows them. To an id that is wrong, of another key, or
of a replica that is gone there is one answer: there is no such thing.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import msgspec

from penstock.core.errors import InvalidRequest, brief

from .stations import Station

ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
"""An upstream's id, as it may stand in a path."""
_REPLICA, _MAC = 4, 12


class NotFound(InvalidRequest):
    """No such thing, or not this key's."""

    status = 404
    code = "not_found"


class Owned:
    """Writes and reads such ids."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: at least 16 random bytes, the same for all gateways in front of the same upstreams."""
        if len(secret) < 16:
            raise ValueError("the secret of ids needs at least 16 bytes")
        self._secret = secret

    def name(self, id: str, station: Station, key_id: str) -> str:
        """The client's name of an upstream's id; what is no plain id stays as it is, and leads nowhere."""
        if not ID.fullmatch(id):
            return id
        replica = _replica(station)
        token = base64.urlsafe_b64encode(replica + self._mac(id, replica, key_id)).rstrip(b"=").decode()
        return f"{id}.{token}"

    def read(self, name: str, stations: Iterable[Station], key_id: str) -> tuple[str, Station]:
        """The upstream's id and its replica. Raises NotFound."""
        id, dot, token = name.rpartition(".")
        if dot and ID.fullmatch(id) and len(token) == 22:
            try:
                data = base64.b64decode(token + "==", altchars=b"-_", validate=True)
            except (binascii.Error, ValueError):
                data = b""
            replica, mac = data[:_REPLICA], data[_REPLICA:]
            if hmac.compare_digest(mac, self._mac(id, replica, key_id)):
                for station in stations:
                    if _replica(station) == replica:
                        return id, station
        raise NotFound(f"There is no {brief(name)!r}.")

    def _mac(self, id: str, replica: bytes, key_id: str) -> bytes:
        data = replica + f"{id}\0{key_id}".encode()
        return blake2b(data, key=self._secret[:64], digest_size=_MAC).digest()


def _replica(station: Station) -> bytes:
    return blake2b(station.id.encode(), digest_size=_REPLICA).digest()


class Renamer:
    """Writes the client's ids into an answer of the Responses API, whole or in events: an id stands there in
    quotes, and in the text of a JSON value every quote has a backslash."""

    def __init__(self, owned: Owned, station: Station, key_id: str, known: Mapping[str, str]) -> None:
        """`known`: ids of the upstream with the names that the client gave them, such as the previous one."""
        self._owned = owned
        self._station = station
        self._key_id = key_id
        self._pairs = [(b'"%s"' % old.encode(), b'"%s"' % new.encode()) for old, new in known.items()]
        self._learned = False

    def __call__(self, data: bytes) -> bytes:
        """The same whole events, or the same whole answer, with the client's ids."""
        if not self._learned:
            self._learn(data)
        for old, new in self._pairs:
            if old in data:
                data = data.replace(old, new)
        return data

    def _learn(self, data: bytes) -> None:
        for payload in _DATA.findall(data) or [data]:
            try:
                value = _NAMED.decode(payload)
            except (msgspec.MsgspecError, RecursionError):
                continue
            inner = value.response if isinstance(value.response, dict) else {"id": value.id}
            id = inner.get("id")
            if isinstance(id, str) and ID.fullmatch(id):
                name = self._owned.name(id, self._station, self._key_id)
                self._pairs.append((b'"%s"' % id.encode(), b'"%s"' % name.encode()))
                self._learned = True
                return


class _Named(msgspec.Struct):
    id: Any = None
    response: Any = None


_NAMED = msgspec.json.Decoder(_Named)
_DATA = re.compile(rb"^data:[ ]?(.*?)\r?$", re.MULTILINE)
