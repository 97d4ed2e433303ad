"""Command line flags, made from configuration dataclasses; and answers to flags that are not there.

A field `max_model_len` becomes `--max-model-len` (`--max_model_len` works, too), a bool gets a `--no-` twin,
the help line comes from the field's metadata and ends with the default. `--config FILE` gives flags in YAML.
Every flag of vLLM 0.32 that is not ours is known by name (vllm_flags.py): it is accepted where it asks for
what is so anyway, and otherwise answered with what it would need. Flags that vLLM has removed say what to do
instead; unknown ones are refused with the nearest one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from penstock.core.near import nearest
from penstock.observe import logs

from .config_file import read_config
from .values import or_word, parse_json_object, parse_list, parse_origins, parse_size, parse_sizes
from .vllm_flags import BY_NAME, VLLM_FLAGS, VllmFlag

#: flags of other versions and engines → what to use instead
REMOVED = {
    "--swap-space": "vLLM removed it with swapping. Use --kv-offloading-size (GiB of the host's memory for "
    "preempted requests); for fewer preemptions raise --gpu-memory-utilization or --kv-cache-memory-bytes.",
    "--num-scheduler-steps": "vLLM removed it. Drop it: every step is scheduled, which costs well under a "
    "millisecond.",
    "--multi-step-stream-outputs": "vLLM removed it. Use --stream-interval to send several tokens per chunk.",
    "--preemption-mode": "vLLM removed it. Drop it: with --kv-offloading-size, each preempted request is "
    "copied to the host or computed again, whichever is faster.",
    "--use-v2-block-manager": "vLLM removed it. Drop it: there is one block manager.",
    "--guided-decoding-backend": "vLLM removed it. Use --structured-outputs-config.backend, or nothing: auto "
    "is the default.",
    "--guided-decoding-disable-any-whitespace": "vLLM removed it. Use "
    "--structured-outputs-config.disable_any_whitespace true.",
    "--guided-decoding-disable-additional-properties": "vLLM removed it. Use "
    "--structured-outputs-config.disable_additional_properties true.",
    "--max-num-partial-prefills": "vLLM removed it. Use --long-prefill-token-threshold to bound one prompt's "
    "share of a step.",
    "--max-long-partial-prefills": "vLLM removed it. Use --long-prefill-token-threshold.",
    "--disable-log-requests": "use --no-enable-log-requests; requests are not logged by default.",
    "--max-seq-len-to-capture": "vLLM removed it. Use --max-cudagraph-capture-size: graphs are as wide as "
    "requests are many, and take any length.",
    "--worker-use-ray": "vLLM removed it. Drop it.",
    "--engine-use-ray": "vLLM removed it. Drop it.",
    "--max-context-len-to-capture": "vLLM removed it. Use --max-cudagraph-capture-size: graphs are as wide "
    "as requests are many, and take any length.",
    "--kv-cache-size": "use --kv-cache-memory-bytes (bytes, or 4GiB).",
    "--context-length": "that is SGLang's name: use --max-model-len.",
    "--model-path": "that is SGLang's name: give the model as the first argument.",
    "--mem-fraction-static": "that is SGLang's name: use --gpu-memory-utilization.",
    "--max-running-requests": "that is SGLang's name: use --max-num-seqs.",
    "--chunked-prefill-size": "that is SGLang's name: use --max-num-batched-tokens.",
    "--schedule-policy": "that is SGLang's name: use --scheduling-policy.",
}

#: Our names of flags → other names that mean the same.
ALIASES: dict[str, tuple[str, ...]] = {
    "--tensor-parallel-size": ("-tp",),
    "--api-server-count": ("-asc",),
    "--quantization": ("-q",),
    # vLLM's names: they say what its HTTP server's parser is, which is not ours
    "--max-header-bytes": ("--h11-max-incomplete-event-size",),
    "--max-header-count": ("--h11-max-header-count",),
    "--gpu-memory-utilization": ("--device-memory-utilization",),
}
_LISTS: dict[str, Any] = {
    "allowed_origins": parse_origins,
    "allowed_methods": parse_list,
    "allowed_headers": parse_list,
    "cudagraph_capture_sizes": parse_sizes,
}
"""Fields that vLLM takes as lists: in JSON, or as several values."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser that knows what people mean."""

    _source = ""
    """Where the arguments stand that are being parsed, if not on the command line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what people write: `--max_model_len`, `--x.key 1`, `--config FILE`; explain the unknown.

        A sub-command's parser sees its own unknown flags first, and explains them there.
        """
        if args is None or not self._is_leaf():
            return super().parse_known_args(args, namespace)
        arguments = self._joined([_dashes(argument) for argument in args])
        for argument in arguments:
            if argument.startswith("--help="):
                print(self._help_on(argument.partition("=")[2]), end="")
                self.exit()
        parsed, problems = self._parse(arguments)
        settings = vars(parsed)
        if file := settings.pop("config_file", None):
            settings, more = self._with_file(file, settings)
            problems = more + problems
        problems += filter(None, settings.pop("refused", {}).values())
        if problems:
            self.error("\n".join(problems))
        namespace = argparse.Namespace() if namespace is None else namespace
        for name, value in settings.items():
            setattr(namespace, name, value)
        return namespace, []

    def explain(self, option: str) -> str:
        """What to do instead of an unknown flag."""
        name = option.partition(".")[0]
        if name in REMOVED:
            return f"{name} is not a flag here: {REMOVED[name]}"
        known = list(self._option_string_actions)
        shortened = (flag for flag in known if flag.startswith(name) and len(name) > 4)
        near = nearest(name, known, 0.75) or next(shortened, None)
        if near is None:
            return f"unknown flag {option}. See {self.prog} --help."
        theirs = BY_NAME.get(near)
        more = f" It is vLLM's, and needs {theirs.why}." if theirs and not theirs.changes_nothing else ""
        return f"unknown flag {option}. Did you mean {near}?{more}"

    def error(self, message: str) -> NoReturn:
        """One message, no usage dump."""
        logs.complain(f"{self.prog}: {self._source}{message}")
        self.exit(2)

    def _is_leaf(self) -> bool:
        return not any(isinstance(action, argparse._SubParsersAction) for action in self._actions)

    def _parse(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """What the arguments say, and an explanation of each unknown flag."""
        parsed, unknown = super().parse_known_args(arguments, argparse.Namespace())
        flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        others = [argument for argument in unknown if not argument.startswith("-")]
        if others and not flags:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return parsed, [self._source + self.explain(name) for name in flags]

    def _with_file(self, file: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The settings of a YAML file under those of the command line, and what is wrong with the file's."""
        settings: dict[str, Any] = {}
        problems: list[str] = []
        refused: dict[str, str | None] = {}
        try:
            entries = read_config(file, switches=self._option_string_actions)
        except ValueError as error:
            self.error(str(error))
        for key, arguments in entries:
            self._source = f"{file}: {key}: "
            parsed, unknown = self._parse([_dashes(argument) for argument in arguments])
            problems += unknown
            answers = vars(parsed).pop("refused", {})
            refused |= {name: answer and self._source + answer for name, answer in answers.items()}
            settings |= vars(parsed)
        self._source = ""
        return settings | given | {"refused": refused | given.get("refused", {})}, problems

    def _joined(self, arguments: Sequence[str]) -> list[str]:
        """vLLM's spelling of JSON in parts, `--x.key 1 --x.list+ a,b`, as one `--x={…}` at the end."""
        kept: list[str] = []
        objects: dict[str, dict[str, Any]] = {}
        rest = iter(arguments)
        for argument in rest:
            path, equals, text = argument.partition("=")
            name, *keys = path.removesuffix("+").split(".")
            if not keys or name not in self._option_string_actions:
                kept.append(argument)
                continue
            if not equals and (following := next(rest, None)) is not None:
                text, equals = following, "="
            if not equals:
                self.error(f"argument {path}: expected one argument")
            value: Any = text.split(",") if path.endswith("+") else _json_or_text(text)
            part = objects.setdefault(name, {})
            for key in keys[:-1]:
                part = part.setdefault(key, {}) if isinstance(part, dict) else {}
            if isinstance(value, list) and isinstance(part.get(keys[-1]), list):
                value = part[keys[-1]] + value
            part[keys[-1]] = value
        return kept + [f"{name}={json.dumps(value)}" for name, value in objects.items()]

    def _help_on(self, word: str) -> str:
        """Flags with a word in their name, ours and vLLM's; `vllm` is all of vLLM's, `all` everything."""
        from .flags_page import vllm_lines

        word = word.lower().replace("_", "-")
        theirs = vllm_lines()
        if word in ("vllm", "all"):
            return (self.format_help() + "\n" if word == "all" else "") + "\n".join(theirs) + "\n"
        ours = [line for line in self.format_help().splitlines() if line.startswith("  ")]
        found = [line for line in ours + theirs if word in line.partition("   ")[0].lower()]
        return "\n".join(found or [f"No flag has {word!r} in its name. See {self.prog} --help."]) + "\n"


class _Formatter(argparse.HelpFormatter):
    """Flags on the left, one line of explanation on the right."""

    def __init__(self, prog: str) -> None:
        # one line per flag, at the price of a wide page
        super().__init__(prog, max_help_position=52, width=max(200, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--[no-]flag` for a pair of flags, `--flag VALUE` once for the others."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class _Vllm(argparse.Action):
    """Takes a flag of vLLM; notes the answer where it is not served, for the end. The last word wins."""

    flag: VllmFlag

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        given = not option.startswith("--no-") if self.flag.is_switch else values
        answer = None if self.flag.serves(given) else self.flag.answer(option, given)
        namespace.refused = {**getattr(namespace, "refused", {}), self.flag.name: answer}


class _Extend(argparse.Action):
    """Appends all the values of all the times that a flag is given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        added = [item for value in values for item in (value if isinstance(value, list) else [value])]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *added])


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Know vLLM's other flags by name. Help has a line on them."""
    group = parser.add_argument_group("vLLM's")
    for flag in (flag for groups in VLLM_FLAGS.values() for group_ in groups for flag in group_):
        names = [*flag.names, *([flag.name.replace("--", "--no-", 1)] if flag.is_switch else [])]
        nargs = 0 if flag.is_switch else flag.nargs
        # SUPPRESS: without the flag there is nothing to say
        hidden: Any = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        action = group.add_argument(*names, action=_Vllm, nargs=nargs, **hidden)
        action.flag = flag  # type: ignore[attr-defined]
    parser.epilog = (
        f"Every flag of vLLM 0.32 is known: {parser.prog} --help=vllm and docs/flags.md say which are "
        f"accepted, and what the others would need. --help=WORD shows the flags with a word in their name."
    )


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """Add `--config`; the parser itself reads the file."""
    parser.add_argument(
        "--config",
        dest="config_file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="flags from a YAML file, `max-model-len: 8192`; those of the command line win",
    )


def add_config(parser: argparse.ArgumentParser, config: type[Any], title: str) -> None:
    """Add a flag for every field of a configuration dataclass."""
    group = parser.add_argument_group(title)
    parser.usage = f"{parser.prog} [MODEL] [flags]"
    hints = typing.get_type_hints(config)
    own = config.__annotations__  # before what it shares with others
    for entry in sorted(fields(config), key=lambda entry: entry.name not in own):
        default = entry.default if entry.default is not MISSING else None
        help_ = _help(str(entry.metadata["help"]), default)
        if entry.metadata.get("positional"):
            group.add_argument(entry.name, nargs="?", default=argparse.SUPPRESS, help=help_)
            group.add_argument(
                f"--{entry.name}", dest=entry.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
            continue
        name = "--" + entry.name.replace("_", "-")
        # SUPPRESS: a field that was not given keeps its dataclass default, and we can tell
        options: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS, "help": help_}
        options |= _value_options(entry.name, hints[entry.name], entry.metadata)
        if choices := options.get("choices"):
            options["help"] = f"{'|'.join(choices)}: {help_}"
        group.add_argument(name, **options)
        for alias in ALIASES.get(name, ()):
            group.add_argument(alias, **options | {"help": argparse.SUPPRESS})


def _value_options(name: str, hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What argparse needs to know of a field's values."""
    kind = _plain(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    last = name.split("_")[-1].upper()
    if typing.get_origin(kind) is tuple:
        return {
            "nargs": "+",
            "action": _Extend,
            "metavar": metadata.get("metavar") or last.rstrip("S"),
            "type": _LISTS.get(name, str),
        }
    if choices := metadata.get("choices"):
        # lower: vLLM's `--quantization None`
        return {"choices": choices, "type": str.lower, "metavar": metadata.get("metavar") or last}
    if typing.get_origin(kind) in (dict, Mapping):
        parse: Any = parse_json_object
    else:
        parse = parse_size if metadata.get("size") else kind
    words: dict[str, Any] = {"None": None, "": None} if kind is not hint else {}
    if "auto" in metadata:
        words["auto"] = metadata["auto"]
    return {"type": or_word(parse, words), "metavar": metadata.get("metavar") or _metavar(kind)}


def make_config(config: type[Any], args: argparse.Namespace, **more: Any) -> Any:
    """The dataclass from parsed arguments; `more` fills in fields that were not given."""
    given = {entry.name: getattr(args, entry.name) for entry in fields(config) if hasattr(args, entry.name)}
    return config(**{**more, **given})


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dashes(argument: str) -> str:
    """`--max_model_len` → `--max-model-len`; the keys of `--x.some_key` stay."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    flag, dot, keys = name.partition(".")
    return flag.replace("_", "-") + dot + keys + equals + value


def _plain(hint: Any) -> Any:
    """The type without `| None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "JSON")


def _help(text: str, default: Any) -> str:
    text = text.rstrip(".")
    text = text[0].lower() + text[1:] if text[:2].istitle() else text
    if default is None or default == () or "default" in text.lower():
        return text.replace("%", "%%")
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    if isinstance(shown, Sequence) and not isinstance(shown, str):
        shown = " ".join(map(str, shown))
    return f"{text} (default: {shown})".replace("%", "%%") if shown != "" else text
