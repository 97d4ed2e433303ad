"""Configurations of agents and clients in YAML, JSON and TOML; the files of batches; vLLM's own `--config`.

A mapping is taken for one of a model's calls if it names a model and says how to sample; what only mentions
one is left alone.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import engines
from .calls import LIMITS, LOOP, TRAINING, UNBOUNDED, body_findings, limit_problem
from .engines import KEY, LONG, LONG_CONTEXT
from .finding import Finding, Rule, Severity, Word
from .flags import vllm
from .sources import Document
from .words import Place, secret_in

AGENT = Rule(
    "agent-unbounded",
    Severity.WARNING,
    "an agent's configuration without a bound on its turns",
    "It may call tools and the model for as long as it likes, each time with a longer context.",
    "Give max_turns, max_iterations or max_steps, and max_tokens for each answer.",
)
RULES = (AGENT,)

MODEL = ("model", "model_name", "modelName", "model_id", "deployment_name")
_SAMPLING = frozenset(
    "temperature top_p topP top_k messages system_prompt systemPrompt instructions frequency_penalty "
    "presence_penalty response_format tool_choice reasoning_effort".split()
)
_TURNS = re.compile(
    r"^max_?(iterations?|iter|turns?|steps?|rounds?|consecutive_auto_reply|loops?)$|^recursion_limit$", re.I
)
CONTEXT = frozenset("num_ctx max_model_len max-model-len context_length n_ctx".split())
_AGENT = re.compile(r"(^|_|-)agents?($|_|-)", re.IGNORECASE)
_MANY_TURNS = 1000
_MOST_DEPTH = 30
_MOST_LINES = 100_000
_NOT_OURS = frozenset(
    ("pools", "routes", "upstreams", "services", "openapi", "swagger", "$schema", "choices", "usage")
)
"""Keys of documents that are something else: a spec of Penstock's, Compose, schemas, answers."""

Keys = tuple[str | int, ...]


def rules_of(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """What is wrong with the calls that a document configures."""
    data = document.data
    if isinstance(data, dict):
        if "apiVersion" in data or _NOT_OURS & set(data):
            return
        if _is_vllm(data):
            yield from _vllm(document, data)
            return
    for keys, rule, what in _walk(data):
        yield document.finding(rule, what, *keys)


def examine_toml(text: str, path: str, *, line: int = 1) -> Iterator[Finding]:
    """What is wrong with a TOML file; lines are those where the key stands first."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return
    if "build-system" in data or "package" in data:  # of Python or Rust
        return
    lines = text.split("\n")
    for keys, rule, what in _walk(data):
        names = [str(key) for key in keys if isinstance(key, str)]
        yield Finding(rule, path, line + _toml_line(lines, names), 1, what)


def examine_lines(text: str, path: str, *, line: int = 1) -> Iterator[Finding]:
    """What is wrong with the requests of a batch (JSONL)."""
    for number, row in enumerate(text.split("\n")[:_MOST_LINES]):
        if '"body"' not in row or '"url"' not in row:
            continue
        try:
            data = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict) and isinstance(data.get("body"), dict) and isinstance(data.get("url"), str):
            for rule, what, fix in body_findings(data["body"], data["url"]):
                yield Finding(rule, path, line + number, 1, what, fix)


def _walk(data: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Rule, str]]:
    """Where, which rule, and what."""
    stack: list[tuple[Keys, Any]] = [(keys, data)]
    while stack:
        where, value = stack.pop()
        if len(where) > _MOST_DEPTH:
            continue
        if isinstance(value, list):
            stack += [((*where, index), each) for index, each in enumerate(value)]
            if where and where[-1] == "messages":
                continue
        elif isinstance(value, Mapping):
            yield from _mapping(where, value)
            stack += [((*where, str(key)), each) for key, each in value.items()]
        elif isinstance(value, str) and (start := secret_in(value)) is not None:
            yield where, KEY, f"It looks like a key: {start}"


def _mapping(where: Keys, data: Mapping[str, Any]) -> Iterator[tuple[Keys, Rule, str]]:
    model = next((data[name] for name in MODEL if isinstance(data.get(name), str)), None)
    says = bool(_SAMPLING & set(data))
    if model is not None and "embed" not in model.lower() and "choices" not in data and "object" not in data:
        bounds = [name for name in LIMITS if name in data]
        if not bounds and says:
            yield where, UNBOUNDED, "This configuration of a model has no max_tokens."
        for bound in bounds:
            if problem := limit_problem(data[bound]):
                yield (*where, bound), UNBOUNDED, f"{bound} is {problem}."
    turns = [name for name in data if _TURNS.match(name)] if not TRAINING & set(data) else []
    for name in turns:
        value = data[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (is_number and (value < 0 or value >= _MANY_TURNS)):
            yield (*where, name), LOOP, f"{name}: {'null' if value is None else value} bounds nothing."
    named = any(isinstance(key, str) and _AGENT.search(key) for key in where[-2:])
    if not turns and named and "tools" in data and (model is not None or "llm" in data):
        yield where, AGENT, "This agent has tools, and no bound on its turns."
    for name in CONTEXT & set(data):
        value = data[name]
        is_limit = isinstance(value, int) and not isinstance(value, bool) and value >= LONG_CONTEXT
        if is_limit and (name == "num_ctx" or model is not None):
            yield (*where, name), LONG, f"{name}: {value:,} tokens."


def _is_vllm(data: Mapping[str, Any]) -> bool:
    """Whether a mapping is a file for `vllm serve --config`: flags without their dashes."""
    names = {f"--{str(key).replace('_', '-')}" for key in data}
    telling = {"--max-model-len", "--tensor-parallel-size", "--max-num-seqs", "--served-model-name"}
    return "--model" in names and bool(telling & names) and len(names & set(vllm().names)) * 2 >= len(names)


def _vllm(document: Document, data: Mapping[str, Any]) -> Iterator[Finding]:
    words: list[Word] = []
    for key, value in data.items():
        line, column = document.at(key)
        if value is False:
            words.append(Word(f"--no-{key}", line, column))
            continue
        words.append(Word(f"--{key}", line, column))
        if value is True or value is None:
            continue
        given = document.word(key)
        text = json.dumps(value) if isinstance(value, dict | list) else given.text
        words.append(Word(text, given.line, given.column))
        yield from engines.key_in(words[-1], document.path)
    yield from engines.vllm(words, document.path, Place.POD, {})


def _toml_line(lines: Sequence[str], names: Sequence[str]) -> int:
    """The line of the last key, behind those of the tables that it is in; 0 if it is not found."""
    found = 0
    for name in names:
        pattern = re.compile(
            rf"^\s*\[+\s*(?:.*\.)?[\"']?{re.escape(name)}[\"']?\s*(?:\.|\])|^\s*[\"']?{re.escape(name)}[\"']?\s*[=.]"
        )
        at = next((number for number in range(found, len(lines)) if pattern.search(lines[number])), None)
        if at is None:
            continue
        found = at
    return found
