"""Shell: scripts, code blocks and `sh -c`; every command in them is examined.

tree-sitter's grammar of bash reads the text, with its quotes, continuations, pipes, loops and substitutions.
Before that, at the same length, placeholders (`<model>`) become variables, prompts and the output of console
sessions become blanks, and line continuations that are none are mended, since what follows was meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from . import commands
from .engines import key_in
from .finding import Finding, Rule, Severity, Word
from .grammars import MAX_BYTES, MISSING, GrammarMissing, Places, parser, text_of, walk
from .words import Place

if TYPE_CHECKING:
    from tree_sitter import Node

CONTINUATION = Rule(
    "continuation-broken",
    Severity.ERROR,
    "a backslash that does not continue the line",
    "A backslash continues a command only as the last character of its line. With a blank or a comment "
    "behind it the command ends there: the flags of the next lines are lost, and run as commands of "
    "their own.",
    "Take away what stands behind the backslash; put comments above the command.",
)
RULES = (CONTINUATION,)

LANGUAGES = frozenset("sh bash shell zsh console terminal shell-session shellsession ksh dash".split())
"""What code blocks call it."""

_PROMPT = re.compile(r"^(\s*)((?:[\w.-]+@[\w.-]+[:~\w/.-]*)?[$%] )(?=\S)")
_PLACEHOLDER = re.compile(r"<([A-Za-z][A-Za-z0-9 _./:-]*)>")
_BROKEN = re.compile(r"^(.*[^\\\s]\s+|\s*)\\([ \t]+#.*|[ \t]+)$")
_LOST = re.compile(r"(?<=\s)\\ +(?=--?[A-Za-z])")
_KEYS = ("VLLM_API_KEY", "PENSTOCK_API_KEY")


def examine(
    text: str, path: str, *, line: int = 1, column: int = 1, place: Place = Place.SHELL, depth: int = 0
) -> Iterator[Finding]:
    """What is wrong with the commands of a script.

    Args:
        path: of its file, for findings.
        line, column: where the text begins in it.
    """
    if len(text) > MAX_BYTES:
        return
    mended, found = _mended(text, path, line, column)
    yield from found
    try:
        lines = list(_commands(mended, line, column))
    except GrammarMissing as missing:
        yield Finding(MISSING, path, line, column, f"Shell is not read: {missing} is not installed.")
        return
    keys = [
        word for words in lines for word in words if word.text.partition("=")[0] in _KEYS and "=" in word.text
    ]
    for words in lines:
        for word in words:
            yield from key_in(word, path)
        yield from commands.examine([*keys, *words], path, place=place, depth=depth)


def _mended(text: str, path: str, line: int, column: int) -> tuple[str, list[Finding]]:
    """The text as it was meant, of the same length, and what it was not."""
    lines = text.split("\n")
    is_session = any(_PROMPT.match(each) for each in lines)
    found = []
    continued = False
    quote = ""
    for row, each in enumerate(lines):
        if is_session and not continued:
            prompt = _PROMPT.match(each)
            each = " " * prompt.end() + each[prompt.end() :] if prompt else ""
        each = _PLACEHOLDER.sub(lambda match: "$" + re.sub(r"\W", "_", match[1]) + "_", each)
        following = lines[row + 1].lstrip() if row + 1 < len(lines) else ""
        broken = _BROKEN.match(each)
        if broken and following.startswith("-"):
            start = len(broken[1])
            found.append(_broken(path, line + row, start + (column if row == 0 else 1)))
            each = each[:start] + " " * (len(each) - start - 1) + "\\"
        for match in list(_LOST.finditer(each)):
            found.append(_broken(path, line + row, match.start() + (column if row == 0 else 1)))
            each = each[: match.start()] + " " * len(match[0]) + each[match.end() :]
        if is_session:
            quote = _open_quote(each, quote)
        continued = each.endswith("\\") or bool(quote)
        lines[row] = each
    return "\n".join(lines), found[:1]  # the others are the same command's, mostly


def _open_quote(text: str, quote: str) -> str:
    """The quote that is open behind a line; empty if there is none."""
    for match in re.finditer(r"\\.|['\"]|(?:^|\s)#.*", text):
        sign = match[0][-1] if match[0] in ("'", '"') else ""
        if match[0].lstrip().startswith("#") and not quote:
            break
        if sign and quote in ("", sign):
            quote = "" if quote else sign
    return quote


def _broken(path: str, line: int, column: int) -> Finding:
    return Finding(CONTINUATION, path, line, column, "This backslash is not the last character of its line.")


def _commands(text: str, line: int, column: int) -> Iterator[list[Word]]:
    """The words of every command, those in substitutions, too."""
    data = text.encode("utf-8", "replace")
    places = Places(data, line, column)
    for node in walk(parser("bash").parse(data).root_node):
        if node.type == "variable_assignment" and (node.parent is None or node.parent.type not in _STARTS):
            yield [Word(_text(node), *places.of(*node.start_point))]
        if node.type not in _STARTS:
            continue
        words = [_word(child, places) for child in node.children if child.type in _WORDS]
        if words:
            yield words


def words_of(
    text: str, place: Callable[[int], tuple[int, int]], line: int = 1, column: int = 1
) -> list[Word]:
    """The words of one command line in a configuration, as Compose and systemd split it.

    Args:
        place: offset in the text → line and column.
        line, column: of the text, where an offset is not known.
    """
    try:
        found = [word for words in _commands(text.replace("\n", " "), 1, 1) for word in words]
    except GrammarMissing:
        return [Word(each, line, column) for each in text.split()]
    return [Word(word.text, *place(word.column - 1)) for word in found]


def _word(node: Node, places: Places) -> Word:
    """A word; it stands where its text does, behind the quote."""
    line, column = places.of(*node.start_point)
    return Word(_text(node), line, column + (1 if node.type in ("string", "raw_string") else 0))


_STARTS = frozenset(("command", "declaration_command"))
_WORDS = frozenset(
    "command_name word number string raw_string ansi_c_string translated_string concatenation "
    "simple_expansion expansion command_substitution process_substitution arithmetic_expansion "
    "variable_assignment "
    "variable_name brace_expression test_operator".split()
)


def _text(node: Node) -> str:
    """What the program gets for a word: without quotes and escapes, expansions as they are written."""
    if node.type in ("command_name", "concatenation", "translated_string", "variable_assignment"):
        return "".join(_text(child) for child in node.children) if node.children else text_of(node)
    source = text_of(node)
    if node.type == "raw_string":
        return source[1:-1]
    if node.type == "ansi_c_string":
        return source[2:-1]
    if node.type == "string":
        return re.sub(r'\\(["\\$`])|\\\n', lambda match: match[1] or "", source[1:-1])
    if node.type == "word":
        return re.sub(r"\\(.)", r"\1", source, flags=re.DOTALL)
    return source


__all__: Sequence[str] = ("LANGUAGES", "RULES", "examine", "words_of")
