"""Starting an engine: `vllm serve` and `penstock serve`, their flags and values."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import StartupError
from penstock.core.near import nearest
from penstock.fleet import schemes

from . import flags as tables
from .finding import Finding, Rule, Severity, Word
from .flags import Flags, plain
from .words import Place, is_placeholder, is_unknown, part, secret_in

LONG_CONTEXT = 128_000
"""Tokens from which a context is one "just in case", unless a spec says what for."""

FLAG_UNKNOWN = Rule(
    "flag-unknown",
    Severity.ERROR,
    "a flag that the program does not have",
    "The program ends at its command line, and the pod restarts for ever (CrashLoopBackOff).",
    "Write the flag as `--help` has it.",
)
FLAG_REMOVED = Rule(
    "flag-removed",
    Severity.ERROR,
    "a flag that the program no longer has",
    "The program ends at its command line, and the pod restarts for ever (CrashLoopBackOff).",
    "Drop it, or write what has replaced it.",
)
FLAG_VALUE = Rule(
    "flag-value",
    Severity.ERROR,
    "a flag with a value that it cannot have",
    "The program refuses to start, or starts with something else than what was meant.",
    "Write a value of the flag's kind and range.",
)
PLUGIN = Rule(
    "quantization-plugin",
    Severity.WARNING,
    "a quantisation that vLLM has in a plugin",
    "Where the image is without the plugin, the engine ends at its start: unknown quantization method.",
    "Put the plugin into the image, or take another scheme.",
)
FLAG_BARE = Rule(
    "flag-no-value",
    Severity.ERROR,
    "a flag without the value that it takes",
    "The program ends at its command line, or takes the next word for the value.",
    "Write the value behind it.",
)
FLAG_TWICE = Rule(
    "flag-twice",
    Severity.WARNING,
    "a flag that is given twice with different values",
    "The last one wins in silence; whoever reads the first is misled.",
    "Keep one of them.",
)
LONG = Rule(
    "context-just-in-case",
    Severity.WARNING,
    "a context of 128K tokens or more",
    "Each sequence may take KV cache for all of it, so fewer run at a time, and one long prompt delays all "
    "others. A cap that fits the workload serves more with the same memory.",
    "Set --max-model-len to the longest request of this workload; trim what retrieval adds before.",
)
UNCAPPED = Rule(
    "context-unset",
    Severity.NOTE,
    "vLLM without --max-model-len",
    "The context is then the model's own, often 128K tokens or more, and one request may take all KV cache.",
    "Set --max-model-len to the longest request of this workload.",
)
PARALLEL = Rule(
    "tensor-parallel",
    Severity.ERROR,
    "a model that cannot be divided into so many ranks",
    "The engine ends at its start: attention heads must divide evenly.",
    "Choose a number that divides the model's heads; `penstock plan MODEL` lists them.",
)
PARALLEL_ODD = Rule(
    "tensor-parallel-odd",
    Severity.WARNING,
    "a tensor parallel size that is no power of two",
    "Heads and matrices of most models do not divide by it, and the engine ends at its start.",
    "Use 1, 2, 4 or 8, or check with `penstock plan MODEL --tp N`.",
)
TRUST = Rule(
    "trust-remote-code",
    Severity.WARNING,
    "code from the model's repository is run",
    "Whoever can change that repository runs code on your GPU nodes, with the engine's tokens.",
    "Drop it: common architectures do not need it. Where one does, pin --revision to a commit that was read.",
)
OPEN = Rule(
    "engine-open",
    Severity.WARNING,
    "an engine that everybody on the network may use",
    "Without a key your GPU is a public mine: whoever reaches the port spends your money.",
    "Give --api-key (or the variable VLLM_API_KEY or PENSTOCK_API_KEY), bind to 127.0.0.1, or put a gateway "
    "with keys in front.",
)
KEY = Rule(
    "key-in-text",
    Severity.ERROR,
    "a key in plain text",
    "It stands in the repository, in shell histories, in process lists and in logs.",
    "Read it from the environment or a Secret, and revoke this one.",
)
PREFIX = Rule(
    "prefix-caching-off",
    Severity.NOTE,
    "prefix caching is switched off",
    "Stable system prompts and retrieved texts are then computed again for every request.",
    "Drop the flag: caching is the default, and costs nothing where nothing repeats.",
)
RULES = (
    FLAG_UNKNOWN,
    FLAG_REMOVED,
    FLAG_VALUE,
    PLUGIN,
    FLAG_BARE,
    FLAG_TWICE,
    LONG,
    UNCAPPED,
    PARALLEL,
    PARALLEL_ODD,
    TRUST,
    OPEN,
    KEY,
    PREFIX,
)

_VLLM_ONLY = frozenset(
    "--max-model-len --tensor-parallel-size --gpu-memory-utilization --gpu-memory-utilisation "
    "--served-model-name --max-num-seqs --max-num-batched-tokens --trust-remote-code "
    "--enable-prefix-caching --enforce-eager --kv-cache-dtype".split()
)
_OPEN_HOSTS = frozenset(("0.0.0.0", "::", "[::]", ""))
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)([kmgtKMGT])(iB)?")
_REPEATED = frozenset("--api-key --lora-modules --served-model-name --middleware".split())


@dataclass(slots=True)
class Given:
    """What a command line says."""

    flags: dict[str, list[tuple[Word, Word | None]]] = field(default_factory=dict)
    """First name → each time: the flag as it was written, and its value."""
    positionals: list[Word] = field(default_factory=list)
    is_open: bool = False
    """More flags may come from somewhere: `$ARGS`, `"$@"`, --config."""
    findings: list[tuple[Rule, Word, str, str]] = field(default_factory=list)

    def last(self, name: str) -> Word | None:
        """The value that counts; None if there is none, or it is not known."""
        times = self.flags.get(name)
        value = times[-1][1] if times else None
        return None if value is None or is_unknown(value.text) else value

    def where(self, name: str) -> Word:
        """The flag as it was written."""
        return self.flags[name][-1][0]


def looks_like_vllm(words: Sequence[Word]) -> bool:
    """Whether arguments without a program are those of vLLM's server, as an image's `args` are."""
    return any(plain(word.text.partition("=")[0]) in _VLLM_ONLY for word in words)


def vllm(
    words: Sequence[Word], path: str, place: Place, environment: Mapping[str, Word]
) -> Iterator[Finding]:
    """`vllm serve`, after these words."""
    table = tables.vllm()
    given = parse(words, table)
    yield from _common(given, table, path)
    if place is Place.SHELL and not given.is_open and words:
        host = given.last("--host")
        is_keyed = "--api-key" in given.flags or "VLLM_API_KEY" in environment
        if not is_keyed and "--uds" not in given.flags and (host is None or host.text in _OPEN_HOSTS):
            if "--host" not in given.flags:
                what, at = (
                    "vLLM binds to all addresses unless --host says otherwise; there is no key.",
                    words[0],
                )
                yield _finding(OPEN, path, at, what)
            elif host is not None:
                yield _finding(OPEN, path, host, f"--host {host.text} without --api-key.")
    if "--max-model-len" not in given.flags and not given.is_open and (given.positionals or given.flags):
        at = given.positionals[0] if given.positionals else next(iter(given.flags.values()))[0][0]
        yield _finding(UNCAPPED, path, at, "--max-model-len is not given.")


def penstock(
    words: Sequence[Word], path: str, place: Place, environment: Mapping[str, Word]
) -> Iterator[Finding]:
    """`penstock …`, after these words."""
    commands = tables.penstock()
    rest = list(words)
    if not rest or rest[0].text.startswith("-") or is_unknown(rest[0].text):
        return
    name = rest.pop(0)
    table = commands.get(name.text)
    if table is None:
        if not name.text.replace("-", "").isalpha() or not name.text.islower():
            return  # a placeholder, or prose
        known = sorted(each for each in commands if " " not in each)
        near = nearest(name.text, known)
        fix = f"Write penstock {near}." if near else f"There is {', '.join(known)}."
        yield _finding(FLAG_UNKNOWN, path, name, f"penstock has no command {name.text}.", fix)
        return
    if table.subcommands and rest and rest[0].text in table.subcommands:
        table = commands[f"{name.text} {rest.pop(0).text}"]
    if table.owner == "penstock bench startup":
        return  # the flags of servers of all kinds may follow
    given = parse(rest, table)
    if name.text != "serve":
        yield from (_finding(rule, path, at, what, fix) for rule, at, what, fix in given.findings)
        return
    yield from _common(given, table, path)
    host = given.last("--host")
    keyed = "--api-key" in given.flags or {"VLLM_API_KEY", "PENSTOCK_API_KEY"} & set(environment)
    if place is Place.SHELL and not given.is_open and not keyed and host and host.text in _OPEN_HOSTS:
        yield _finding(OPEN, path, host, f"--host {host.text} without --api-key.")


def of_flags(words: Sequence[Word], table: Flags, path: str) -> Iterator[Finding]:
    """Flags that stand in a file, where nothing is said of what is not given."""
    yield from _common(parse(words, table), table, path)


def refused(arguments: Sequence[str], engine: str) -> Finding | None:
    """The first thing for which an engine (penstock, vllm) would end at these flags, or harm; None if
    there is none. What the compiler asks before it writes them."""
    table = tables.vllm() if engine == "vllm" else tables.penstock()["serve"]
    words = [Word(each, 1, 1) for each in arguments]
    return next((each for each in of_flags(words, table, "-") if each.rule.severity is Severity.ERROR), None)


def parse(words: Sequence[Word], table: Flags) -> Given:
    """Flags with their values, as argparse reads them; what is unknown or without a value is found."""
    given = Given()
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word.text == "--":
            given.positionals += words[index:]
            break
        if not word.text.startswith("-") or len(word.text) < 2 or _is_number(word.text):
            given.positionals.append(word)
            given.is_open = given.is_open or (is_unknown(word.text) and "=" not in word.text)
            continue
        option, equals, text = word.text.partition("=")
        if is_unknown(option) or "/" in option or option.endswith(("…", "...")):
            given.is_open = True
            continue
        name = table.named(option)
        if option in ("--help", "-h", "--version"):
            given.is_open = True  # nothing is started
            continue
        if option.startswith("-O"):  # -O3, -O=3, -O 3: vLLM's --optimization-level
            index += option == "-O" and not equals
            continue
        if name is None:
            given.findings.append(_unknown(word, option, table))
            while index < len(words) and not equals and not words[index].text.startswith(("-", "$")):
                index += 1
            continue
        if name == "--config":
            given.is_open = True
        kind = table.kind(option)
        value: Word | None = None
        if equals:
            value = part(word, len(option) + 1, text)
        elif kind in ("value", "values", "maybe"):
            if index < len(words) and (
                not words[index].text.startswith("-") or _is_number(words[index].text)
            ):
                value = words[index]
                index += 1
                while kind == "values" and index < len(words) and not words[index].text.startswith("-"):
                    index += 1
            elif kind != "maybe":
                given.findings.append((FLAG_BARE, word, f"{option} has no value.", f"Write {option} VALUE."))
        given.flags.setdefault(name, []).append((word, value))
    return given


def _unknown(word: Word, option: str, table: Flags) -> tuple[Rule, Word, str, str]:
    name = plain(option)
    if name in tables.REMOVED:
        instead = tables.REMOVED[name]
        return FLAG_REMOVED, word, f"{table.owner} has no {option}.", instead[:1].upper() + instead[1:] + "."
    near = table.nearest(option)
    return FLAG_UNKNOWN, word, f"{table.owner} has no {option}.", f"Write {near}." if near else ""


def _common(given: Given, table: Flags, path: str) -> Iterator[Finding]:
    """What holds for the servers of both engines."""
    yield from (_finding(rule, path, at, what, fix) for rule, at, what, fix in given.findings)
    for name, times in given.flags.items():
        values = {value.text for _, value in times if value is not None}
        if len(values) > 1 and name not in _REPEATED:
            shown = ", ".join(sorted(values))
            yield _finding(FLAG_TWICE, path, times[-1][0], f"{name} is given as {shown}.")
        for _, value in times:
            if value is not None and not is_unknown(value.text):
                yield from _value(name, value, path, table)
                if name == "--quantization" and table is tables.vllm():
                    yield from _quantization(value, path, given)
    yield from _between(given, path)
    if "--trust-remote-code" in given.flags and not given.where("--trust-remote-code").text.startswith(
        "--no"
    ):
        yield _finding(TRUST, path, given.where("--trust-remote-code"), "--trust-remote-code is given.")
    caching = given.flags.get("--enable-prefix-caching")
    if caching and caching[-1][0].text.startswith("--no"):
        yield _finding(PREFIX, path, caching[-1][0], f"{caching[-1][0].text} is given.")
    for name in ("--api-key", "--hf-token", "--gateway-key"):
        value = given.last(name)
        if (
            value is not None and not is_placeholder(value.text) and secret_in(value.text) is None
        ):  # else: key_in
            yield _finding(KEY, path, value, f"The value of {name} stands here.")


def _quantization(value: Word, path: str, given: Given) -> Iterator[Finding]:
    """A name that vLLM's --quantization does not have, or has no longer."""
    name = value.text
    if name in schemes.VLLM_DEPRECATED and "--allow-deprecated-quantization" not in given.flags:
        what = f"--quantization {name}: vLLM ends, since it is deprecated."
        fix = "Take another scheme, or give --allow-deprecated-quantization as long as there is one."
        yield _finding(FLAG_VALUE, path, value, what, fix)
    if name in schemes.VLLM_NAMES or name in ("", "None"):
        return
    if (plugin := schemes.VLLM_PLUGINS.get(name)) is not None:
        yield _finding(PLUGIN, path, value, f"--quantization {name} needs {plugin}.")
        return
    what = f"--quantization {name}: one of {', '.join(sorted(schemes.VLLM_NAMES))}."
    served = schemes.served("vllm", schemes.canonical(name))
    fix = ""
    if name.lower() in schemes.VLLM_NAMES:
        fix = f"Write {name.lower()}: vLLM takes names as they are."
    elif name.lower() == "none":
        fix = "Leave the flag out: without it weights stay as they are."
    elif served is not None and served.checkpoint:
        fix = f"Leave the flag out, and serve {served.checkpoint}: vLLM reads the format from it."
    yield _finding(FLAG_VALUE, path, value, what, fix)


