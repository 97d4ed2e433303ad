"""Compares the table of vLLM's flags with vLLM itself. Run it with the Python of an installed vLLM:

    PYTHONPATH=. /path/to/vllm/bin/python tools/flags_of_vllm.py

It prints what differs, and ends with 1 if anything does: flags of vLLM that Penstock does not know, flags
whose arity is another, defaults that would be refused without a word on it, and defaults of shared flags. It
is not run in CI, which has no vLLM.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
from typing import Any

from penstock.cli.flags import Parser
from penstock.cli.serve import add_arguments
from penstock.cli.vllm_flags import BY_NAME, OTHERWISE_HERE, THEIR_DEFAULTS, VllmFlag

#: in the table for the sake of command lines that were written for an earlier vLLM
_EARLIER = {"--task", "--disable-frontend-multiprocessing"}
#: what vLLM rewrites before it parses
_REWRITTEN = {"-O"}


def _theirs() -> list[argparse.Action]:
    sys.argv = ["vllm", "serve"]
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def _word(default: Any) -> str:
    """A default as one writes it on the command line."""
    if isinstance(default, enum.Enum):
        default = default.value
    if default is None or default == argparse.SUPPRESS:
        return "None"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple | set):
        return " ".join(map(str, default)) or "[]"
    if isinstance(default, str | int | float):
        return str(default)
    return json.dumps(default) if isinstance(default, dict) and not default else "{}"


def _table(flag: VllmFlag, action: argparse.Action) -> list[str]:
    """How a row of the table differs from vLLM's own action."""
    found = []
    names = {name for name in action.option_strings if not name.startswith("--no-")}
    if names != set(flag.names) - _REWRITTEN:
        found.append(f"{flag.name}: names {sorted(names)} in vLLM, {sorted(flag.names)} here")
    if (action.nargs == 0) != flag.is_switch or (not flag.is_switch and action.nargs != flag.nargs):
        found.append(f"{flag.name}: nargs {action.nargs!r} in vLLM, {flag.nargs!r} here")
    default = _word(action.default)
    given = {"on": True, "off": False}.get(default, default) if flag.is_switch else default
    served = given == "None" or flag.serves(given)
    if served == (flag.name in OTHERWISE_HERE):
        found.append(f"{flag.name}: default {default} is {'served' if served else 'refused'}")
    return found


def main() -> int:
    """Print the differences; 1 if there are any."""
    parser = Parser(prog="penstock serve")
    add_arguments(parser)
    ours = parser._option_string_actions
    found: list[str] = []
    different: dict[str, str] = {}
    actions = _theirs()
    for action in actions:
        for name in action.option_strings:
            if name not in ours and name.replace("--no-", "--") not in ours:
                found.append(f"{name}: unknown here")
        name = next(name for name in action.option_strings if name.startswith("--"))
        if (flag := BY_NAME.get(name)) is not None:
            found += _table(flag, action)
        elif (mine := ours.get(name)) is not None and (default := _word(action.default)) != "None":
            shown = _word(_default(mine.dest))
            if shown != default and not (shown == "None" and default in ("[]", "")):
                different[name] = default
    known = {name for action in actions for name in action.option_strings}
    found += [f"{name}: not vLLM's" for name in sorted(set(BY_NAME) - known - _EARLIER - _REWRITTEN)]
    if different != THEIR_DEFAULTS:
        found.append(f"THEIR_DEFAULTS should be {different}")
    print("\n".join(found) or f"{len(actions)} flags of vLLM, all known")
    return 1 if found else 0


def _default(name: str) -> Any:
    from dataclasses import fields

    from penstock.engine.config import EngineConfig
    from penstock.server.config import ServerConfig

    return next(
        entry.default for cls in (EngineConfig, ServerConfig) for entry in fields(cls) if entry.name == name
    )


if __name__ == "__main__":
    sys.exit(main())
