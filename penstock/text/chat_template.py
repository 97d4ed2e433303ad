"""Messages to the text of a prompt, by the model's own jinja2 template, in a sandbox.

The semantics are those of `apply_chat_template` in transformers (`utils/chat_template_utils.py`): block
trimming, `tojson` without HTML escaping, `raise_exception`, `strftime_now`, loop controls, the
`{% generation %}` tag, the special tokens as variables, and `continue_final_message`.

A template comes from a model repository, or from a request where the operator allows it: it is untrusted
code. It runs in jinja2's ImmutableSandboxedEnvironment and sees nothing but plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from penstock.core.errors import InvalidRequest, ModelLoadError

from .tokenizer import Tokenizer

_DEFAULT = "default"
_TOOL_USE = "tool_use"
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning; templates read the first."""


class ChatTemplate:
    """The templates of one model, compiled. Safe to use from several threads."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str | list[str]] | None = None,
        *,
        source: str = "the chat template",
    ) -> None:
        """Compile `templates` (by name; the usual one is called "default", one for tools "tool_use").

        Args:
            templates: may be empty: then `render` says how to give one.
            special_tokens: variables that every template sees (`bos_token`, …).
            source: what to call the templates in errors.

        Raises:
            ModelLoadError: a template has a syntax error.
        """
        self.sources = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        for name, text in self.sources.items():
            try:
                _compile(text)
            except jinja2.TemplateSyntaxError as error:
                named = source if name == _DEFAULT else f"{source} {name!r}"
                raise ModelLoadError(
                    f"{named} has a syntax error in line {error.lineno}: {error.message}.",
                    advice="Correct it, or give another one with --chat-template.",
                    param="chat_template",
                ) from error

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate:
        """The model's templates, or `override` in their place.

        Args:
            override: value of --chat-template: a file, or the template itself.

        Raises:
            ModelLoadError: the file does not exist or cannot be read, or a template has a syntax error.
        """
        if override is None:
            return cls(tokenizer.chat_templates, tokenizer.special_tokens, source="the model's chat template")
        return cls.from_override(override, tokenizer.special_tokens)

    @classmethod
    def from_override(
        cls, override: str, special_tokens: Mapping[str, str | list[str]] | None = None
    ) -> ChatTemplate:
        """The template of --chat-template, without the model's. Raises as `from_tokenizer`."""
        return cls({_DEFAULT: _read(override)}, special_tokens, source="the template of --chat-template")

    @property
    def available(self) -> bool:
        """Whether there is any template."""
        return bool(self.sources)

    @property
    def content_format(self) -> Literal["string", "openai"]:
        """What the template expects as a message's content: a string, or OpenAI's list of parts."""
        text = self.sources.get(_DEFAULT) or next(iter(self.sources.values()), "")
        return "openai" if _loops_over_content(_compile(text).environment.parse(text)) else "string"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text; encode it without special tokens, which the template has written itself.

        Args:
            messages: at least one; keys with the value None are left out, as in transformers.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open, to be continued.
            tools: JSON schemas of functions.
            documents: for retrieval templates.
            chat_template: a template, or the name of one of the model's, in place of the usual one.
            **kwargs: more variables (`chat_template_kwargs`), like `enable_thinking`.

        Raises:
            InvalidRequest: no template, a template that fails or refuses the messages (with its message), or
                arguments that contradict each other.
        """
        if not messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.",
                param="continue_final_message",
                advice="Set add_generation_prompt to false to continue the last message.",
            )
        if "messages" in kwargs:
            raise InvalidRequest(
                "chat_template_kwargs must not contain 'messages'.", param="chat_template_kwargs"
            )
        text = self._choose(chat_template, tools is not None)
        chat = [_message(message) for message in messages]
        final = _mark_end(chat[-1], text) if continue_final_message else ""
        try:
            rendered = _compile(text).render(
                messages=chat,
                tools=_plain(tools),
                documents=_plain(documents),
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **_plain(kwargs)},
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise _failure(error) from error
        return _cut_at_mark(rendered, final) if continue_final_message else rendered

    def _choose(self, wanted: str | None, has_tools: bool) -> str:
        if wanted is not None:
            return self.sources.get(wanted, wanted)
        if has_tools and _TOOL_USE in self.sources:
            return self.sources[_TOOL_USE]
        if _DEFAULT in self.sources:
            return self.sources[_DEFAULT]
        if self.sources:
            raise InvalidRequest(
                f"the model has several chat templates ({', '.join(sorted(self.sources))}) and no default.",
                param="chat_template",
                advice="Start the server with --chat-template and the one to use.",
            )
        raise InvalidRequest(
            "the model has no chat template, so chat messages cannot be turned into a prompt.",
            param="messages",
            advice="Use /v1/completions, or start the server with --chat-template FILE.",
        )


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, a mark for training: here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict(…)` and `dict.fromkeys` without the class itself, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(…)` that keeps no name with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that a template may store the name "self"
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the private name {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=64)
def _compile(text: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(text)


def _read(value: str) -> str:
    """The template that --chat-template means."""
    if "\n" in value or "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(
            f"--chat-template {value}: {error}.",
            advice="Give the path of a jinja file, or a template that contains '{{' or '{%'.",
            param="chat_template",
        ) from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A fresh plain copy, without keys of value None, with reasoning under the names that templates read."""
    plain: dict[str, Any] = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """A copy in exact JSON types: methods of any other class could lead out of the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _mark_end(message: dict[str, Any], template: str) -> str:
    """Append the mark to the message's text, in place; return the text without it."""
    content = message.get("content")
    if content is None or "content" not in template:
        raise InvalidRequest(
            "continue_final_message is set, but the last message has no content to continue.",
            param="continue_final_message",
        )
    if isinstance(content, str):
        message["content"] = content + _TAG
        return content
    for part in reversed(content):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _TAG
            return text
    raise InvalidRequest(
        "continue_final_message is set, but the last message has no text part to continue.",
        param="continue_final_message",
    )


def _cut_at_mark(rendered: str, final: str) -> str:
    at = rendered.rfind(_TAG.strip())
    if at < 0 or final.strip() not in rendered:
        raise InvalidRequest(
            "continue_final_message is set, but the chat template drops or changes the last message.",
            param="continue_final_message",
        )
    if rendered.startswith(_TAG, at):
        return rendered[:at]
    return rendered[:at].rstrip()  # the template trims messages, so it would have trimmed this one's end


def _failure(error: Exception) -> InvalidRequest:
    if isinstance(error, jinja2.TemplateSyntaxError):  # of a template that came with the request
        return InvalidRequest(
            f"chat_template has a syntax error in line {error.lineno}: {error.message}.",
            param="chat_template",
        )
    if type(error) is jinja2.TemplateError:  # its author's own words, through raise_exception
        return InvalidRequest(f"the chat template refuses these messages: {error}", param="messages")
    return InvalidRequest(
        f"the chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
    )


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether some `for` runs over a message's content, directly or through a variable."""
    aliases = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset())
    }
    names = frozenset(aliases)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, aliases: frozenset[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node, aliases)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in aliases
