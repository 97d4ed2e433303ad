"""An upstream with OpenAI's files and batches, which behaves as it is told."""

from __future__ import annotations

import email
import json
import time
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.gateway.upstream import Asked, Behaviour, Upstream, Wire

MOMENT = 1_800_000_000
"""When files are made here; batches are made now."""


class Cloud:
    """Files and batches by id; all keys of the gateway are one account here, as at OpenAI."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.script: dict[tuple[str, str], Behaviour] = {}
        """Method and path → what happens there in place of an answer."""
        self.lose: set[str] = set()
        """Paths whose answers are lost after the work was done."""
        self.upstream = Upstream(default=self.behave).start()

    @property
    def asked(self) -> list[Asked]:
        return self.upstream.asked

    @property
    def url(self) -> str:
        return self.upstream.url

    def paths(self, method: str) -> list[str]:
        return [each.path for each in self.asked if each.method == method]

    def add(self, content: bytes, purpose: str, filename: str = "x.jsonl", **more: Any) -> dict[str, Any]:
        id = f"file-{len(self.files) + 1:04}"
        self.contents[id] = content
        self.files[id] = {
            "id": id,
            "object": "file",
            "bytes": len(content),
            "created_at": MOMENT,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            **more,
        }
        return self.files[id]

    def end(self, id: str, status: str = "completed", *, lines: list[Any] | None = None, **more: Any) -> None:
        """A batch ends; `lines` are answers of its output file."""
        batch = self.batches[id]
        if lines is not None:
            output = "".join(json.dumps(each) + "\n" for each in lines).encode()
            batch["output_file_id"] = self.add(output, "batch_output", f"{id}_output.jsonl")["id"]
            batch["request_counts"] = {"total": len(lines), "completed": len(lines), "failed": 0}
        batch.update(status=status, **more)

    async def behave(self, wire: Wire) -> None:
        asked = wire.asked
        path = urlsplit(asked.path).path
        if (scripted := self.script.get((asked.method, path))) is not None:
            await scripted(wire)
            if not wire.complete:
                wire.writer.close()
            return
        status, value = self.answer(asked, path)
        if path in self.lose:
            wire.reset()
            return
        if isinstance(value, bytes):
            await wire.head(status, f"Content-Length: {len(value)}", content_type="application/octet-stream")
            await wire.send(value)
        else:
            await wire.whole(status, value)

    def answer(self, asked: Asked, path: str) -> tuple[int, Any]:
        match asked.method, path.strip("/").split("/")[1:]:
            case "POST", ["files"]:
                form = parts(asked)
                content, filename = form.pop("file")
                more = {}
                if "expires_after[seconds]" in form:
                    more["expires_at"] = MOMENT + int(form["expires_after[seconds]"])
                return 200, self.add(content, form["purpose"], filename, **more)
            case "GET", ["files", id] if id in self.files:
                return 200, self.files[id]
            case "DELETE", ["files", id] if id in self.files:
                del self.files[id]
                return 200, {"id": id, "object": "file", "deleted": True}
            case "GET", ["files", id, "content"] if id in self.files:
                return 200, self.contents[id]
            case "POST", ["batches"]:
                given = asked.json
                if given["input_file_id"] not in self.files:
                    return 404, {"error": {"message": f"No such File object: {given['input_file_id']}"}}
                id = f"batch_{len(self.batches) + 1:04}"
                nothing = dict.fromkeys(("output_file_id", "error_file_id", "errors", "usage"))
                counts = {"total": 0, "completed": 0, "failed": 0}
                about = {"id": id, "object": "batch", "created_at": int(time.time()), "status": "validating"}
                self.batches[id] = {**about, **given, **nothing, "request_counts": counts}
                return 200, self.batches[id]
            case "GET", ["batches", id] if id in self.batches:
                return 200, self.batches[id]
            case "POST", ["batches", id, "cancel"] if id in self.batches:
                self.batches[id]["status"] = "cancelling"
                return 200, self.batches[id]
            case "GET", ["batches"]:
                query = parse_qs(urlsplit(asked.path).query)
                ids = sorted(self.batches, reverse=True)
                if "after" in query:
                    ids = ids[ids.index(query["after"][0]) + 1 :]
                page = ids[: min(2, int(query["limit"][0]))]  # two at a time, so that there are pages
                data = [self.batches[id] for id in page]
                return 200, {"object": "list", "data": data, "has_more": len(page) < len(ids)}
        return 404, {"error": {"message": f"No such thing: {path}"}}


def parts(asked: Asked) -> dict[str, Any]:
    """Fields of a form; of a file, its bytes and its name."""
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    form: dict[str, Any] = {}
    message = email.message_from_bytes(head + asked.body)
    for part in message.get_payload():
        assert isinstance(part, Message)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(name, str)
        assert isinstance(content, bytes)
        assert name not in form
        filename = part.get_filename()
        form[name] = content.decode() if filename is None else (content, filename)
    return form