def _value(name: str, value: Word, path: str, table: Flags) -> Iterator[Finding]:
    text = value.text
    allowed = {each.lower(): each for each in table.choices.get(name, ())}
    if allowed and text.lower() not in allowed:
        near = nearest(text.lower(), list(allowed))
        what = f"{name} {text}: {table.owner} takes {', '.join(sorted(allowed.values()))}."
        yield _finding(FLAG_VALUE, path, value, what, f"Write {allowed[near]}." if near else "")
    if name in tables.RANGES:
        least, most, about = tables.RANGES[name]
        number = number_of(text, sized=name in tables.SIZES)
        if number is None:
            yield _finding(FLAG_VALUE, path, value, f"{name} {text}: {name} {about}.")
        elif not least <= number <= most:
            fix = ""
            if name == "--gpu-memory-utilization" and 1 < number <= 100:
                fix = f"Write {number / 100:g}."
            what = f"{name} {text}: it {about}, from {least:g} to {most:g}."
            yield _finding(FLAG_VALUE, path, value, what, fix)
    elif name == "--max-model-len":
        number = number_of(text, sized=True)
        if text.lower() in ("auto", "-1"):
            return
        if number is None or number < 1:
            yield _finding(
                FLAG_VALUE, path, value, f"{name} {text}: {name} is a number of tokens, as 8192 or 8K."
            )
        elif number >= LONG_CONTEXT:
            yield _finding(LONG, path, value, f"--max-model-len {text} is {number:,.0f} tokens.")


