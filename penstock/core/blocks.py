"""The KV cache as the scheduler sees it: numbered blocks of `block_size` tokens, and who holds them.

A block is in exactly one of three places:

    free        never filled, or its content is worthless         LIFO stack (the warmest memory first)
    cached      full, unreferenced, found again by its hash       LRU order (oldest is evicted first)
    referenced  held by one or more requests                      reference count > 0

    free + cached + referenced == total                           checked by check()

Prefix index: the hash of a full block covers everything before it, so equal hashes mean equal prefixes:

    h0 = H(salt,  t[0:bs])     h1 = H(h0, t[bs:2bs])     h2 = H(h1, …)

The hash is blake2b-128, keyed by nothing but content and salt: the same in every process and every run. Where
positions stand for something else than their token ids, the content's hash enters, too. It knows nothing of
devices, models or requests; block ids index whatever memory the executor has.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def hash_block(parent: bytes, tokens: Sequence[int], salt: str = "", content: str = "") -> bytes:
    """Chained hash of one full block: 16 bytes over the parent's hash (or the salt) and the token ids.

    content: what else these positions hold.
    """
    digest = blake2b(parent, digest_size=16)
    if not parent:
        digest.update(salt.encode())
        digest.update(b"\0")
    digest.update(array("q", tokens).tobytes())
    if content:
        digest.update(content.encode())
    return digest.digest()


class BlockPool:
    """Reference-counted blocks with a prefix index.

    Args:
        num_blocks: number of blocks of the KV cache.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reset()

    def reset(self) -> None:
        """All blocks are free, and nothing is known of their content."""
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * self.num_blocks
        self._hash_of: list[bytes | None] = [None] * self.num_blocks
        self._index: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Unreferenced blocks that a prefix may still hit."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of blocks that are referenced, 0 to 1."""
        return 1.0 - self.available / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of indexed blocks for these chained hashes, from the first. Takes no references."""
        found = []
        for digest in hashes:
            block = self._index.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are cached, so that taking them lowers `available`."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def share(self, blocks: Sequence[int]) -> None:
        """Take one more reference on each of these blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each; evicts the least recently used cached blocks.

        Raises ValueError when fewer are available: callers check `available` first.
        """
        if count > self.available:
            raise ValueError(f"asked for {count} blocks, {self.available} are available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each block of one request's table.

        The last block goes first, so that the tail of a sequence is evicted before its head, without which
        the tail could not be found again.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Make a referenced, full block findable. The first block of a content wins; a twin stays private."""
        if digest not in self._index and self._hash_of[block] is None:
            self._index[digest] = block
            self._hash_of[block] = digest

    def unregister(self, blocks: Iterable[int]) -> None:
        """Make these blocks unfindable: their content turned out to be worthless."""
        for block in blocks:
            self._forget(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def unregister_all(self) -> None:
        """Make every block unfindable."""
        self.unregister(list(self._index.values()))

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError if an invariant is broken; `tables` are the block tables of all holders."""
        referenced = sum(1 for count in self._references if count > 0)
        free, cached = set(self._free), set(self._cached)
        _require(len(free) == len(self._free), "a block is free twice")
        _require(len(free) + len(cached) + referenced == self.num_blocks, "blocks were lost or doubled")
        _require(not free & cached, "a block is both free and cached")
        for block in range(self.num_blocks):
            count, digest = self._references[block], self._hash_of[block]
            _require(count >= 0, f"block {block} has {count} references")
            _require((count == 0) == (block in free or block in cached), f"block {block} is misplaced")
            _require(block not in free or digest is None, f"free block {block} is indexed")
            _require(block not in cached or digest is not None, f"cached block {block} is not indexed")
            _require(digest is None or self._index.get(digest) == block, f"index misses block {block}")
        _require(
            len(self._index) == sum(digest is not None for digest in self._hash_of),
            "the index has entries without a block",
        )
        if tables is not None:
            held = [0] * self.num_blocks
            for table in tables:
                for block in table:
                    held[block] += 1
            _require(held == self._references, "reference counts differ from the block tables")

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._index[digest]
            self._hash_of[block] = None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"BlockPool: {message}")
