"""Messages to the text of a prompt, by the model's own jinja2 template.

The semantics are those of `apply_chat_template` in transformers: the special tokens as variables, named
templates, `continue_final_message`; and of `jinja_sandbox`, in which a template runs.

A template comes from a model repository, or from a request where the operator allows it: it is untrusted
code. It runs in a process of its own (`template_pool`), which is ended when it takes too long or too much.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from penstock.core.errors import InvalidRequest, ModelLoadError, quote
from penstock.files import TEMPLATE_BYTES, read_text, shown

from .template_pool import Limits, TemplateError, pool
from .tokenizer import Tokenizer

_WORD = re.compile(r"\w+")
_DEFAULT = "default"
_TOOL_USE = "tool_use"
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning; templates read the first."""


class ChatTemplate:
    """The templates of one model. Safe to use from several threads."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str | list[str]] | None = None,
        *,
        source: str = "the chat template",
        limits: Limits | None = None,
    ) -> None:
        """Check `templates` (by name; the usual one is called "default", one for tools "tool_use").

        Args:
            templates: may be empty: then `render` says how to give one.
            special_tokens: variables that every template sees (`bos_token`, …).
            source: what to call the templates in errors.
            limits: of each run.

        Raises:
            ModelLoadError: a template has a syntax error, or cannot be compiled within its limits.
        """
        self._source = source
        self._limits = limits or Limits()
        self.sources = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self.words = frozenset(word for text in self.sources.values() for word in words(text))
        """What occurs in them: a key of a message that is none of these is read by none."""
        self._formats = {name: self._inspect(name, text) for name, text in self.sources.items()}

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, override: str | None = None, limits: Limits | None = None
    ) -> ChatTemplate:
        """The model's templates, or `override` in their place.

        Args:
            override: value of --chat-template: a file, or the template itself.
            limits: of each run.

        Raises:
            ModelLoadError: the file does not exist or cannot be read, or a template has a syntax error.
        """
        templates, source = tokenizer.chat_templates, "the model's chat template"
        if override is not None:
            templates, source = {_DEFAULT: read_override(override)}, "the template of --chat-template"
        return cls(templates, tokenizer.special_tokens, source=source, limits=limits)

    def for_context(self, tokens: int) -> ChatTemplate:
        """The same, for a server whose contexts have so many tokens: that bounds the output."""
        other = copy.copy(self)
        other._limits = Limits.for_context(self._limits.seconds, tokens)
        return other

    @property
    def available(self) -> bool:
        """Whether there is any template."""
        return bool(self.sources)

    @property
    def content_format(self) -> Literal["string", "openai"]:
        """What the template expects as a message's content: a string, or OpenAI's list of parts."""
        formats = self._formats
        if _DEFAULT in formats:
            return formats[_DEFAULT]
        return next(iter(formats.values()), "string")

    async def render_async(self, messages: Sequence[Mapping[str, Any]], /, **arguments: Any) -> str:
        """`render`, without holding up the event loop. Raises what it raises, and Unavailable."""
        return await pool().in_thread(self._limits, functools.partial(self.render, messages, **arguments))

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
        final = ""
        if continue_final_message:
            chat[-1], final = _marked(chat[-1], text)
        variables = {
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **kwargs,
        }
        try:
            rendered = self._run(text, variables)
        except TemplateError as error:
            raise self._failure(error, text) from error
        return _cut_at_mark(rendered, final) if continue_final_message else rendered

    def _run(self, text: str, variables: Mapping[str, Any]) -> str:
        try:
            return pool().run(text, variables, self._limits)
        except ValueError:  # no plain JSON: its copy is
            pass
        try:
            return pool().run(text, _plain(variables), self._limits)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("the messages are nested too deeply.", param="messages") from error

    def _inspect(self, name: str, text: str) -> Literal["string", "openai"]:
        """Compile a template where that can be stopped; what it expects as a message's content."""
        named = self._source if name == _DEFAULT else f"{self._source} {shown(name)}"
        advice = "Correct it, or give another one with --chat-template."
        if len(text) > TEMPLATE_BYTES:
            raise ModelLoadError(
                f"{named} has {len(text):,} characters; at most {TEMPLATE_BYTES:,} are compiled.",
                advice=advice,
                param="chat_template",
            )
        try:
            found = pool().run(text, None, self._limits)
        except TemplateError as error:
            what = {
                "syntax": f"has a syntax error in line {error.line}: {error}",
                "time": f"is not compiled after {self._limits.seconds:g} s",
                "memory": f"takes more than {self._limits.memory >> 20} MiB to compile",
            }.get(error.kind, f"cannot be compiled: {error}")
            raise ModelLoadError(f"{named} {what}.", advice=advice, param="chat_template") from error
        return "openai" if found == "openai" else "string"

    def _failure(self, error: TemplateError, text: str) -> InvalidRequest:
        """What to tell the client."""
        own = text not in self.sources.values()
        named = "the request's chat_template" if own else self._source
        param = "chat_template" if own else "messages"
        limits = self._limits
        if error.kind == "syntax":  # of a template that came with the request
            return InvalidRequest(
                f"chat_template has a syntax error in line {error.line}: {error}.", param="chat_template"
            )
        if error.kind == "refused":  # its author's own words, through raise_exception
            return InvalidRequest(f"the chat template refuses these messages: {error}", param="messages")
        if error.kind == "time":
            return InvalidRequest(
                f"{named} was stopped after {limits.seconds:g} s on these messages.",
                param=param,
                advice="The server's limit is set by --chat-template-timeout.",
            )
        if error.kind == "length":
            return InvalidRequest(
                f"{named} makes more than {limits.characters:,} characters of these messages, which no "
                "context of this server holds.",
                param=param,
            )
        if error.kind == "memory":
            return InvalidRequest(
                f"{named} takes more than {limits.memory >> 20} MiB on these messages.", param=param
            )
        return InvalidRequest(f"the chat template fails on these messages: {error}", param="messages")

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
            advice="Send a text (prompt, input), or start the server with --chat-template FILE.",
        )