def _between(given: Given, path: str) -> Iterator[Finding]:
    """Values that cannot stand together."""
    batched, seqs = given.last("--max-num-batched-tokens"), given.last("--max-num-seqs")
    if batched is not None and seqs is not None:
        tokens, most = number_of(batched.text, sized=True), number_of(seqs.text)
        if tokens is not None and most is not None and 0 < tokens < most:
            what = f"--max-num-batched-tokens {batched.text} is less than --max-num-seqs {seqs.text}."
            yield _finding(
                FLAG_VALUE, path, batched, what, "Each running sequence needs a token of every step."
            )
    ranks = given.last("--tensor-parallel-size")
    count = number_of(ranks.text) if ranks is not None else None
    if ranks is None or count is None or not 1 < count <= 1024 or count != int(count):
        return
    model = given.last("--model") or next(iter(given.positionals), None)
    if model is not None and (problem := tp_problem(model.text, int(count))) is not None:
        if problem:
            yield _finding(PARALLEL, path, ranks, f"{model.text}: {problem}.")
    elif int(count) & (int(count) - 1):
        yield _finding(PARALLEL_ODD, path, ranks, f"--tensor-parallel-size {ranks.text}.")


def tp_problem(model: str, ranks: int) -> str | None:
    """Why a model of the catalogue cannot be divided so; empty if it can; None where it is not known."""
    from penstock.fleet import catalogue

    if is_unknown(model) or model.startswith((".", "/", "~")):
        return None
    with contextlib.suppress(StartupError, OSError, ValueError):
        return catalogue.find_model(model).tp_problem(ranks) or ""
    return None


def number_of(text: str, *, sized: bool = False) -> float | None:
    """A number; None if it is none. `sized` reads 8k and 8K, too."""
    try:
        return float(text)
    except ValueError:
        pass
    found = _SIZE.fullmatch(text) if sized else None
    if found is None:
        return None
    base = 1024 if found[2].isupper() or found[3] else 1000
    return float(found[1]) * float(base) ** ("kmgt".index(found[2].lower()) + 1)


def key_in(word: Word, path: str) -> Iterator[Finding]:
    """A finding where a word has somebody's key."""
    if (start := secret_in(word.text)) is not None:
        yield _finding(KEY, path, word, f"It looks like a key: {start}")


def _is_number(text: str) -> bool:
    return number_of(text) is not None


def _finding(rule: Rule, path: str, at: Word, what: str, fix: str = "") -> Finding:
    return Finding(rule, path, at.line, at.column, what, fix)
