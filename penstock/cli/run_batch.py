"""`penstock run-batch MODEL -i IN -o OUT`: a file of requests on an engine of its own, without a server.

As vLLM's: flags are those of `penstock serve`, lines those of OpenAI's batches, answers in their order. Both
files may be URLs: the input is fetched before the engine starts, the output is sent when it is whole.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig
from penstock.http.transfer import fetch, is_url, send
from penstock.observe import logs
from penstock.server.config import ServerConfig

from .flags import add_config, add_config_file, add_vllm_flags, make_config
from .serve import check_files, need_engine

if TYPE_CHECKING:
    from penstock.engine.remote import RemoteEngine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two files, and the flags of the engine and of the API."""
    parser.add_argument(
        "-i",
        "--input-file",
        required=True,
        metavar="FILE|URL",
        help="requests (JSONL), as OpenAI's batches have them; a URL is fetched with GET",
    )
    parser.add_argument(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE|URL",
        help="answers; written, or sent with PUT, when all lines have one",
    )
    parser.add_argument(
        "--output-tmp-dir",
        metavar="FOLDER",
        default=".",
        help="where answers stand until they are sent to a URL: the same command goes on from there (.)",
    )
    add_config_file(parser)
    add_config(parser, EngineConfig, "engine")
    add_config(parser, ServerConfig, "server")
    add_vllm_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Ask every line. 0 if all were answered, errors of their own included; 1 if the engine ended before."""
    with ExitStack() as stack:
        source, output = _files(args, stack)
        if is_url(args.output_file) and output.exists():
            print(f"{output} was answered before, and is sent now.", file=sys.stderr)
            status = 0
        else:
            status = _serve(args, source, output)
        if status == 0 and is_url(args.output_file):
            asyncio.run(send(output, args.output_file))
            output.unlink()
        return status


def _files(args: argparse.Namespace, stack: ExitStack) -> tuple[Path, Path]:
    """The files that are read and written here; what is fetched is gone with the stack."""
    source, output = Path(args.input_file), Path(args.output_file)
    if is_url(args.input_file):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-run-batch-"))
        source = Path(folder) / "input.jsonl"
        asyncio.run(fetch(args.input_file, source))
    if is_url(args.output_file):
        # one name for one command, so that another start finds what this one leaves
        about = sha256(f"{args.input_file}\0{args.output_file}".encode()).hexdigest()[:16]
        output = Path(args.output_tmp_dir) / f"run-batch-{about}.jsonl"
    return source, output


def _serve(args: argparse.Namespace, source: Path, output: Path) -> int:
    try:
        with source.open("rb"):
            pass
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"{error.filename}: {error.strerror or error}.", param="--input-file") from error
    engine_config: EngineConfig = make_config(EngineConfig, args)
    server_config: ServerConfig = make_config(ServerConfig, args)
    check_files(engine_config, server_config)
    need_engine()
    level = server_config.uvicorn_log_level.replace("trace", "debug")
    logs.configure("run-batch", level=level, format=server_config.log_format)
    from penstock.engine.remote import RemoteEngine
    from penstock.text.template_pool import pool

    from .api import loop_factory

    engine = RemoteEngine.launch(engine_config, log_level=level, log_format=server_config.log_format)
    try:
        pool().start()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_run(engine, engine_config, server_config, source, output))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        engine.kill()


async def _run(
    engine: RemoteEngine, engine_config: EngineConfig, server_config: ServerConfig, source: Path, output: Path
) -> int:
    from penstock.server.batches.file import application, run_file

    from .api import create

    app, _ = await create(engine, engine_config, server_config)
    try:
        totals = await run_file(application(app), source, output, concurrency=server_config.batch_concurrency)
    finally:
        await engine.close()
    print(
        f"{totals.answered} answered, {totals.failed} with an error, {totals.before} answered before",
        file=sys.stderr,
    )
    if not totals.whole:
        print(
            f"penstock run-batch: the engine has ended; what it answered is in {output}.part, and the same "
            "command goes on from there.",
            file=sys.stderr,
        )
    return 0 if totals.whole else 1
