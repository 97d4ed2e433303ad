"""A Grammar in the library's own language: named grammars in Lark's notation, with JSON schemas beside them.

    {"grammars": [{"name": "top", "lark_grammar": "start: …"}, {"name": "json1", "json_schema": {…}}, …]}

The first one is where an output begins. A special token of the vocabulary is not its text: where a literal
text has one, such as "<|tool|>", the token itself is meant. Added tokens that are not special to the
tokenizer, such as "<think>", may stand in free text, too, unless the grammar has another use for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.structured import Grammar, GrammarKind

from .tags import Format

WHITESPACE = r"( |\r?\n[ \t]{0,32})?"
"""Between the tokens of JSON: a blank, or a new line and its indentation. A model that has nothing to say
goes on with blanks for ever where it may."""

ESCAPES = '"\\bfnrt'
"""Of JSON. Not u: a name that is written in two ways is one to a reader, and two to a grammar."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Those that are no text to the library."""

    ids: Mapping[str, int]
    """By text."""
    spoken: frozenset[int] = frozenset()
    """Of these, those that are text to whoever reads the output."""


def source(grammar: Grammar, tokens: Tokens) -> str:
    """What the library compiles.

    Raises ValueError for EBNF that cannot be read; what else is wrong, the library says.
    """
    writer = _Writer(grammar, tokens)
    if grammar.kind is GrammarKind.JSON:
        body = writer.schema(json.loads(grammar.text))
    elif grammar.kind is GrammarKind.REGEX:
        body = writer.regex(grammar.text)
    elif grammar.kind is GrammarKind.CHOICE:
        body = writer.either([writer.literal(each) for each in json.loads(grammar.text)])
    elif grammar.kind is GrammarKind.EBNF:
        body = writer.ebnf(grammar.text)
    else:
        body = writer.format(json.loads(grammar.text))
    if grammar.before:
        body = f"{writer.format(json.loads(grammar.before))} {body}"
    if grammar.after:
        body = f"{writer.free_until([grammar.after])} {body}"
    return writer.finished(body)


