"""Whether a document is anything that rules know: what no rule reads must not pass for checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from .agents import CONTEXT, MODEL
from .finding import Finding, Rule, Severity
from .sources import Document, Source
from .spec import CORE

INCOMPLETE = Rule(
    "object-incomplete",
    Severity.ERROR,
    "an object without apiVersion or kind",
    "The API server refuses it, kubectl ends at it, and no rule about objects has read it.",
    "Write both, as apiVersion: apps/v1 and kind: Deployment.",
)
UNKNOWN = Rule(
    "file-unknown",
    Severity.ERROR,
    "a named YAML or JSON file is nothing that is checked",
    "It was read and no rule knows what it is: that nothing was found says nothing.",
    "Name Kubernetes objects, a penstock.yaml, Compose, Prometheus rules, a dashboard, or a configuration of "
    "calls.",
)
RULES: tuple[Rule, ...] = (INCOMPLETE, UNKNOWN)

_KIND = re.compile(r"[A-Z][A-Za-z0-9]+")
_TOLD = frozenset(
    # Kubernetes, Kustomize, Helm, Compose and pipelines
    "apiversion kind metadata spec resources patches helmcharts images image services containers command "
    "args env environment entrypoint run jobs steps script volumes ports values replicacount "
    # Prometheus, its adapter, Grafana, scrapes
    "groups rules expr alert record panels dashboard targets seriesquery query scrape_configs "
    # penstock.yaml, beside its sections
    "gateway engine "
    # what configures calls of models, agents and engines, beside what names a model and its context
    "model_list llm temperature top_p topp top_k messages prompt system_prompt systemprompt instructions "
    "max_tokens maxtokens max_completion_tokens api_key apikey api_base base_url agent agents max_turns "
    "max_iterations recursion_limit tools body url".split()
) | {key.lower() for key in (*CORE, *MODEL, *CONTEXT)}
"""Keys, in lower case, one of which whatever is checked has somewhere."""
_DEEPEST = 30


def rules_of(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """Objects that lack one of the two names of their kind."""
    data = document.data
    if not isinstance(data, dict) or not any(isinstance(data.get(key), dict) for key in ("metadata", "spec")):
        return
    version, kind = data.get("apiVersion"), data.get("kind")
    if isinstance(kind, str) and _KIND.fullmatch(kind) and version is None:
        yield document.finding(INCOMPLETE, f"{kind} has no apiVersion.", "kind")
    elif isinstance(version, str) and kind is None:
        yield document.finding(INCOMPLETE, f"An object of {version} has no kind.", "apiVersion")


def examine(source: Source) -> Iterator[Finding]:
    """A file that somebody named, as YAML or JSON, and that is none of what is checked."""
    if not source.named or not source.structured or source.problems:
        return
    if not any(_told(document.data) for document in source.documents):
        what = "It is none of what is checked" if source.documents else "There is nothing in it"
        line, column = source.documents[0].at() if source.documents else (1, 1)
        yield Finding(UNKNOWN, source.path, line, column, f"{what}.")


def _told(data: Any) -> bool:
    stack: list[tuple[Any, int]] = [(data, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > _DEEPEST:
            return True  # whatever it is: it was not looked through
        if isinstance(value, dict):
            if any(key.lower() in _TOLD for key in value):
                return True
            stack += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            stack += [(each, depth + 1) for each in value]
    return False
