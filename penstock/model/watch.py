"""Finds the first part of a model whose output is not finite, while the model computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first bad output."""

    part: str
    """In words: "the mlp of layer 7". Layers count from 0, as in the names of a checkpoint's tensors."""
    row: int
    """Flat row of the step, the first of those that are bad there."""
    value: str
    """NaN or inf."""


class Watch:
    """Looks at outputs in the order in which they are computed, and keeps the first bad one.

    CausalLM.forward shows it, where one is given, the embedding, both halves of each layer, the sum that each
    layer leaves in the residual stream, and the final norm. "The sum of layer 7" is bad alone where its parts
    are finite: the residual stream has overflowed. A norm belongs to the half that it feeds.
    """

    def __init__(self) -> None:
        self.found: NonFinite | None = None

    def look(self, part: str, out: torch.Tensor, first_row: int = 0) -> None:
        """Check an output [T, …] whose row 0 is the step's row `first_row`."""
        if self.found is not None:
            return
        rows = out.reshape(out.shape[0], -1)
        bad = rows.isfinite().all(-1).logical_not()
        if bool(bad.any()):
            row = int(bad.to(torch.uint8).argmax())
            value = "NaN" if bool(rows[row].isnan().any()) else "inf"
            self.found = NonFinite(part, first_row + row, value)
