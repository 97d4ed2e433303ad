"""Containers of one machine: `docker run`, and what Compose and Kubernetes have in common with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from . import flags as tables
from .engines import OPEN
from .finding import Finding, Rule, Severity, Word
from .words import is_unknown, part

LATEST = Rule(
    "image-latest",
    Severity.WARNING,
    "an image without a version",
    "The next pull may bring another engine, with other flags and metrics; replicas differ, and there is "
    "nothing to roll back to.",
    "Name a version that stays, as vllm/vllm-openai:v0.32.0, or a digest.",
)
SHM = Rule(
    "shm-missing",
    Severity.WARNING,
    "an engine's container with 64 MB of shared memory, or with little more",
    "Its processes pass tensors through /dev/shm; with Docker's default it crashes under load, with a bus "
    "error or a failure of NCCL.",
    "Give --shm-size=8g, or --ipc=host.",
)
ENV = Rule(
    "env-not-read",
    Severity.ERROR,
    "a variable that the engine does not read",
    "The setting is ignored in silence, and the engine runs with its default.",
    'Give it as a flag; in Kubernetes, args may refer to it: "--max-num-seqs=$(MAX_NUM_SEQS)".',
)
CHART = Rule(
    "chart-unpinned",
    Severity.NOTE,
    "a Helm chart without a version",
    "The next install may be another release, with other values.",
    "Give --version.",
)
RULES = (LATEST, SHM, ENV, CHART)

_ENTRYPOINTS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"(^|/)vllm-(openai|cpu-release-repo|tpu|rocm)\b"), ("vllm", "serve")),
    (re.compile(r"(^|/)vllm/vllm-openai\b"), ("vllm", "serve")),
    (re.compile(r"(^|/)penstock(-cpu|-cuda)?\b"), ("penstock",)),
)
"""Images → what their arguments are given to."""
_SERVING = re.compile(
    r"(^|/)(vllm|penstock|text-generation-inference|sglang|ollama|localai|tritonserver|tgi|llama\.cpp)\b"
)
_SWITCHES = frozenset(
    "-d -i -t -P -q --detach --interactive --tty --rm --init --privileged --read-only --publish-all "
    "--no-healthcheck --oom-kill-disable --sig-proxy --quiet --disable-content-trust --help --use-api-socket "
    "--tls --replace --no-hosts".split()
)
"""Of `docker run`; all others take a value."""
_TAG = re.compile(r":(latest|main|master|nightly|dev|edge|stable)$")
_NOT_FLAGS = frozenset(("HF_TOKEN", "HEADLESS", "CONFIG", "SEED", "HOST", "PORT"))
"""Names of flags that are variables of something else, too."""


@dataclass(slots=True)
class Run:
    """A `docker run`."""

    image: Word
    command: Sequence[Word] = ()
    entrypoint: str | None = None
    environment: dict[str, Word] = field(default_factory=dict)
    """Name → `NAME=value` as it stands."""
    options: dict[str, list[Word]] = field(default_factory=dict)


def docker_run(words: Sequence[Word]) -> Run | None:
    """The parts of a `docker run`, after `run`; None if there is no image."""
    options: dict[str, list[Word]] = {}
    index = 0
    while index < len(words):
        word = words[index]
        text = word.text
        index += 1
        if not text.startswith("-") or text == "-":
            run = Run(word, words[index:], options=options)
            entry = options.get("--entrypoint")
            run.entrypoint = entry[-1].text if entry else None
            for each in (*options.get("-e", ()), *options.get("--env", ())):
                run.environment[each.text.partition("=")[0]] = each
            return run
        option, equals, value = text.partition("=")
        if equals and text.startswith("-"):
            options.setdefault(option, []).append(part(word, len(option) + 1, value))
        elif text in _SWITCHES or (not text.startswith("--") and set(text[1:]) <= set("ditPq")):
            options.setdefault(text, [])
        elif is_unknown(text):
            continue
        elif not text.startswith("--") and len(text) > 2:  # -p8000:8000, -itp 8000:8000
            letters = text[1:].lstrip("ditPq")
            if len(letters) == 1:
                if index < len(words):
                    options.setdefault(f"-{letters}", []).append(words[index])
                index += 1
            else:
                options.setdefault(f"-{letters[:1]}", []).append(
                    part(word, len(text) - len(letters) + 1, letters[1:])
                )
        elif index < len(words):
            options.setdefault(text, []).append(words[index])
            index += 1
    return None


def of_run(run: Run, path: str) -> Iterator[Finding]:
    """What is wrong with how a container is started."""
    yield from image(run.image, path)
    engine = engine_of(run.image.text)
    if engine is None:
        return
    yield from environment(run.environment.items(), [word.text for word in run.command], path)
    if engine != "vllm":
        return
    if not any(name in run.options for name in ("--shm-size", "--ipc")) and not _mounts_shm(run.options):
        yield _finding(SHM, path, run.image, "There is neither --shm-size nor --ipc.")
    keyed = "VLLM_API_KEY" in run.environment or any(
        word.text.startswith("--api-key") for word in run.command
    )
    published = [word for name in ("-p", "--publish") for word in run.options.get(name, ())]
    for port in published if not keyed and "--env-file" not in run.options else ():
        if published_to_all(port.text):
            yield _finding(
                OPEN, path, port, f"Port {port.text} is published on all addresses; there is no key."
            )
            break


def published_to_all(port: str) -> bool:
    """Whether `8000:8000` is reached from outside; `127.0.0.1:8000:8000` is not."""
    if is_unknown(port):
        return False
    host = port.rpartition(":")[0].rpartition(":")[0]
    return host in ("", "0.0.0.0", "[::]")


def image(word: Word, path: str) -> Iterator[Finding]:
    """Whether an image has a version."""
    text = word.text
    if is_unknown(text) or "@sha256:" in text or text == "scratch":
        return
    if found := _TAG.search(text):
        yield _finding(LATEST, path, word, f"{text} is another image tomorrow: {found[1]} is no version.")
    elif ":" not in text.rpartition("/")[2] and _SERVING.search(text):
        yield _finding(LATEST, path, word, f"{text} has no tag, which is :latest.")


def engine_of(name: str) -> str | None:
    """`vllm` or `penstock`, where an image is one of them."""
    entry = entrypoint(name)
    return entry[0] if entry else None


def entrypoint(name: str) -> tuple[str, ...]:
    """What an image gives its arguments to; empty if it is not known."""
    bare = name.partition("@")[0]
    for pattern, words in _ENTRYPOINTS:
        if pattern.search(bare):
            return words
    return ()


def program_of(name: str, entry: str | None, command: Sequence[Word]) -> list[Word]:
    """The command line that a container of an image runs.

    Args:
        entry: another entry point than the image's, if there is one.
    """
    line, column = (command[0].line, command[0].column) if command else (1, 1)
    if entry is not None:
        return [Word(entry, line, column), *command] if entry else list(command)
    return [*(Word(text, line, column) for text in entrypoint(name)), *command] if command else []


def environment(
    variables: Iterable[tuple[str, Word]], arguments: Sequence[str], path: str, *, is_known: bool = True
) -> Iterator[Finding]:
    """Variables with names of flags, which vLLM does not read.

    Args:
        arguments: of the same container; what they refer to (`$(NAME)`, `$NAME`) is used.
        is_known: whether the image is known to be an engine's; if not, only telling names are found.
    """
    said = " ".join(arguments)
    for name, word in variables:
        flag = "--" + name.lower().replace("_", "-")
        near = (
            flag in tables.vllm().names or flag.replace("utilisation", "utilization") in tables.vllm().names
        )
        if not near or not name.isupper() or name in _NOT_FLAGS:
            continue
        if not is_known and name.count("_") < 2:
            continue
        if re.search(rf"\$[({{]?{re.escape(name)}\b", said):
            continue
        yield _finding(ENV, path, word, f"Engines do not read {name}.", f"Give {flag} among the arguments.")


def helm(words: Sequence[Word], path: str) -> Iterator[Finding]:
    """`helm install` and `upgrade`."""
    if not words or words[0].text not in ("install", "upgrade"):
        return
    texts = [word.text for word in words]
    is_set = {"--version", "--devel"} & {text.partition("=")[0] for text in texts}
    charts = [word for word in words[1:] if _is_chart(word.text)]
    if charts and not is_set:
        yield _finding(CHART, path, charts[0], f"{charts[0].text} is installed without --version.")
    for index, text in enumerate(texts[:-1]):
        if text in ("--set", "--set-string"):
            for setting in texts[index + 1].split(","):
                name, _, value = setting.partition("=")
                if value in ("latest", "nightly") and name.lower().endswith("tag"):
                    yield _finding(LATEST, path, words[index + 1], f"{setting} is no version.")


def _is_chart(text: str) -> bool:
    """`repo/chart` or `oci://…`; not a folder, a file, or a value of --set."""
    if re.match(r"(dist|deploy|deployments?|charts?|helm|k8s|infra|build)/", text):
        return False  # most probably a folder
    return (
        text.startswith("oci://")
        or re.fullmatch(r"[a-z0-9][a-z0-9-]*/[a-z0-9][a-z0-9._-]*", text) is not None
    )


def _mounts_shm(options: Mapping[str, Sequence[Word]]) -> bool:
    return any(
        "/dev/shm" in word.text
        for name in ("-v", "--volume", "--mount", "--tmpfs")
        for word in options.get(name, ())
    )


def _finding(rule: Rule, path: str, at: Word, what: str, fix: str = "") -> Finding:
    return Finding(rule, path, at.line, at.column, what, fix)
