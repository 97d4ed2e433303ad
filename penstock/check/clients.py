"""Clients on the command line: load generators (hey, oha, wrk, ab) and curl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .calls import body_findings
from .finding import Finding, Rule, Severity, Word
from .words import is_unknown

LOAD_GET = Rule(
    "load-test-get",
    Severity.ERROR,
    "a load test that sends GET without a body",
    "The endpoint wants a POST with a body, and answers 405 without doing any work: the test measures "
    "nothing. Such a tool also sees whole answers only, not the time to the first token.",
    "Send a body (hey -m POST -T application/json -D body.json …), or use `penstock bench serve`, which "
    "streams and reports TTFT.",
)
REQUEST_GET = Rule(
    "request-get",
    Severity.WARNING,
    "a GET at an endpoint that wants a POST",
    "The server answers 405.",
    "Add -H 'Content-Type: application/json' -d '{…}'.",
)
RULES = (LOAD_GET, REQUEST_GET)

PROGRAMS = frozenset("hey oha wrk wrk2 ab curl".split())

ENDPOINT = re.compile(
    r"/(v1/(chat/completions|completions|responses|messages|embeddings|rerank|score)|chat/completions|generate)"
    r"/?([?#].*)?$"
)
"""Where only POST is served."""

_VALUES = {
    "hey": "-n -c -q -z -o -m -H -t -A -d -D -T -U -a -x -host -cpus",
    "oha": "-n -c -p -z -q -w -m -H -t -d -D -T -A -a -x --burst-delay --burst-rate --rand-regex-url "
    "--latency-correction --body-path --output --db-url --connect-to --unix-socket",
    "wrk": "-c -d -t -s -H -R -T --connections --duration --threads --script --header --timeout --rate",
    "ab": "-n -c -t -s -b -B -p -u -T -v -x -y -z -C -H -A -P -X -g -e -f -Z -m -E -V",
    "curl": "-X -H -d -F -T -o -u -A -b -c -e -m -w -x -K -E -D -C -r -z -Y -y -P -t -U -h --request "
    "--header "
    "--data --data-raw --data-binary --data-ascii --data-urlencode --json --form --form-string --upload-file "
    "--output --user --user-agent --cookie --cookie-jar --max-time --connect-timeout --write-out --proxy "
    "--config "
    "--cacert --cert --key --resolve --retry --retry-delay --retry-max-time --unix-socket --url "
    "--interface --referer "
    "--range --limit-rate --dump-header --output-dir --variable --expand-data --expand-json --oauth2-bearer",
}
"""Flags of each that take a value."""
_BODY = {
    "hey": "-d -D",
    "oha": "-d -D --body-path",
    "ab": "-p",
    "curl": "-d --data --data-raw --data-binary --data-ascii --data-urlencode --json -F --form --form-string "
    "-T --upload-file --expand-data --expand-json",
}


@dataclass(slots=True)
class _Call:
    flags: dict[str, list[Word]] = field(default_factory=dict)
    urls: list[Word] = field(default_factory=list)
    is_open: bool = False


def examine(name: str, words: Sequence[Word], path: str) -> Iterator[Finding]:
    """What is wrong with a call of one of PROGRAMS; `words` begin with it."""
    kind = "wrk" if name == "wrk2" else name
    call = _parse(words[1:], frozenset(_VALUES[kind].split()))
    target = next((url for url in call.urls if ENDPOINT.search(url.text)), None)
    if target is None or call.is_open:
        return
    method = next(
        (call.flags[flag][-1].text.upper() for flag in ("-X", "--request", "-m") if flag in call.flags), ""
    )
    if kind == "curl":
        bodies = [word for flag in _BODY["curl"].split() for word in call.flags.get(flag, ())]
        if not bodies and method in ("", "GET") and not _only_looks(call):
            yield _finding(REQUEST_GET, path, target, f"curl sends GET to {_path(target)}.")
        for body in bodies:
            yield from _body(body, target, path)
        return
    if kind == "wrk":
        is_posted = bool({"-s", "--script"} & set(call.flags))
    else:
        has_body = any(flag in call.flags for flag in _BODY[kind].split())
        is_posted = has_body and (kind == "ab" or method == "POST")
    if not is_posted:
        seen = "GET" if kind in ("wrk", "ab") or method in ("", "GET") else f"{method} without a body"
        yield _finding(
            LOAD_GET, path, words[0], f"{name} sends {seen} to {_path(target)}.", _instead(kind, target)
        )
    for flag in ("-d",):
        for body in call.flags.get(flag, ()) if kind in ("hey", "oha") else ():
            yield from _body(body, target, path)


def _instead(kind: str, target: Word) -> str:
    if kind == "wrk":
        return f"Give a script that sets wrk.method and wrk.body (-s post.lua … {target.text})."
    if kind == "ab":
        return f"ab -p body.json -T application/json … {target.text}"
    return f"{kind} -m POST -T application/json -D body.json … {target.text}"


def _body(body: Word, target: Word, path: str) -> Iterator[Finding]:
    text = body.text.strip()
    if not text.startswith("{"):
        return
    data: Any
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or with parts that the shell puts in
        return
    if isinstance(data, dict):
        for rule, what, fix in body_findings(data, target.text):
            yield _finding(rule, path, body, what, fix)


def _parse(words: Sequence[Word], with_value: frozenset[str]) -> _Call:
    call = _Call()
    rest = iter(words)
    for word in rest:
        text = word.text
        if not text.startswith("-") or text == "-":
            if is_unknown(text) and not ENDPOINT.search(text):
                call.is_open = True
            call.urls.append(word)
            continue
        option, equals, value = text.partition("=")
        if text.startswith("--") and equals and option in with_value:
            call.flags.setdefault(option, []).append(Word(value, word.line, word.column + len(option) + 1))
        elif text in with_value:
            given = next(rest, None)
            if given is not None:
                call.flags.setdefault(text, []).append(given)
                if text == "--url":
                    call.urls.append(given)
        elif not text.startswith("--") and (flag := _glued(text, with_value)) is not None:
            value = text[text.index(flag[1]) + 1 :]  # -XPOST, -sSd
            following = Word(value, word.line, word.column) if value else next(rest, None)
            if following is not None:
                call.flags.setdefault(flag, []).append(following)
        else:
            call.flags.setdefault(option, [])
    return call


def _glued(text: str, with_value: frozenset[str]) -> str | None:
    """The flag with a value in `-XPOST` or `-sSd`: the first letter that takes one."""
    for letter in text[1:]:
        if not letter.isalpha():
            return None
        if f"-{letter}" in with_value:
            return f"-{letter}"
    return None


def _only_looks(call: _Call) -> bool:
    """Whether curl asks for headers only, or reads its options elsewhere."""
    return any(flag in call.flags for flag in ("-I", "--head", "-G", "--get", "-K", "--config"))


def _path(url: Word) -> str:
    found = ENDPOINT.search(url.text)
    return found[0] if found else url.text


def _finding(rule: Rule, path: str, at: Word, what: str, fix: str = "") -> Finding:
    return Finding(rule, path, at.line, at.column, what, fix)
