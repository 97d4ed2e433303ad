"""JavaScript and TypeScript that call models: OpenAI's SDK, the AI SDK, LangChain, fetch and axios.

Object literals are judged where they stand in the call, or where a constant holds one (`const body = {…}`).
What is spread into them, or comes from elsewhere, is unknown, and no finding. There is no following of values
through functions or modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .calls import DYNAMIC, KEYLESS, LIMITS, LOOP, UNBOUNDED, UNTAGGED, limit_problem
from .clients import ENDPOINT
from .engines import KEY
from .finding import Finding, Rule
from .grammars import MAX_BYTES, MISSING, GrammarMissing, Places, parser, text_of, walk
from .python_prompts import LEAST
from .words import is_placeholder, secret_in

if TYPE_CHECKING:
    from tree_sitter import Node

_CHATS = (".chat.completions.create", ".chat.completions.stream", ".chat.completions.parse")
_RESPONSES = (".responses.create", ".responses.stream", ".responses.parse")
_AI_SDK = frozenset(("generateText", "streamText", "generateObject", "streamObject"))
_CLIENTS = frozenset(
    ("OpenAI", "AzureOpenAI", "Anthropic", "ChatOpenAI", "createOpenAI", "createOpenAICompatible")
)
_VOLATILE = re.compile(
    r"new Date\b|Date\.now\(|randomUUID\(|Math\.random\(|\b(?:user|session|request|req|customer|ctx)\b"
    r"(?:\.|\[|Name|Id)|\b(?:today|now|timestamp|userName|username|sessionId|requestId|question|query)\b"
)
_WAITS = re.compile(
    r"\b(?:question|prompt|readline|recv|receive|poll|accept|blpop|brpop|subscribe|once)\(|[qQ]ueue\."
)
_COUNTS = re.compile(
    r"[<>]=?|\b\w*(?:max|limit|budget|steps?|turns?|attempts?|deadline|remaining|retries|iterations?|rounds?|count|timeout)\w*\b",
    re.IGNORECASE,
)
_MORE = "..."


def examine(text: str, path: str, language: str, *, line: int = 1) -> Iterator[Finding]:
    """What is wrong with a module, or a code block.

    Args:
        language: `javascript`, `typescript` or `tsx`.
        line: the number of its first line in the file.
    """
    if not re.search(r"completions|responses|generateText|streamText|ChatOpenAI|OpenAI|Anthropic", text):
        return
    data = text.encode("utf-8", "replace")
    if len(data) > MAX_BYTES:
        return
    try:
        root = parser(language).parse(data).root_node
    except GrammarMissing as missing:
        yield Finding(MISSING, path, line, 1, f"It is not read: {missing} is not installed.")
        return
    yield from _Module(root, path, Places(data, line, 1)).findings()


class _Module:
    def __init__(self, root: Node, path: str, places: Places) -> None:
        self.root = root
        self.path = path
        self.places = places
        self.constants: dict[str, Node] = {}
        self.changed: set[str] = set()
        for node in walk(root):
            if node.type == "variable_declarator":
                name, value = node.child_by_field_name("name"), node.child_by_field_name("value")
                is_const = node.parent is not None and text_of(node.parent).startswith("const")
                if name is not None and value is not None and name.type == "identifier" and is_const:
                    known = text_of(name)
                    if known in self.constants:  # of another scope
                        self.changed.add(known)
                    self.constants[known] = value
            elif node.type in ("assignment_expression", "augmented_assignment_expression"):
                target = node.child_by_field_name("left")
                if target is not None:
                    self.changed.add(re.split(r"[.\[]", text_of(target))[0])

    def findings(self) -> Iterator[Finding]:
        clients: list[Node] = []
        calls: list[Node] = []
        tagged = "feature" in text_of(self.root).lower()
        for node in walk(self.root):
            if node.type not in ("call_expression", "new_expression"):
                continue
            function = node.child_by_field_name("function") or node.child_by_field_name("constructor")
            name = re.sub(r"\s+", "", text_of(function)) if function is not None else ""
            arguments = self._arguments(node)
            last = name.rpartition(".")[2]
            dotted = f".{name}"
            if dotted.endswith((*_CHATS, *_RESPONSES)) or last in _AI_SDK:
                calls.append(node)
                yield from self._call(node, arguments, last, dotted.endswith(_RESPONSES))
            elif last in ("fetch", "post") and arguments and ENDPOINT.search(self._tail(arguments[0])):
                calls.append(node)
                yield from self._sent(node, arguments, last, self._tail(arguments[0]))
            if last in _CLIENTS and arguments:
                clients.append(node)
                yield from self._client(arguments[0], last)
        for client in clients if not tagged else ():
            options = self._object(self._arguments(client)[0])
            if options is not None and _MORE not in options and {"baseURL", "baseUrl"} & set(options):
                yield self._at(client, UNTAGGED, "This client sends no feature tag.")
        yield from self._loops(calls)
        yield from self._prompts()

    def _call(self, node: Node, arguments: list[Node], name: str, responses: bool) -> Iterator[Finding]:
        options = self._object(arguments[0]) if arguments else None
        if options is None:
            return
        bounds = [bound for bound in LIMITS if bound in options]
        if not bounds and _MORE not in options:
            wanted = (
                "maxOutputTokens" if name in _AI_SDK else "max_output_tokens" if responses else "max_tokens"
            )
            yield self._at(node, UNBOUNDED, f"{name}() has no {wanted}.")
        yield from self._bounds(options, bounds)

    def _bounds(self, options: dict[str, Node | None], bounds: list[str]) -> Iterator[Finding]:
        for bound in bounds:
            value = options[bound]
            if value is not None and (problem := limit_problem(self._value(value))):
                yield self._at(value, UNBOUNDED, f"{bound} is {problem}.")

    def _sent(self, node: Node, arguments: list[Node], name: str, url: str) -> Iterator[Finding]:
        second = self._object(arguments[1]) if len(arguments) > 1 else None
        body: dict[str, Node | None] | None = second
        headers: Node | None = None
        if name == "fetch":
            options = second
            if options is None or _MORE in options:
                return
            sent, headers = options.get("body"), options.get("headers")
            body = self._stringified(sent) if sent is not None else None
            if options.get("headers", node) is not None and self._sends_no_key(headers):
                yield self._at(headers or node, KEYLESS, "fetch() sends no Authorization header.")
        if body is None:
            return
        bounds = [bound for bound in LIMITS if bound in body]
        if not bounds and _MORE not in body and re.search(r"/(chat/completions|responses)", url):
            yield self._at(node, UNBOUNDED, "The body has no max_tokens.")
        yield from self._bounds(body, bounds)

    def _sends_no_key(self, headers: Node | None) -> bool:
        if headers is None:
            return True
        known = self._object(headers)
        if known is None or _MORE in known:
            return False
        return not {"authorization", "x-api-key", "api-key"} & {name.lower() for name in known}

    def _stringified(self, node: Node) -> dict[str, Node | None] | None:
        """The object in `JSON.stringify({…})`."""
        node = self._resolve(node)
        if node.type != "call_expression" or not text_of(node).startswith("JSON.stringify"):
            return None
        arguments = self._arguments(node)
        return self._object(arguments[0]) if arguments else None

    def _client(self, argument: Node, name: str) -> Iterator[Finding]:
        options = self._object(argument) or {}
        for key in ("apiKey", "openAIApiKey", "authToken"):
            given = options.get(key)
            value = self._value(given) if given is not None else None
            if given is None or not isinstance(value, str):
                continue
            if (start := secret_in(value)) is not None:
                yield self._at(given, KEY, f"It looks like a key: {start}")
            elif not is_placeholder(value) or value.lower() in ("empty", "none", "", "dummy", "test"):
                yield self._at(given, KEYLESS, f"{name} gets the key {value!r}, which is written here.")

    def _loops(self, calls: list[Node]) -> Iterator[Finding]:
        for call in calls:
            node: Node | None = call.parent
            while node is not None and "function" not in node.type and node.type != "method_definition":
                if node.type in ("while_statement", "do_statement", "for_statement"):
                    condition = node.child_by_field_name("condition")
                    test = text_of(condition).strip("(); ") if condition is not None else ""
                    body = node.child_by_field_name("body")
                    if (
                        body is not None
                        and not _COUNTS.search(test)
                        and not _WAITS.search(text_of(body))
                        and not any(map(_counted, walk(body)))
                    ):
                        yield self._at(node, LOOP, "Nothing counts the turns of this loop.")
                        break
                node = node.parent

    def _prompts(self) -> Iterator[Finding]:
        for node in walk(self.root):
            if node.type != "object":
                continue
            options = self._object(node)
            role = options.get("role") if options else None
            content = options.get("content") if options else None
            if role is None or content is None or self._value(role) not in ("system", "developer"):
                continue
            content = self._resolve(content)
            if content.type != "template_string":
                continue
            changing: str | None = None
            stays = 0
            for child in content.children:
                if (
                    child.type == "template_substitution"
                    and changing is None
                    and _VOLATILE.search(text_of(child))
                ):
                    changing = text_of(child)
                elif child.type == "string_fragment" and changing is not None:
                    stays += len(text_of(child))
            if changing is not None and stays >= LEAST:
                yield self._at(
                    content, DYNAMIC, f"{changing[:40]} stands before {stays} characters that stay."
                )

    def _arguments(self, node: Node) -> list[Node]:
        found = node.child_by_field_name("arguments")
        return (
            [child for child in found.named_children if child.type != "comment"] if found is not None else []
        )

    def _resolve(self, node: Node) -> Node:
        name = text_of(node) if node.type == "identifier" else ""
        while (
            node.type in ("parenthesized_expression", "as_expression", "satisfies_expression")
            and node.named_children
        ):
            node = node.named_children[0]
        if name and name in self.constants and name not in self.changed:
            return self.constants[name]
        return node

    def _object(self, node: Node) -> dict[str, Node | None] | None:
        """Key → value of an object literal; `...` where more is spread into it; None if it is none."""
        node = self._resolve(node)
        if node.type != "object":
            return None
        result: dict[str, Node | None] = {}
        for child in node.named_children:
            if child.type == "pair":
                key, value = child.child_by_field_name("key"), child.child_by_field_name("value")
                name = text_of(key).strip("\"'`") if key is not None else _MORE
                result[name if not name.startswith("[") else _MORE] = value
            elif child.type == "shorthand_property_identifier":
                result[text_of(child)] = None
            elif child.type == "method_definition":
                continue
            elif child.type != "comment":
                result[_MORE] = None
        return result

    def _value(self, node: Node) -> Any:
        """A constant; `...` if it is not known."""
        node = self._resolve(node)
        text = text_of(node)
        if node.type == "string" or (node.type == "template_string" and "${" not in text):
            return text[1:-1]
        if node.type in ("null", "undefined"):
            return None
        if node.type in ("number", "unary_expression"):
            try:
                return float(text.replace("_", ""))
            except ValueError:
                return _MORE
        return _MORE

    def _tail(self, node: Node) -> str:
        """How a text ends."""
        node = self._resolve(node)
        if node.type == "binary_expression":
            right = node.child_by_field_name("right")
            return self._tail(right) if right is not None and right.type != "binary_expression" else ""
        if node.type in ("string", "template_string"):
            return text_of(node)[1:-1].rpartition("}")[2]
        return ""

    def _at(self, node: Node, rule: Rule, what: str) -> Finding:
        line, column = self.places.of(*node.start_point)
        return Finding(rule, self.path, line, column, what)


def _counted(node: Node) -> bool:
    """An `if` that counts and leaves the loop."""
    if node.type != "if_statement":
        return False
    condition = node.child_by_field_name("condition")
    leaves = re.search(r"\b(break|return|throw)\b", text_of(node)) is not None
    return leaves and condition is not None and _COUNTS.search(text_of(condition)) is not None
