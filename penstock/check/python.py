"""Python that calls models: with the SDKs of OpenAI and Anthropic, LiteLLM, LangChain, or plain HTTP.

Only what stands in the text is judged. A value that comes from elsewhere (a parameter, `**options`, a name
that is assigned twice) is unknown, and no finding.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from . import commands, python_loops, python_prompts, shell
from .calls import (
    DYNAMIC,
    KEYLESS,
    LIMITS,
    LOOP,
    TRAINING,
    UNBOUNDED,
    UNTAGGED,
    body_findings,
    limit_problem,
)  # fmt: skip
from .clients import ENDPOINT
from .engines import FLAG_UNKNOWN, FLAG_VALUE, KEY, LONG, LONG_CONTEXT, TRUST
from .finding import Finding, Rule, Word
from .flags import RANGES, vllm
from .python_names import UNKNOWN, Names, chain
from .words import Place, is_placeholder, secret_in

_CHATS = (
    ".chat.completions.create",
    ".chat.completions.parse",
    ".chat.completions.stream",
    ".ChatCompletion.create",
    ".ChatCompletion.acreate",
)
_RESPONSES = (".responses.create", ".responses.parse", ".responses.stream")
_OTHERS = (".messages.create", ".messages.stream", ".completions.create", ".Completion.create")
_LITELLM = frozenset(("completion", "acompletion", "text_completion", "atext_completion"))
_LANGCHAIN = frozenset(("ChatOpenAI", "AzureChatOpenAI", "BaseChatOpenAI", "ChatLiteLLM", "VLLMOpenAI"))
_CLIENTS = frozenset(
    "OpenAI AsyncOpenAI AzureOpenAI AsyncAzureOpenAI Anthropic AsyncAnthropic ChatOpenAI VLLMOpenAI "
    "OpenAIChatModel OpenAIProvider".split()
)
_TURNS = frozenset(
    "max_iterations max_iter max_turns max_steps max_round max_rounds max_consecutive_auto_reply "
    "recursion_limit".split()
)
_TELLING = re.compile(
    r"openai|anthropic|litellm|completion|/v1/|vllm|penstock|trust_remote_code|max_(?:iter|turns|steps|round|consec)|"
    r"recursion_limit|[\"']system[\"']|\bsystem\s*=|system_prompt|instructions",
    re.IGNORECASE,
)
"""What a text has, where any of these rules may find something."""
_MANY_TURNS = 1000
_SENDS = frozenset(("post", "request", "stream", "fetch"))
_RUNS = frozenset("run Popen call check_call check_output create_subprocess_exec execvp".split())


def examine(text: str, path: str, *, line: int = 1) -> Iterator[Finding]:
    """What is wrong with a module, or a code block.

    Args:
        line: the number of its first line in the file.
    """
    if not _TELLING.search(text):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in somebody's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # an excerpt, or another Python
        return
    yield from _Module(tree, path, line - 1).findings()


class _Module:
    def __init__(self, tree: ast.Module, path: str, shift: int) -> None:
        self.path = path
        self.shift = shift
        self.nodes = list(ast.walk(tree))
        self.names = Names(self.nodes)
        self.calls: list[ast.Call] = []
        """Calls of models."""
        self.whole: set[int] = set()
        """Lists that are run as they stand."""

    def findings(self) -> Iterator[Finding]:
        clients: list[ast.Call] = []
        tagged = False
        for node in self.nodes:
            if isinstance(node, ast.List | ast.Tuple) and _starts_a_server(node):
                yield from self._command(node.elts, whole=id(node) in self.whole)
            if not isinstance(node, ast.Call):
                continue
            name = chain(node.func)
            last = name.rpartition(".")[2]
            tagged = tagged or self._is_tagged(node)
            if self._is_model_call(node, name):
                self.calls.append(node)
                yield from self._call(node, name)
            elif last in _SENDS and (url := self._url(node)) is not None:
                self.calls.append(node)
                yield from self._sent(node, url, name)
            elif last in _CLIENTS:
                clients.append(node)
                yield from self._client(node, last)
            elif last == "LLM" and self.names.imported(node.func, "vllm"):
                yield from self._offline(node)
            elif last in _RUNS or name in ("os.system", "os.popen"):
                yield from self._process(node)
            elif last == "from_pretrained":
                yield from self._trust(node)
            yield from self._turns(node)
        for client in clients if not tagged else ():
            if self._keyword(client, "base_url") is not None and not _is_spread(client):
                yield self._at(client, UNTAGGED, "This client sends no feature tag.")
        loops = python_loops.loops(self.nodes, self.calls)
        for loop in loops:
            yield self._at(loop, LOOP, "Nothing counts the turns of this loop.")
        for at, what in python_prompts.dynamic(self.nodes, self.names):
            yield self._at(at, DYNAMIC, what)

    def _is_model_call(self, node: ast.Call, name: str) -> bool:
        dotted = f".{name}"
        if dotted.endswith((*_CHATS, *_RESPONSES, *_OTHERS)):
            return True
        last = name.rpartition(".")[2]
        if last in _LITELLM and self.names.imported(node.func, "litellm"):
            return True
        return last in _LANGCHAIN

    def _call(self, node: ast.Call, name: str) -> Iterator[Finding]:
        dotted = f".{name}"
        must = dotted.endswith((*_CHATS, *_RESPONSES)) or not (
            dotted.endswith(_OTHERS) or "text_completion" in name
        )
        given: dict[str, Any] = {
            keyword.arg: self.names.value(keyword.value) for keyword in node.keywords if keyword.arg
        }
        body = given.get("extra_body")
        if isinstance(body, dict):
            given = {**body, **given}
        if isinstance(given.get("model_kwargs"), dict):
            given = {**given["model_kwargs"], **given}
        if ("model_kwargs" in given and given["model_kwargs"] is UNKNOWN) or body is UNKNOWN:
            must = False
        bounds = [bound for bound in LIMITS if bound in given]
        if not bounds and must and not _is_spread(node):
            wanted = "max_output_tokens" if dotted.endswith(_RESPONSES) else "max_tokens"
            yield self._at(node, UNBOUNDED, f"{name.rpartition('.')[2]}() has no {wanted}.")
        for bound in bounds:
            problem = None if given[bound] is UNKNOWN else limit_problem(given[bound])
            if problem:
                yield self._at(self._keyword(node, bound) or node, UNBOUNDED, f"{bound} is {problem}.")
        if name.rpartition(".")[2] in _LANGCHAIN:
            yield from self._client(node, name.rpartition(".")[2])

    def _url(self, node: ast.Call) -> str | None:
        """The URL that is sent to, if it is a model's."""
        for argument in (*node.args[:2], *filter(None, [self._keyword(node, "url")])):
            text = self.names.tail(argument)
            if text is not None and ENDPOINT.search(text):
                return text
        return None

    def _sent(self, node: ast.Call, url: str, name: str) -> Iterator[Finding]:
        if _is_spread(node):
            return
        body = self._keyword(node, "json")
        value = self.names.value(body) if body is not None else UNKNOWN
        if isinstance(value, dict) and "..." not in value:
            for rule, what, fix in body_findings(value, url):
                yield self._at(body or node, rule, what, fix)
        headers = self._keyword(node, "headers")
        if headers is None and self.names.is_bare_sender(node.func) and self._keyword(node, "auth") is None:
            yield self._at(node, KEYLESS, f"{name}() sends no Authorization header.")
        elif headers is not None:
            sent = self.names.value(headers)
            if isinstance(sent, dict) and "..." not in sent:
                known = {str(key).lower() for key in sent}
                if not known & {"authorization", "x-api-key", "api-key"} and self.names.is_bare_sender(
                    node.func
                ):
                    yield self._at(headers, KEYLESS, "The headers have no Authorization.")
                for each in sent.values():
                    if isinstance(each, str) and (start := secret_in(each)) is not None:
                        yield self._at(headers, KEY, f"It looks like a key: {start}")

    def _client(self, node: ast.Call, name: str) -> Iterator[Finding]:
        for key in ("api_key", "openai_api_key", "auth_token"):
            given = self._keyword(node, key)
            value = self.names.value(given) if given is not None else UNKNOWN
            if given is None or not isinstance(value, str):
                continue
            if (start := secret_in(value)) is not None:
                yield self._at(given, KEY, f"It looks like a key: {start}")
            elif value.lower() in _NO_KEYS or not is_placeholder(value):
                yield self._at(given, KEYLESS, f"{name}() gets the key {value!r}, which is written here.")

    def _offline(self, node: ast.Call) -> Iterator[Finding]:
        """`vllm.LLM(…)`: its arguments are the engine's flags."""
        table = vllm()
        yield from self._trust(node)
        for keyword in node.keywords:
            if keyword.arg is None:
                continue
            flag = "--" + keyword.arg.replace("_", "-")
            value = self.names.value(keyword.value)
            if flag not in table.names:
                near = table.nearest(flag)
                if near is not None:
                    fix = f"Write {near[2:].replace('-', '_')}."
                    yield self._at(keyword, FLAG_UNKNOWN, f"vLLM's LLM has no {keyword.arg}.", fix)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                least, most, about = RANGES.get(flag, (float("-inf"), float("inf"), ""))
                if not least <= value <= most:
                    yield self._at(keyword, FLAG_VALUE, f"{keyword.arg}={value}: it {about}.")
                elif flag == "--max-model-len" and value >= LONG_CONTEXT:
                    yield self._at(keyword, LONG, f"{keyword.arg}={value:,} tokens.")

    def _trust(self, node: ast.Call) -> Iterator[Finding]:
        given = self._keyword(node, "trust_remote_code")
        if isinstance(given, ast.Constant) and given.value is True:
            yield self._at(given, TRUST, "trust_remote_code=True is given.")

    def _turns(self, node: ast.Call) -> Iterator[Finding]:
        for keyword in node.keywords:
            if keyword.arg in _TURNS and not TRAINING & {each.arg for each in node.keywords}:
                value = self.names.value(keyword.value)
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if value is None or (is_number and (value < 0 or value >= _MANY_TURNS)):
                    yield self._at(keyword, LOOP, f"{keyword.arg}={value} bounds nothing.")

    def _process(self, node: ast.Call) -> Iterator[Finding]:
        """A command that is started: a text, or words that are arguments. Lists are looked at elsewhere."""
        if not node.args:
            return
        first = node.args[0]
        if isinstance(first, ast.List | ast.Tuple):
            self.whole.add(id(first))
        elif len(node.args) > 1:
            yield from self._command(node.args, whole=True)
        elif isinstance(first, ast.Constant | ast.JoinedStr):
            text = self.names.text(first)
            if "\n" not in text:
                yield from shell.examine(
                    text, self.path, line=first.lineno + self.shift, column=first.col_offset + 2
                )

    def _command(self, items: Sequence[ast.expr], *, whole: bool) -> Iterator[Finding]:
        """The words of a command line.

        Args:
            whole: that it has no others, as a list that is extended later would have.
        """
        words = []
        for item in items:
            text = self.names.text(item) if not isinstance(item, ast.Starred) else "$more"
            words.append(Word(text, item.lineno + self.shift, item.col_offset + 2))
        if len(words) > 2 and words[1].text == "-m" and words[0].text == "$x":  # sys.executable
            words[0] = replace(words[0], text="python")
        if not whole:
            words.append(replace(words[-1], text="$more"))
        yield from commands.examine(words, self.path, place=Place.SHELL)

    def _is_tagged(self, node: ast.Call) -> bool:
        """Whether a call sends a feature tag, or headers that are not known."""
        for name in ("extra_headers", "default_headers", "headers"):
            given = self._keyword(node, name)
            if given is None:
                continue
            value = self.names.value(given)
            if (
                not isinstance(value, dict)
                or any("feature" in str(key).lower() for key in value)
                or "..." in value
            ):
                return True
        return False

    def _keyword(self, node: ast.Call, name: str) -> ast.expr | None:
        return next((keyword.value for keyword in node.keywords if keyword.arg == name), None)

    def _at(self, node: ast.AST, rule: Rule, what: str, fix: str = "") -> Finding:
        line = getattr(node, "lineno", 1) + self.shift
        return Finding(rule, self.path, line, getattr(node, "col_offset", 0) + 1, what, fix)


_NO_KEYS = frozenset("empty none null dummy test fake unused ignored secret token key".split()) | {"", "-"}


def _starts_a_server(node: ast.List | ast.Tuple) -> bool:
    """Whether a list is the command line of a program that is known here."""
    texts = [each.value if isinstance(each, ast.Constant) else None for each in node.elts[:3]]
    first, second, third = (*texts, None, None, None)[:3]
    if first in ("vllm", "penstock"):
        return second == "serve"
    if second == "-m":
        return third == "penstock" or (isinstance(third, str) and third.startswith("vllm.entrypoints"))
    return first in ("docker", "podman") and second == "run"


def _is_spread(node: ast.Call) -> bool:
    """Whether more arguments may come from somewhere."""
    return any(keyword.arg is None for keyword in node.keywords)