def words(text: str) -> set[str]:
    """The words of a template: letters, digits and underscores."""
    return set(_WORD.findall(text))


def read_override(value: str) -> str:
    """The template that --chat-template means."""
    if "\n" in value or "{" in value:
        return value
    path = Path(value)
    try:
        # the operator's own file: it may lie anywhere
        return read_text(path, TEMPLATE_BYTES, root=Path(path.anchor or "."))
    except ModelLoadError as error:
        raise ModelLoadError(
            f"--chat-template {shown(path)}: {error.message}",
            advice="Give the path of a jinja file, or a template that contains '{{' or '{%'.",
            param="--chat-template",
        ) from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without keys of value None, with reasoning under the names that templates read."""
    plain: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_call(call) for call in plain["tool_calls"]]
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _call(call: Any) -> Any:
    """A call of a tool with its arguments as an object, which templates want, and not as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"the arguments of a call of {quote(function.get('name'))} are no JSON: {error}.",
            param="messages",
        ) from error
    return {**call, "function": {**function, "arguments": arguments}}


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


def _marked(message: dict[str, Any], template: str) -> tuple[dict[str, Any], str]:
    """(a copy of the message with the mark at the end of its text, the text without it)"""
    content = message.get("content")
    if content is None or "content" not in template:
        raise InvalidRequest(
            "continue_final_message is set, but the last message has no content to continue.",
            param="continue_final_message",
        )
    if isinstance(content, str):
        return message | {"content": content + _TAG}, content
    parts = list(content)
    for number, part in reversed(list(enumerate(parts))):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            text: str = part["text"]
            parts[number] = {**part, "text": text + _TAG}
            return message | {"content": parts}, text
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