class _Writer:
    """Rules of the outermost grammar, and the grammars that it refers to."""

    def __init__(self, grammar: Grammar, tokens: Tokens) -> None:
        self._grammar = grammar
        self._special = tokens.ids
        self._spoken = set(tokens.spoken)
        """Tokens that free text may have in it: the others."""
        self._rules: list[str] = []
        self._others: list[dict[str, Any]] = []
        pattern = "|".join(map(re.escape, sorted(tokens.ids, key=len, reverse=True)))
        self._split = re.compile(f"({pattern})") if pattern else None

    def finished(self, body: str) -> str:
        """All of it, beginning with `body`."""
        free = "free: free_text"
        if self._spoken:
            free += f" (<[{','.join(map(str, sorted(self._spoken)))}]> free_text)*"
        rules = [*self._rules, free, "free_text: /(.|\\n)*/"]
        top = "\n".join(["%llguidance {}", f"start: {body}", *rules, ""])
        return json.dumps({"grammars": [{"name": "top", "lark_grammar": top}, *self._others]})

    # ---- what returns an expression of the outermost grammar ----
    def literal(self, text: str) -> str:
        """A text, and the special tokens in it."""
        pieces = self._split.split(text) if self._split and text else [text]
        self._spoken.difference_update(self._special[piece] for piece in pieces if piece in self._special)
        found = [
            f"<[{self._special[piece]}]>" if piece in self._special else _quoted(piece)
            for piece in pieces
            if piece
        ]
        return " ".join(found) if found else '""'

    def either(self, alternatives: list[str]) -> str:
        """One of several expressions."""
        return self._rule(" | ".join(alternatives))

    def schema(self, schema: Any) -> str:
        """JSON of this schema."""
        if schema is True:
            schema = {}
        elif schema is False:
            schema = {"enum": []}
        whitespace = self._grammar.whitespace
        options: dict[str, Any] = {
            "json_allowed_escapes": ESCAPES,
            "lenient": self._grammar.lenient,
            "coerce_one_of": self._grammar.lenient,
            "whitespace_flexible": whitespace != "",
        }
        if whitespace != "":
            options["whitespace_pattern"] = WHITESPACE if whitespace is None else whitespace
        return self._other("json", {"json_schema": {**schema, "x-guidance": options}})

    def regex(self, pattern: str) -> str:
        """What matches it, wholly."""
        from llguidance import regex_to_lark

        return self._rule(f"/{regex_to_lark(pattern, use_ascii='')}/")

    def ebnf(self, text: str) -> str:
        """A grammar of somebody else."""
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            lark = any_to_lark(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except Exception as error:
            raise ValueError(str(error)) from None
        return self._other("grammar", {"lark_grammar": lark})

    def format(self, value: Format) -> str:
        """A structural tag's."""
        texts: Mapping[str, Callable[[], str]] = {
            "const_string": lambda: self.literal(value["value"]),
            "json_schema": lambda: self.schema(value["json_schema"]),
            "regex": lambda: self.regex(value["pattern"]),
            "grammar": lambda: self.ebnf(value["grammar"]),
            "any_text": lambda: self._any_text(value),
            "sequence": lambda: self._rule(" ".join(map(self.format, value["elements"]))),
            "or": lambda: self.either(list(map(self.format, value["elements"]))),
            "optional": lambda: f"({self.format(value['content'])})?",
            "star": lambda: f"({self.format(value['content'])})*",
            "plus": lambda: f"({self.format(value['content'])})+",
            "repeat": lambda: self._repeat(value),
            "tag": lambda: self._tag(value, value["begin"]),
            "triggered_tags": lambda: self._triggered(value),
            "tags_with_separator": lambda: self._separated(value),
        }
        return texts[value["type"]]()

    def free_until(self, ends: Sequence[str], text: Format | None = None) -> str:
        """Any text up to one of these, with it, where one begins for the first time.

        Args:
            ends: texts.
            text: an any_text that says more of it.

        Raises ValueError for a number of tokens before an end that is none: of a text that is cut in the
        middle of its end, the library cannot say how much of it is there.
        """
        text = text or {}
        found = []
        for end in ends:
            head = self._split.search(end) if self._split else None
            if head is not None and head.start() == 0:
                found.append(self._rule(f"{self._any_text(text)} {self.literal(end)}"))
        if texts := [end for end in ends if self._split is None or not self._split.match(end)]:
            if text.get("max_tokens") is not None:
                raise ValueError(
                    f"max_tokens needs an end that is a token of the model, and not {texts[0]!r}"
                )
            name = self._name("until")
            pattern = self._regex(f"{_any(text)}({_any_of(texts)})", text.get("excludes", ()))
            self._rules.append(f"{name}[lazy]: {pattern}")
            found.append(name)
        return found[0] if len(found) == 1 else self.either(found)

    def _any_text(self, text: Format) -> str:
        """Free text; with bounds, of nothing but text."""
        tokens = text.get("max_tokens")
        if tokens is None and not text.keys() & _BOUNDS:
            return self._free(text.get("excludes", ()))
        pattern = self._regex(_any(text), text.get("excludes", ()))
        name = self._name("bounded")
        self._rules.append(f"{name}{'' if tokens is None else f'[max_tokens={tokens}]'}: {pattern}")
        return name

    def _free(self, excluded: Sequence[str] = ()) -> str:
        """Any text, without the excluded ones."""
        if not excluded:
            return "free"
        return self._rule(self._regex(_any(), excluded))

    def _regex(self, pattern: str, excluded: Sequence[str]) -> str:
        """A terminal: what matches the pattern and has none of the excluded texts in it."""
        if not excluded:
            return f"/{pattern}/"
        name = self._name("FREE")
        self._rules.append(f"{name}: /{pattern}/ & ~/(.|\\n)*({_any_of(excluded)})(.|\\n)*/")
        return name

    # ---- parts ----
    def _repeat(self, value: Format) -> str:
        most = "" if value["max"] is None else value["max"]
        return f"({self.format(value['content'])}){{{value['min']},{most}}}"

    def _tag(self, value: Format, begin: str) -> str:
        """A tag whose `begin` is still to come as far as it says."""
        parts = [self.literal(begin)] if begin else []
        content = value["content"]
        if content["type"] == "any_text" and all(value["end"]):  # text that is free would go on for ever
            parts.append(self.free_until(value["end"], content))
            return self._rule(" ".join(parts))
        parts.append(self.format(content))
        ends = [self.literal(each) for each in value["end"]]
        parts.append(ends[0] if len(ends) == 1 else self.either(ends))
        return self._rule(" ".join(parts))

    def _triggered(self, value: Format) -> str:
        """Free text; behind a trigger, one of the tags that begin with it."""
        calls, excluded = [], value.get("excludes", ())
        for trigger in value["triggers"]:
            tags = [
                self._tag(tag, tag["begin"][len(trigger) :])
                for tag in value["tags"]
                if _trigger_of(tag["begin"], value["triggers"]) == trigger
            ]
            if tags:
                said = self.free_until([trigger], {"excludes": excluded})
                calls.append(self._rule(f"{said} {self.either(tags)}"))
        tagged, text = self.either(calls), self._free(excluded)
        if value["stop_after_first"]:
            return tagged if value["at_least_one"] else self.either([tagged, text])
        return f"({tagged}){'+' if value['at_least_one'] else '*'} {text}"

    def _separated(self, value: Format) -> str:
        """Tags, with the separator between them, and nothing else."""
        one = self.either([self._tag(tag, tag["begin"]) for tag in value["tags"]])
        several = one
        if not value["stop_after_first"]:
            several = self._rule(f"{one} ({self.literal(value['separator'])} {one})*")
        return several if value["at_least_one"] else f"({several})?"

    def _rule(self, body: str) -> str:
        name = self._name("r")
        self._rules.append(f"{name}: {body}")
        return name

    def _other(self, kind: str, grammar: dict[str, Any]) -> str:
        name = f"{kind}{len(self._others)}"
        self._others.append({"name": name, **grammar})
        return f"@{name}"

    def _name(self, prefix: str) -> str:
        return f"{prefix}{len(self._rules)}"


def _trigger_of(begin: str, triggers: list[str]) -> str:
    """The longest trigger that a tag begins with."""
    return max((each for each in triggers if begin.startswith(each)), key=len)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_BOUNDS = frozenset({"min_chars", "max_chars"})


def _any(text: Format | None = None) -> str:
    """Any text, of as many characters as it may have."""
    text = text or {}
    if not text.keys() & _BOUNDS:
        return "(.|\\n)*"
    return f"(.|\\n){{{text.get('min_chars', 0)},{text.get('max_chars', '')}}}"


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(map(_escaped, texts))


def _escaped(text: str) -> str:
    """A literal text in a regular expression of Lark's."""
    return re.sub(r"([.^$*+?{}\[\]\\|()/&~#-])", r"\\\1", text).replace("\n", "\\n")
