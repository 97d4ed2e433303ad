"""Command line flags, made from configuration dataclasses; and answers to flags that are not there.

A field `max_model_len` becomes `--max-model-len` (`--max_model_len` works, too), a bool gets a `--no-` twin,
the help line comes from the field's metadata and ends with the default. Unknown flags are refused with the
nearest one; flags that vLLM has removed, or that Penstock does not implement, say what to do instead. Of the
flags that are not implemented, the values that ask for nothing are accepted (`--kv-cache-dtype auto`).
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

#: flags of other versions and engines → what to use instead
REMOVED = {
    "--swap-space": "vLLM removed it with swapping. Preempted requests are recomputed through their cached "
    "prefix; for fewer preemptions raise --gpu-memory-utilization or --kv-cache-memory-bytes.",
    "--num-scheduler-steps": "vLLM removed it. Drop it: every step is scheduled, which costs well under a "
    "millisecond.",
    "--multi-step-stream-outputs": "vLLM removed it. Use --stream-interval to send several tokens per chunk.",
    "--preemption-mode": "vLLM removed it. Drop it: preemption always recomputes.",
    "--use-v2-block-manager": "vLLM removed it. Drop it: there is one block manager.",
    "--guided-decoding-backend": "vLLM removed it, and structured output is not implemented yet.",
    "--max-num-partial-prefills": "vLLM removed it. Use --long-prefill-token-threshold to bound one prompt's "
    "share of a step.",
    "--max-long-partial-prefills": "vLLM removed it. Use --long-prefill-token-threshold.",
    "--disable-log-requests": "use --no-enable-log-requests; requests are not logged by default.",
    "--max-seq-len-to-capture": "vLLM removed it. Drop it: nothing is captured.",
    "--worker-use-ray": "vLLM removed it. Drop it.",
    "--engine-use-ray": "vLLM removed it. Drop it.",
    "--max-context-len-to-capture": "vLLM removed it. Drop it: nothing is captured.",
    "--kv-cache-size": "use --kv-cache-memory-bytes (bytes, or 4GiB).",
    "--context-length": "that is SGLang's name: use --max-model-len.",
    "--model-path": "that is SGLang's name: give the model as the first argument.",
    "--mem-fraction-static": "that is SGLang's name: use --gpu-memory-utilization.",
    "--max-running-requests": "that is SGLang's name: use --max-num-seqs.",
    "--chunked-prefill-size": "that is SGLang's name: use --max-num-batched-tokens.",
    "--schedule-policy": "that is SGLang's name: use --scheduling-policy.",
    "--device-memory-utilization": "use --gpu-memory-utilization.",
}

#: flags of vLLM 0.32 that mean something Penstock does not do (yet)
NOT_IMPLEMENTED = frozenset(
    """--enable-expert-parallel
    --speculative-config --spec-method --spec-model --spec-tokens --enable-lora --max-loras --max-lora-rank
    --lora-modules --max-cpu-loras --enable-auto-tool-choice --tool-call-parser --reasoning-parser
    --kv-offloading-size --kv-offloading-backend --kv-transfer-config --enable-sleep-mode
    --otlp-traces-endpoint --compilation-config --optimization-level -O -cc --performance-mode --hf-overrides
    --limit-mm-per-prompt --tokenizer
    --logits-processors --structured-outputs-config --rope-scaling
    --rope-theta --sse-keep-alive-interval --num-gpu-blocks-override
    --override-generation-config --prefix-caching-hash-algo --config --show-hidden-metrics-for-version
    --uds --max-log-len --hf-token --middleware --enable-log-outputs --headless""".split()
)

#: flags of vLLM 0.32 of which only these values are served: they ask for what happens anyway
NEUTRAL: dict[str, tuple[str, ...]] = {
    "--kv-cache-dtype": ("auto",),
    "--pipeline-parallel-size -pp": ("1",),
    "--data-parallel-size -dp": ("1",),
    "--cpu-offload-gb": ("0",),
    "--logprobs-mode": ("raw_logprobs",),
    "--chat-template-content-format": ("auto",),
    "--api-server-count -asc": ("1",),
    "--task": ("auto", "generate"),
    "--runner": ("auto", "generate"),
    "--convert": ("auto", "none"),
    "--tokenizer-mode": ("auto",),
    "--distributed-executor-backend": ("uni", "mp"),
}

#: flags of vLLM 0.32 for what is always so here → why they change nothing
ALWAYS_ON: dict[str, str] = {
    "--enable-prompt-tokens-details": "usage always tells the cached tokens",
    "--enable-server-load-tracking": "/load always answers",
    "--disable-frontend-multiprocessing": "there is one API process",
}

_ALIASES = {"--tensor-parallel-size": "-tp", "--quantization": "-q"}

#: flags under vLLM's names, which say what parser its HTTP server has
_HIDDEN_ALIASES = {
    "--max-header-bytes": "--h11-max-incomplete-event-size",
    "--max-header-count": "--h11-max-header-count",
}

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "ti": 2**40,
    "tib": 2**40,
}


class Parser(argparse.ArgumentParser):
    """ArgumentParser that knows what people mean."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take `--max_model_len` for `--max-model-len`, and explain flags that are not there."""
        if args is not None:
            args = [_dashes(argument) for argument in args]
        parsed, unknown = super().parse_known_args(args, namespace)
        flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        # a sub-command's parser sees its own unknown flags first and explains them there
        if flags and self._is_leaf():
            self.error("\n".join(self.explain(name) for name in flags))
        return parsed, unknown

    def explain(self, name: str) -> str:
        """What to do instead of an unknown flag."""
        if name in REMOVED:
            return f"{name} is not a flag here: {REMOVED[name]}"
        if name in NOT_IMPLEMENTED or re.fullmatch(r"-O\d", name):
            return (
                f"{name} is a flag of vLLM that Penstock does not implement yet. Drop it, or serve with vLLM."
            )
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else f"See {self.prog} --help."
        return f"unknown flag {name}. {hint}"

    def error(self, message: str) -> NoReturn:
        """One message, no usage dump."""
        self.exit(2, f"{self.prog}: {message}\n")

    def _is_leaf(self) -> bool:
        return not any(isinstance(action, argparse._SubParsersAction) for action in self._actions)


