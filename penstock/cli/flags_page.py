"""docs/flags.md and `penstock serve --help=vllm`, from the parser and the table of vLLM's flags; and the
table by which `penstock check` knows our commands.

python -m penstock.cli.flags_page > docs/flags.md
python -m penstock.cli.flags_page --table > penstock/check/tables/penstock.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from .flags import ALIASES, REMOVED, Parser
from .vllm_flags import THEIR_DEFAULTS, VLLM_FLAGS, VllmFlag

_HEAD = """\
# The flags of `penstock serve`

<!-- made by `python -m penstock.cli.flags_page > docs/flags.md`; a test compares them -->

Names and values are vLLM 0.32's where vLLM has them; a flag of vLLM that is not here is not silently ignored.
`--flag value`, `--flag=value` and `--some_flag` are all read, and so is JSON in parts, `--flag.key value`.

`--config FILE` gives flags in YAML: keys are the names of flags, lists are several values, `true` and `false`
are `--flag` and `--no-flag`, mappings are JSON, and `model` may stand there, too. The command line wins.

```yaml
model: Qwen/Qwen3-0.6B
max-model-len: 8K
served-model-name: [qwen, small]
enable-prefix-caching: false
```

Sizes are vLLM's: `8k` is 8,000, `8K` is 8,192 (k, m, g, t are decimal; K, M, G, T binary, whole numbers
only); beside them `8KiB`, `1.5GiB`. `8KB` may mean either, and is refused. Keys for the API come from
`--api-key`, or from the environment: `PENSTOCK_API_KEY` (several, with commas) and `VLLM_API_KEY` (one);
`--gateway-key` from `PENSTOCK_GATEWAY_KEY`.
"""

_THEIRS = """
## Flags of vLLM that have no setting here

Accepted are the values that stand beside a flag, `None` where there is none: they ask for what happens
anyway, and mostly are vLLM's defaults. With others, the server does not start, and says what they would need.
`on` and `off` are `--flag` and `--no-flag`.
"""

_GONE = """
## Flags that vLLM has removed, and other engines' names

"""


def render() -> str:
    """The page."""
    return "".join(f"{line}\n" for line in (_HEAD.rstrip(), *_ours(), _THEIRS.rstrip(), *_theirs(), *_gone()))


def vllm_lines() -> list[str]:
    """A line for every flag of vLLM without a setting here, under its topic's name."""
    lines = []
    for topic, groups in VLLM_FLAGS.items():
        lines.append(f"{topic}:")
        for flag in (flag for group in groups for flag in group):
            name = ", ".join(flag.names)
            served = _served(flag)
            if flag.changes_nothing:
                text = f"accepted: {flag.why}"
            else:
                text = f"{served} is accepted; else it needs {flag.why}" if served else f"needs {flag.why}"
            lines.append(f"  {name:<46}  {text}")
        lines.append("")
    return lines[:-1]


def _served(flag: VllmFlag) -> str:
    """The values that are accepted, as one writes them."""
    if flag.changes_nothing:
        return "any"
    if flag.is_switch:
        return "on" if flag.switch[0] else "off"
    return " or ".join(flag.values)


def _ours() -> Iterator[str]:
    from .serve import add_arguments

    parser = Parser(prog="penstock serve")
    add_arguments(parser)
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        if not actions:
            continue
        yield from ("", f"## {(group.title or '').capitalize()}", "", "| flag | |", "|---|---|")
        for action in actions:
            yield _row(action)


def _row(action: argparse.Action) -> str:
    names = [*action.option_strings] or [action.dest.upper()]
    names += ALIASES.get(names[0], ())
    if isinstance(action, argparse.BooleanOptionalAction):
        names = [names[0].replace("--", "--[no-]", 1)]
    name = "`, `".join(names)
    text = (action.help or "").replace("%%", "%").replace("|", "\\|")
    if theirs := THEIR_DEFAULTS.get(f"--{action.dest.replace('_', '-')}"):
        text += f"; vLLM's default: {theirs}"
    return f"| `{name}` | {text} |"


def _theirs() -> Iterator[str]:
    for topic, groups in VLLM_FLAGS.items():
        yield from ("", f"### {topic}", "", "| flags, and what is accepted | |", "|---|---|")
        for group in groups:
            shown = ", ".join(_shown(flag) for flag in group)
            why = group[0].why
            yield f"| {shown} | {'accepted' if group[0].changes_nothing else 'needs'}: {why} |"


def _shown(flag: VllmFlag) -> str:
    """`--flag` `-f` = `value`"""
    names = " ".join(f"`{name}`" for name in flag.names)
    served = "" if flag.changes_nothing else _served(flag)
    return f"{names} = `{served}`" if served else names


def _gone() -> Iterator[str]:
    yield from (_GONE.rstrip(), "", "| flag | |", "|---|---|")
    for name, instead in REMOVED.items():
        yield f"| `{name}` | {instead} |"


def table() -> str:
    """The flags of every sub-command, as penstock.check.flags reads them: a kind and names for each."""
    from .main import COMMANDS, load

    lines = ["# made by `python -m penstock.cli.flags_page --table`; a test compares them"]
    for name in COMMANDS:
        parser = Parser(prog=f"penstock {name}")
        load(name).add_arguments(parser)
        lines += _lines(name, parser)
    return "".join(f"{line}\n" for line in lines)


def _lines(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"[{command}]"
    below: list[tuple[str, argparse.ArgumentParser]] = []
    rows = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below += action.choices.items()
        elif action.option_strings:
            rows[action.option_strings[0]] = _line(action)
    yield from sorted(rows.values(), key=lambda row: row.split(None, 1)[1])
    for name, sub in below:
        yield from _lines(f"{command} {name}", sub)


def _line(action: argparse.Action) -> str:
    names = [name for name in action.option_strings if not name.startswith("--no-")]
    if not names:  # a switch that is on
        return f"flag {' '.join(action.option_strings)}"
    if isinstance(action, argparse.BooleanOptionalAction) or len(names) < len(action.option_strings):
        kind = "switch"
    elif action.nargs == 0:
        kind = "flag"
    else:
        kind = {"?": "maybe", "*": "values", "+": "values"}.get(str(action.nargs), "value")
    choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
    return f"{kind} {' '.join(names)}{choices}"


if __name__ == "__main__":
    print(table() if sys.argv[1:] == ["--table"] else render(), end="")
