"""The `penstock` command: parse, call, print. Every sub-command's work is elsewhere.

Imports are late, so that `penstock --help` answers at once and `penstock chat` needs no engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from penstock import __version__
from penstock.core.errors import PenstockError
from penstock.observe import logs

from .flags import Parser

COMMANDS = {
    "serve": "serve a model: an OpenAI-compatible API on an engine of our own",
    "chat": "talk to any OpenAI-compatible server from the terminal",
    "bench": "measure any OpenAI-compatible server, or the start of ours",
    "eval": "compare two models on a set of examples: quality with its interval, cost and latency",
    "tune": "find the flags with which a running engine serves most requests within their targets",
    "doctor": "examine a running engine, and its log: what is wrong, and what to do",
    "keys": "make, list, change, rotate and revoke the keys of a gateway",
    "ledger": "read what a gateway has written of each request",
    "costs": "what requests cost, by whom and for what, and whether self-hosting pays",
    "replay": "run a recorded step log again and compare the plans",
    "plan": "how many of which device a model or a penstock.yaml needs, what that gives, and what it costs",
    "compile": "write what runs a penstock.yaml: Kubernetes manifests, a kustomization, a chart",
    "check": "find what is wrong with manifests, queries, commands, code and specs, before they run",
    "init": "write a commented penstock.yaml that `penstock up` runs as it is",
    "up": "run what a penstock.yaml describes on this machine: engines, and the gateway in front of them",
    "gateway": "one governed URL in front of the upstreams of a penstock.yaml",
    "batch": "run a file of requests, as OpenAI's batches have them, against a gateway or an engine",
    "run-batch": "run a file of requests on an engine of its own, without a server",
    "apply": "apply a bundle to a cluster through kubectl, and say why its pods do not start",
    "models": "a store of weights: pulled once, verified, with snapshots and a way back",
    "rollout": "move a route's requests to another model step by step, watched; or back",
    "schema": "print the JSON Schema of penstock.yaml, for editors",
}

_MODULES = {"eval": "evaluate", "run-batch": "run_batch"}
"""Where a module has another name than its command, which Python's own functions have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if logs.wants_json(arguments):  # from the first word on
        logs.configure("api", format="json")
    command = next((word for word in arguments if not word.startswith("-")), None)
    parser = Parser(
        prog="penstock",
        description="Self-hosted serving for open-weight language models: predictable, provable, priced.",
    )
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=_sentence(summary))
        if name == command:
            load(name).add_arguments(sub)
    args = parser.parse_args(arguments)
    try:
        status: int = load(args.command).run(args)
        return status
    except PenstockError as error:
        logs.complain(f"penstock {args.command}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output has gone, as in `penstock … | head`
        sys.stderr.close()
        return 141


def load(name: str) -> argparse.Namespace:
    """The module behind a sub-command; it has add_arguments and run."""
    import importlib

    return importlib.import_module(f"penstock.cli.{_MODULES.get(name, name)}")  # type: ignore[return-value]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main())
