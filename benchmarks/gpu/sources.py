"""What a compiled kernel was made of, as a hash: its source with that of all it calls, and its configuration.

Comments and the layout of lines do not count. Needs no Triton: files are read, not imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import tokenize
from pathlib import Path

from penstock.kernels.triton import registry
from penstock.kernels.triton.launch import OPTIONS
from penstock.kernels.triton.registry import Configuration, Kernel

_ROOM = Path(registry.__file__).parent
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def key(kernel: Kernel, configuration: Configuration) -> str:
    """Of one configuration."""
    made_of = (
        source(kernel.module, kernel.function_name),
        list(configuration.signature.items()),
        sorted(configuration.constants.items()),
        configuration.num_warps,
        configuration.num_stages,
        sorted(configuration.divisible),
        OPTIONS,
    )
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:10]


@functools.cache
def source(module: str, function: str) -> str:
    """Of a function and of all that it uses of this room, in the order of their names."""
    wanted, seen = [(module, function)], dict[str, str]()
    while wanted:
        file, name = wanted.pop()
        if name in seen:
            continue
        text, definitions, imports = _module(file)
        seen[name] = _words(ast.get_source_segment(text, definitions[name]) or "")
        used = {node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)}
        wanted += [(file, each) for each in used & definitions.keys()]
        wanted += [(imports[each], each) for each in used & imports.keys()]
    return json.dumps(sorted(seen.items()))


@functools.cache
def _module(name: str) -> tuple[str, dict[str, ast.stmt], dict[str, str]]:
    """(text, definitions by name, modules of this room by the names that are imported from them)"""
    text = (_ROOM / f"{name}.py").read_text()
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            imports |= {each.name: node.module for each in node.names}
    return text, definitions, imports


def _words(text: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(token.string for token in tokens if token.type not in _SILENT)
