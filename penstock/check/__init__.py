"""What is wrong with manifests, queries, dashboards, commands and code, before anyone runs them.

    paths ─▶ sources (what kind of text is it, which line is what) ─▶ rules ─▶ findings ─▶ text, JSON, SARIF

A rule sees texts, never a cluster. It names the line, says why it hurts, and what to write instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .finding import Finding, Rule, Severity

if TYPE_CHECKING:
    from .run import Options, check, check_sources, check_text, rules

__all__ = ["Finding", "Options", "Rule", "Severity", "check", "check_sources", "check_text", "rules"]


def __getattr__(name: str) -> Any:
    """Import on first use: `penstock compile` asks of one room, about flags, and all rules are a tenth of a
    second."""
    if name in __all__:
        from . import run

        return getattr(run, name)
    raise AttributeError(f"module 'penstock.check' has no attribute {name!r}")
