"""Batches as they go on: each has a task, and their lines share so many places in the engine.

    validating ─▶ in_progress ─▶ finalizing ─▶ completed
         └▶ failed      ├─▶ cancelling ─▶ cancelled   what was answered until then is in the output
                        └─▶ finalizing ─▶ expired

A start goes on where the last one ended: lines with a result are not asked again. It knows lines and states;
what a request means is the application's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from .ask import Answer, ask
from .lines import BadLine, answered, checked, numbered, unasked
from .store import BatchStore, File
from .usage import usage_of

logger = logging.getLogger("penstock.server")

_READ = 64
"""Lines that are read at once."""
_LONGEST_WAIT = 30.0
"""Seconds between two tries of a line that the server has no place for."""
LIVE = ("validating", "in_progress", "finalizing", "cancelling")
Told = dict[str, Any]


class _Stopped(Exception):
    """The engine takes no more: the next start goes on."""


class BatchWorker:
    """All batches of a server."""

    def __init__(
        self,
        store: BatchStore,
        app: ASGIApp,
        *,
        urls: Collection[str],
        concurrency: int,
        most_lines: int,
        wall: Callable[[], float],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Nothing runs yet.

        Args:
            app: answers requests whose scope says whose they are (`scope_of`).
            urls: what lines may ask.
            concurrency: lines at a time, of all batches.
            most_lines: of a batch.
            wall: Unix time, seconds.
            stopped: whether the engine takes no requests any more.
        """
        self.store = store
        self.urls = urls
        self._app = app
        self._places = asyncio.Semaphore(concurrency)
        self._most = most_lines
        self._wall = wall
        self._stopped = stopped
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        """The part of a batch's task that may be cancelled by its owner."""
        self.told: dict[str, Told] = {}
        """Batches that go on, as they are now."""

    def start(self) -> None:
        """Go on with what the last start has left."""
        self.store.delete_expired(self._wall())
        for stored in self.store.live():
            self.begin(stored.told, stored.owner)

    def begin(self, told: Told, owner: str) -> None:
        """Have a batch go on, which is in the store."""
        self.told[told["id"]] = told
        task = asyncio.get_running_loop().create_task(self._run(told, owner))
        self._tasks[told["id"]] = task

    async def cancel(self, id: str, owner: str) -> None:
        """Ask nothing more of this one, not after a crash either."""
        told = self.told[id]
        if told["status"] in ("validating", "in_progress"):
            told |= {"status": "cancelling", "cancelling_at": int(self._wall())}
            await asyncio.to_thread(self.store.save, dict(told), owner, live=True)
        if (task := self._asking.get(id)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop where it is. The next start goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.store.close()

    async def settled(self, id: str) -> None:
        """Wait until a batch goes on no more."""
        with suppress(KeyError):
            await asyncio.wait([self._tasks[id]])

    async def _run(self, told: Told, owner: str) -> None:
        id = told["id"]
        try:
            if told["status"] in ("validating", "in_progress"):
                await self._ask_all(told, owner)
            if told["status"] != "failed":
                await self._finish(told, owner)
        except _Stopped:
            logger.info("batch %s waits for the next start of the server", id)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("batch %s cannot go on; the next start of the server tries again", id)
        finally:
            self._tasks.pop(id, None)
            self.told.pop(id, None)

    async def _ask_all(self, told: Told, owner: str) -> None:
        """Until every line has a result, its owner cancels it, or its time is over."""
        asking = asyncio.ensure_future(self._lines(told, owner))
        self._asking[told["id"]] = asking
        try:
            async with asyncio.timeout(max(told["expires_at"] - self._wall(), 0)):
                await asking
        except TimeoutError:
            told |= {"status": "finalizing", "expired_at": int(self._wall())}
        except asyncio.CancelledError:
            if told["status"] != "cancelling":  # the server ends
                asking.cancel()
                raise
        finally:
            del self._asking[told["id"]]

    async def _lines(self, told: Told, owner: str) -> None:
        id = told["id"]
        path = self.store.contents / told["input_file_id"]
        done = await asyncio.to_thread(self.store.done, id)
        counts = told["request_counts"]
        if told["status"] == "validating":
            total = await asyncio.to_thread(_count, path, self._most)
            if not 1 <= total <= self._most:
                await self._fail(told, owner, total)
                return
            counts["total"] = total
            told |= {"status": "in_progress", "in_progress_at": int(self._wall())}
            await asyncio.to_thread(self.store.save, told, owner, live=True)
        counts["completed"] = sum(not failed for failed in done.values())
        counts["failed"] = sum(done.values())
        try:
            await self._each(told, owner, path, done)
        except BaseExceptionGroup as group:
            if group.subgroup(_Stopped) is not None:
                raise _Stopped from None
            raise

    async def _each(self, told: Told, owner: str, path: Path, done: Collection[int]) -> None:
        """Ask what has no result."""
        id = told["id"]
        with path.open("rb") as file:
            lines = checked(file, (told["endpoint"],))
            async with asyncio.TaskGroup() as group:
                while some := await asyncio.to_thread(lambda: list(islice(lines, _READ))):
                    for number, line in some:
                        if number in done:
                            continue
                        if isinstance(line, BadLine):
                            await self._keep(told, number, unasked(_id(id, number), number, line), True)
                            continue
                        await self._places.acquire()
                        asked = group.create_task(self._line(told, owner, number, line.custom_id, line.body))
                        asked.add_done_callback(lambda _: self._places.release())

    async def _line(self, told: Told, owner: str, number: int, custom_id: str, body: bytes) -> None:
        answer = await self._answer(told["endpoint"], body, owner)
        text = answered(_id(told["id"], number), custom_id, answer.status, answer.request_id, answer.body)
        await self._keep(told, number, text, answer.status != 200)

    async def _answer(self, url: str, body: bytes, owner: str) -> Answer:
        """What is not said for want of a place is asked again."""
        wait = 0.5
        while True:
            answer = await ask(self._app, url, body, **scope_of(owner))
            if answer.status != 503:
                return answer
            if self._stopped():
                raise _Stopped
            await asyncio.sleep(min(answer.retry_after or wait, _LONGEST_WAIT))
            wait = min(2 * wait, _LONGEST_WAIT)

    async def _keep(self, told: Told, number: int, text: bytes, failed: bool) -> None:
        # a cancellation must not part what is on disk from what is counted
        await asyncio.shield(self._keep_whole(told, number, text, failed))

    async def _keep_whole(self, told: Told, number: int, text: bytes, failed: bool) -> None:
        if await asyncio.to_thread(self.store.add_result, told["id"], number, text, failed=failed):
            told["request_counts"]["failed" if failed else "completed"] += 1

    async def _fail(self, told: Told, owner: str, total: int) -> None:
        code, message = (
            ("empty_file", "The input file has no lines.")
            if total == 0
            else ("too_many_tasks", f"The input file has more than {self._most} lines.")
        )
        problem = {"code": code, "message": message, "param": None, "line": None}
        told |= {
            "status": "failed",
            "failed_at": int(self._wall()),
            "errors": {"object": "list", "data": [problem]},
        }
        await asyncio.to_thread(self.store.save, told, owner, live=False)

    async def _finish(self, told: Told, owner: str) -> None:
        """Write the results down. It may be done twice with the same outcome: ids follow from the batch's."""
        id, store = told["id"], self.store
        ended = "completed"
        if told["status"] == "cancelling":
            ended = "cancelled"
        elif told["expired_at"] is not None:
            ended = "expired"
        if ended != "cancelled":
            told |= {"status": "finalizing", "finalizing_at": told["finalizing_at"] or int(self._wall())}
        done = await asyncio.to_thread(store.done, id)
        counts = told["request_counts"]
        counts["failed"] = sum(done.values())
        counts["completed"] = len(done) - counts["failed"]
        await asyncio.to_thread(store.save, told, owner, live=True)
        if ended != "completed":
            await asyncio.to_thread(self._give_up, told, ended)
        told["usage"] = await asyncio.to_thread(
            lambda: usage_of(text for _, text in store.results(id, False))
        )
        for kind, failed in (("output", False), ("error", True)):
            if not counts["failed" if failed else "completed"]:
                continue
            told[f"{kind}_file_id"] = f"file-{id.removeprefix('batch_')}-{kind}"
            now = int(self._wall())
            after = told.get("output_expires_after")
            file = File(
                id=told[f"{kind}_file_id"],
                owner=owner,
                purpose="batch_output",
                filename=f"{id}_{kind}.jsonl",
                bytes=0,
                created_at=now,
                expires_at=None if after is None else now + int(after["seconds"]),
            )
            await asyncio.to_thread(store.add_lines, file, id, failed=failed)
        told |= {"status": ended, f"{ended}_at": told[f"{ended}_at"] or int(self._wall())}
        await asyncio.to_thread(store.save, told, owner, live=False)

    def _give_up(self, told: Told, ended: str) -> None:
        """Lines without a result get one that says why."""
        done = self.store.done(told["id"])
        why = f"batch_{ended}", f"the batch was {ended} before this line had an answer."
        path = self.store.contents / told["input_file_id"]
        with path.open("rb") as file:
            for number, line in checked(file, (told["endpoint"],)):
                if number in done:
                    continue
                problem = BadLine(*why, line.custom_id)
                text = unasked(_id(told["id"], number), number, problem)
                if self.store.add_result(told["id"], number, text, failed=True):
                    told["request_counts"]["failed"] += 1


def scope_of(owner: str) -> dict[str, Any]:
    """What a line's scope says: whose it is (as `owner_of` has it), and that nobody waits."""
    kind, _, name = owner.partition(" ")
    headers = [(b"x-penstock-class", b"background")]
    if kind == "tenant":
        headers.append((b"x-penstock-tenant", name.encode("latin-1", "replace")))
    return {"headers": headers, "trusted_key": True, "caller": name if kind == "key" else ""}


def _id(batch: str, number: int) -> str:
    return f"batch_req_{batch.removeprefix('batch_')}_{number}"


def _count(path: Any, most: int) -> int:
    """Lines that are not empty; of far too many, some."""
    with path.open("rb") as file:
        return sum(1 for _ in islice(numbered(file), most + 1))
