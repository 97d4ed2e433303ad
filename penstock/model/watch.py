"""Finds the first part of a model whose output is not finite, while the model computes.

Knows that layers keep their two halves as `_attention` and `_mlp`; a layer that does not is watched as a
whole. Nothing of it is there in a normal step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first bad output."""

    part: str
    """In words: "the mlp of layer 7". Layers count from 0, as in the names of a checkpoint's tensors."""
    layer: int | None
    """Its number, if it lies in one."""
    row: int
    """Flat row of the step, the first of those that are bad there."""
    value: str
    """NaN or inf."""


class Watch:
    """Looks at outputs in the order in which they are computed, and keeps the first bad one."""

    def __init__(self) -> None:
        self.found: NonFinite | None = None

    def look(self, part: str, out: torch.Tensor, layer: int | None = None, first_row: int = 0) -> None:
        """Check an output [T, …] whose row 0 is the step's row `first_row`."""
        if self.found is not None:
            return
        rows = out.reshape(out.shape[0], -1)
        bad = rows.isfinite().all(-1).logical_not()
        if bool(bad.any()):
            row = int(bad.to(torch.uint8).argmax())
            value = "NaN" if bool(rows[row].isnan().any()) else "inf"
            self.found = NonFinite(part, layer, first_row + row, value)

    @contextmanager
    def inside(self, layer: object, number: int) -> Iterator[None]:
        """While it lasts, the halves of this layer are looked at, too."""
        attributes: dict[str, Any] = getattr(layer, "__dict__", {})
        halves: dict[str, Any] = {
            name: attributes[name] for name in ("_attention", "_mlp") if name in attributes
        }
        try:
            for name, half in halves.items():
                attributes[name] = self._watched(half, f"the {name[1:]} of layer {number}", number)
            yield
        finally:
            attributes.update(halves)

    def _watched(self, half: Any, part: str, number: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = half(*args, **kwargs)
            self.look(part, out, number)
            return out

        return call
