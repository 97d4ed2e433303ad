"""Which steps of decode are recorded as graphs, and what they take of the device: pure arithmetic, so that
the memory table, the planner and the engine say the same."""

from __future__ import annotations

from collections.abc import Sequence

#: Largest graph, if nobody asks for another; as in vLLM. The larger a step, the less its calls matter.
MOST_ROWS = 512
#: Graphs that are captured before the engine is ready: of what a server sees first, and is in a hurry for.
READY_ROWS = 16
#: Bytes of one graph beside its tensors: the driver's record of a thousand calls, attention's map of tasks.
#: An assumption, to be measured; vLLM's take about as much each.
BYTES_EACH = 16 << 20


def decode_sizes(max_num_seqs: int, given: Sequence[int] = (), most: int | None = None) -> tuple[int, ...]:
    """Rows of the graphs to capture, ascending.

    A step takes the next larger graph, and its padding is computed for nothing: so they are not far apart,
    and few, for each costs time and memory. At most 16 of them up to 512 requests.

    Args:
        given: `--cudagraph-capture-sizes`; those over max_num_seqs are of no use, and left out.
        most: `--max-cudagraph-capture-size`.
    """
    largest = min(max_num_seqs, MOST_ROWS if most is None else most)
    if given:
        return tuple(sorted({size for size in given if size <= largest}))
    sizes = {largest, *(size for size in (1, 2, 4, 8) if size <= largest)}
    size = 16
    while size < largest:
        sizes.add(size)
        size += 8 if size < 32 else 16 if size < 64 else 32 if size < 128 else 64 if size < 256 else 128
    return tuple(sorted(sizes)) if largest > 0 else ()


def ready_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Those of them to capture before the engine is ready."""
    return tuple(size for size in sizes if size <= READY_ROWS)


def graph_bytes(sizes: Sequence[int], row_bytes: int, own_bytes: int) -> int:
    """Upper bound of what graphs of these sizes take.

    They share one pool of memory, and are captured from the largest down: a smaller one finds room in what
    the larger one has left. But those that are wanted at once come before the largest of all; and what a
    graph gives out, and what is filled in for it before a replay, stays its own.

    Args:
        row_bytes: activations of one decoding request.
        own_bytes: its logits and block table.
    """
    if not sizes:
        return 0
    rows = max(sizes) + max(ready_sizes(sizes), default=0)
    return rows * row_bytes + sum(sizes) * own_bytes + len(sizes) * BYTES_EACH
