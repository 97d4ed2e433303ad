r"""Server-sent events: written as a response, and read from whatever pieces come down the wire.

    payload ──event──▶ data: …\n\n ──EventStream──▶ client ──▶ EventDecoder ──▶ payload

It knows lines and the headers of a stream; it does not know what a payload says, only the one that ends an
OpenAI stream. Standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Send

DONE = "[DONE]"
"""The payload that ends a complete OpenAI stream; a stream without it was cut."""


def event(payload: bytes, name: str | None = None) -> bytes:
    """The event of a payload without line breaks, such as encoded JSON; some APIs name their events."""
    start = b"" if name is None else b"event: " + name.encode() + b"\n"
    return start + b"data: " + payload + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients skip, at the beginning of the event that follows."""
    return b": " + text.encode() + b"\n"


END = event(DONE.encode())


class EventStream:
    """The response itself: headers with the first event, so that an early error still gets its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, data: bytes) -> None:
        """Send events; waits while the client is slow to read."""
        if not self.started:
            self.started = True
            await self._send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [
                        (b"content-type", b"text/event-stream; charset=utf-8"),
                        (b"cache-control", b"no-cache"),
                        (b"x-accel-buffering", b"no"),  # nginx would hold the tokens back
                    ],
                }
            )
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, data: bytes = b"") -> None:
        """Send the last events, and end the response."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


class EventDecoder:
    """Turns the byte pieces of a `text/event-stream` body into the `data` payloads of its events.

    Bytes may be split anywhere, within a line or a character: only whole lines are decoded.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """Return the payloads completed by `piece`, in order; comments and other fields are dropped."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[str] = []
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", errors="replace")
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events
