"""From the flags of `penstock eval` to the sides it compares: servers, and engines with checked flags."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock import __version__
from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.evaluate.sides import Local, Price, Remote, Side
    from penstock.gateway.local.command import Command

_FULL = "none"
"""The scheme that is none."""
_ENGINE_FLAGS = ("--host", "--port", "--served-model-name", "--uds", "--api-key", "--gateway-key")


def sides(args: argparse.Namespace) -> tuple[Side, tuple[Side, ...]]:
    """The baseline and its candidates. Raises StartupError."""
    from penstock.evaluate.sides import Side

    if args.quantization is not None:
        return _quantized(args)
    if args.model is not None:
        raise StartupError(
            f"{args.model} is not told what to do.",
            advice="Write --quantization int4,int8 before it, or --baseline and --candidate.",
        )
    if args.baseline is None or not args.candidate:
        raise StartupError(
            "Who is compared is not said.",
            advice="Write --baseline URL|MODEL --candidate URL|MODEL, or --quantization int4,int8 MODEL.",
        )
    price = _prices(args)
    place = _place(
        args.baseline, "baseline", args.baseline_model, f"{args.engine_flags} {args.baseline_flags}"
    )
    baseline = Side(
        name="baseline",
        where=place,
        body=args.body | args.baseline_body,
        price=price(args.baseline_price, place),
    )
    candidates = []
    for number, said in enumerate(args.candidate, 1):
        place = _place(said, "candidate", args.candidate_model, f"{args.engine_flags} {args.candidate_flags}")
        candidates.append(
            Side(
                name="candidate" if len(args.candidate) == 1 else f"candidate {number}",
                where=place,
                body=args.body | args.candidate_body,
                price=price(args.candidate_price, place),
            )
        )
    return baseline, tuple(candidates)


def _quantized(args: argparse.Namespace) -> tuple[Side, tuple[Side, ...]]:
    """MODEL in full precision, and by each scheme."""
    from penstock.engine.config import EngineConfig
    from penstock.evaluate.sides import Side

    if args.baseline or args.candidate:
        raise StartupError(
            "--quantization compares one model with itself.", advice="Leave --baseline and --candidate out."
        )
    if args.model is None:
        raise StartupError(
            "--quantization needs a model.", advice="Write penstock eval --quantization int8 MODEL."
        )
    known = next(
        field.metadata["choices"]
        for field in EngineConfig.__dataclass_fields__.values()
        if field.name == "quantization"
    )
    schemes = [scheme.strip() for scheme in args.quantization.split(",")]
    for scheme in schemes:
        if scheme not in known or scheme == _FULL:
            others = ", ".join(each for each in known if each != _FULL)
            raise StartupError(
                f"--quantization: the engine has no scheme {scheme!r}.", param="--quantization",
                advice=f"It has {others}, made while weights are read; a checkpoint that is already "
                "quantised goes by --candidate URL.",
            )  # fmt: skip
    if len(set(schemes)) < len(schemes):
        raise StartupError(
            f"--quantization {args.quantization} names a scheme twice.", advice="Name each once."
        )
    price = _prices(args)
    found = []
    for scheme in (_FULL, *schemes):
        own = args.baseline_flags if scheme == _FULL else args.candidate_flags
        place = _local(args.model, f"{args.engine_flags} {own} --quantization {scheme}", "--quantization")
        said = args.baseline_price if scheme == _FULL else args.candidate_price
        body = args.body | (args.baseline_body if scheme == _FULL else args.candidate_body)
        name = "baseline" if scheme == _FULL else scheme
        found.append(Side(name=name, where=place, body=body, price=price(said, place)))
    return found[0], tuple(found[1:])


def judge(args: argparse.Namespace) -> Side | None:
    """Who grades where a grader is a judge."""
    from penstock.evaluate.sides import Side

    if args.judge is None:
        return None
    return Side(name="judge", where=_place(args.judge, "judge", args.judge_model, args.engine_flags))


def _place(said: str, name: str, model: str | None, flags: str) -> Remote | Local:
    from penstock.evaluate.sides import Remote, api_root, is_url

    if not is_url(said):
        if model is not None:
            raise StartupError(
                f"--{name} {said} is a model already.", advice=f"Leave --{name}-model out, or give a URL."
            )
        return _local(said, flags, f"--{name}")
    key = os.environ.get(f"PENSTOCK_{name.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Remote(api_root(said, f"--{name}"), model, headers)


def _local(model: str, flags: str, flag: str) -> Local:
    """A model for which an engine is started; its flags are understood, and its files are here."""
    from penstock.engine.config import EngineConfig
    from penstock.evaluate.sides import Local
    from penstock.model.hub import resolve_model
    from penstock.server.config import ServerConfig

    from .flags import Parser, make_config
    from .serve import add_arguments as serve_arguments
    from .serve import check_files, need_engine

    need_engine()
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise StartupError(f"{flag}: its flags {flags.strip()!r} cannot be split: {error}.") from None
    for word in words:
        if word.partition("=")[0].replace("_", "-") in _ENGINE_FLAGS:
            raise StartupError(f"{flag}: {word} is chosen here.", advice="Leave it out.")
    parser = Parser(prog=f"penstock eval: {flag} {model}")
    serve_arguments(parser)
    parsed = parser.parse_args([model, *words])
    config: EngineConfig = make_config(EngineConfig, parsed)
    check_files(config, make_config(ServerConfig, parsed))
    weights = resolve_model(model)
    identity = {
        "weights": str(weights),
        "model": model,
        "files": _files(weights),
        "flags": words,
        "penstock": __version__,
    }
    return Local(model, partial(_command, model, tuple(words)), identity)


def _command(model: str, flags: Sequence[str], port: int, key: str) -> Command:
    from penstock.gateway.local.command import Command

    return Command(
        arguments=(
            sys.executable, "-m", "penstock", "serve", model, "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", model, "--disable-uvicorn-access-log", *flags,
        ),
        # no other key opens it
        environment={"PENSTOCK_GATEWAY_KEY": key, "PENSTOCK_API_KEY": "", "VLLM_API_KEY": ""},
        probe="/readyz",
        alive="/livez",
    )  # fmt: skip


def _files(folder: Path) -> str:
    """A hash of what the folder's files are called, how long they are and when they were written: the bytes
    themselves, gigabytes of weights, would take longer than the evaluation."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:24]


def _prices(args: argparse.Namespace) -> Any:
    """A function of a flag's text and a place; the flag wins over the spec."""
    from penstock.evaluate.prices import price_in, read_price
    from penstock.evaluate.sides import Price

    spec = None
    if args.spec is not None:
        from penstock.spec.load import load

        spec = load(args.spec)

    def price(said: str | None, place: Remote | Local) -> Price:
        if said is not None:
            try:
                return read_price(said)
            except ValueError as error:
                raise StartupError(f"The price {said!r} cannot be read: {error}.") from None
        return Price() if spec is None else price_in(spec, place)

    return price
