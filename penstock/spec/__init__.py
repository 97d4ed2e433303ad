"""`penstock.yaml`, typed: what runs, where, for whom, and at what price.

    load (YAML with lines) ─▶ model (pydantic) ─▶ references checked ─▶ Spec

The gateway, `penstock up`, and what plans, compiles and simulates read the same file through this room. It
knows no network, no clock and no engine; a Spec is frozen.
"""

from .load import SpecError, load, loads
from .model import Spec

__all__ = ["Spec", "SpecError", "load", "loads"]