class _Formatter(argparse.HelpFormatter):
    """Flags on the left, one line of explanation on the right."""

    def __init__(self, prog: str) -> None:
        # one line per flag, at the price of a wide page
        super().__init__(prog, max_help_position=44, width=max(150, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--[no-]flag` for a pair of flags, `--flag VALUE` once for the others."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class _Neutral(argparse.Action):
    """Takes the values of a flag that ask for nothing, and explains the others."""

    neutral: tuple[str, ...] = ()

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        if str(values).lower() not in self.neutral and not _same_number(values, self.neutral):
            parser.error(
                f"{self.option_strings[0]} {values} asks for something that Penstock does not implement yet. "
                f"Drop it (it stands at {self.neutral[0]}), or serve with vLLM."
            )


class _Ignored(argparse.BooleanOptionalAction):
    """Takes `--flag` and `--no-flag`, and does nothing."""

    def __call__(self, *_: Any) -> None: ...


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Accept vLLM's flags that change nothing here, so that command lines written for it work."""
    group = parser.add_argument_group("accepted for vLLM's sake, without effect")
    for names, values in NEUTRAL.items():
        action = group.add_argument(
            *names.split(),
            action=_Neutral,
            dest=argparse.SUPPRESS,
            metavar=values[0],
            help=f"{' or '.join(values)}; other values are not implemented",
        )
        action.neutral = values  # type: ignore[attr-defined]
    for name, why in ALWAYS_ON.items():
        group.add_argument(name, action=_Ignored, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=why)


def _same_number(given: str, neutral: Sequence[str]) -> bool:
    try:
        return any(float(given) == float(value) for value in neutral)
    except ValueError:
        return False


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
        kind = _plain(hints[entry.name])
        # SUPPRESS: a field that was not given keeps its dataclass default, and we can tell
        options: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS, "help": help_}
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
            continue
        if typing.get_origin(kind) is tuple:
            options |= {
                "nargs": "+",
                "action": "extend",
                "metavar": entry.name.split("_")[-1].upper().rstrip("S"),
            }
        else:
            options["type"] = parse_size if entry.metadata.get("size") else kind
            options["metavar"] = entry.metadata.get("metavar") or _metavar(kind)
        if entry.metadata.get("choices"):
            options["choices"] = entry.metadata["choices"]
            options["type"] = str.lower  # vLLM's `--quantization None`
            options["metavar"] = entry.metadata.get("metavar") or entry.name.split("_")[-1].upper()
            options["help"] = f"{'|'.join(entry.metadata['choices'])}: {help_}"
        group.add_argument(name, *filter(None, [_ALIASES.get(name)]), **options)
        if name in _HIDDEN_ALIASES:
            group.add_argument(_HIDDEN_ALIASES[name], **{**options, "help": argparse.SUPPRESS})


def make_config(config: type[Any], args: argparse.Namespace, **more: Any) -> Any:
    """The dataclass from parsed arguments; `more` fills in fields that were not given."""
    given = {entry.name: getattr(args, entry.name) for entry in fields(config) if hasattr(args, entry.name)}
    return config(**{**more, **given})


def parse_size(text: str) -> int:
    """An integer with an optional unit: 8192, 8k (8,000), 8Ki (8,192), 1.5M, 4GiB, 2T, -1."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8192, 8k, 8Ki or 4GiB")
    value = float(match.group(1)) * unit
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _plain(hint: Any) -> Any:
    """The type without `| None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _help(text: str, default: Any) -> str:
    text = text.rstrip(".")
    text = text[0].lower() + text[1:] if text[:2].istitle() else text
    if default is None or default == () or "default" in text.lower():
        return text.replace("%", "%%")
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    if isinstance(shown, Sequence) and not isinstance(shown, str):
        shown = " ".join(map(str, shown))
    return f"{text} (default: {shown})".replace("%", "%%") if shown != "" else text
