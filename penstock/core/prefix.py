"""Which blocks of a request others may share: its chained hashes, and when they enter the index.

It knows requests and the block pool. Who is scheduled, and whether blocks are there, is not its business.
"""

from __future__ import annotations

from .blocks import BlockPool, hash_block
from .request import Request


class Prefixes:
    """The prefix index as requests see it.

    Args:
        pool: whose blocks are shared.
        enabled: with prefix caching off, only the siblings of one prompt (n > 1) share.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self._pool = pool
        self._enabled = enabled

    def hits(self, request: Request) -> list[int]:
        """Blocks that already hold a prefix of the request; at least one token is left to compute."""
        if not (self._enabled or request.shares):
            return []
        if not request.generated and request.spec.prompt_logprobs_of(request.index) is not None:
            return []  # every prompt position must pass through the model
        if request.spec.pooling is not None and request.spec.pooling.needs_all:
            return []
        full = (len(request.tokens) - 1) // self._pool.block_size
        return self._pool.lookup(self._hashes(request, full)[:full])

    def register(self, request: Request) -> None:
        """Offer the blocks that are full of known tokens, as far as its steps are planned."""
        known = min(request.computed, len(request.tokens)) // self._pool.block_size
        if known <= request.registered or not (self._enabled or request.shares):
            return
        hashes = self._hashes(request, known)
        for index in range(request.registered, known):
            self._pool.register(request.blocks[index], hashes[index])
        request.registered = known

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """The first `count` at least."""
        size, hashes, tokens = self._pool.block_size, request.hashes, request.tokens
        if not hashes and request.leader is not None:  # it has hashed the prompt that they share
            hashes += request.leader.hashes[: min(count, request.prompt_len // size)]
        if count and not hashes:
            hashes.append(hash_block(b"", tokens[:size], self._salt(request), self._content(request, 0)))
        while len(hashes) < count:
            start = len(hashes) * size
            content = self._content(request, start)
            hashes.append(hash_block(hashes[-1], tokens[start : start + size], content=content))
        return hashes

    def _salt(self, request: Request) -> str:
        spec = request.spec
        if self._enabled:
            return spec.salt
        return f"{spec.salt}\0{spec.id}\0{request.index // spec.n}"

    def _content(self, request: Request, start: int) -> str:
        """What the positions of the block that begins at `start` hold besides token ids."""
        end = start + self._pool.block_size
        spans = [
            (span.start - start, span.length, span.digest)
            for span in request.spec.prompt_of(request.index).inputs
            if span.start < end and span.start + span.length > start
        ]
        return repr(spans) if spans else ""
