"""From what a request asks for to what reads the model's text, and to the grammar that holds it to calls.

    ToolUse, prompt ─ reading ─▶ Reading ─┬─ parser: of each choice
                                          └─ outputs: what the model must write, if anything

A grammar begins where a thought ends. It knows the server's families of models (--tool-call-parser,
--reasoning-parser) and what the prompt ends with. Every dialect that answers chats uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.core.sampling_params import SamplingParams
from penstock.core.structured import StructuredOutputsParams
from penstock.grammar.schema import examine, loads
from penstock.text.parsers.families import REASONING_PARSERS, TOOL_PARSERS
from penstock.text.parsers.forms import Format, arguments_schema, calls, either, not_held, text_and_calls
from penstock.text.parsers.message import MessageParser
from penstock.text.parsers.reasoning import ReasoningParser
from penstock.text.parsers.tools import ToolParser
from penstock.text.thoughts import thought_limit
from penstock.text.tokenizer import Tokenizer

from .config import ServerConfig
from .structured import TOOLS
from .tools import ToolUse

_WHITESPACE = " ?"
"""Between the parts of arguments: as models write them, on one line."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the choices of a request are read."""

    tools: ToolUse | None
    tool_parser: type[ToolParser] | None
    """None where nothing may be called."""
    reasoning_parser: type[ReasoningParser] | None
    thinking: bool
    """Whether an answer begins inside of a thought."""
    outputs: StructuredOutputsParams | None
    """What the model must write: what the request asks for, and calls."""
    trusted: bool
    """Whether that leaves nothing but whole calls."""
    skipped: tuple[str, ...] = ()
    """Keywords of tools' schemas that it does not enforce."""

    @property
    def parser(self) -> Callable[[], MessageParser] | None:
        """Makes the parser of one choice; None where all that the model writes is text."""
        return None if self.tool_parser is None and self.reasoning_parser is None else self._make

    def _make(self) -> MessageParser:
        tools, use = None, self.tools
        if self.reasoning_parser is not None and self.reasoning_parser.together is not None:
            tools = self.reasoning_parser.whole(
                () if use is None else use.callable,
                trusted=self.trusted,
                single=use is not None and use.single,
                thinking=self.thinking,
                calling=self.tool_parser is not None,
            )
            return MessageParser(tools=tools)
        if self.tool_parser is not None and use is not None:
            tools = self.tool_parser(use.callable, trusted=self.trusted, single=use.single)
        reasoning = None
        if self.reasoning_parser is not None:
            # where a grammar begins behind the thought, nothing is called in it
            marks = self.tool_parser.marks if self.tool_parser is not None and self.outputs is None else ()
            reasoning = self.reasoning_parser(self.thinking, marks)
        return MessageParser(reasoning, tools)


def reading(
    config: ServerConfig,
    tokenizer: Tokenizer,
    tools: ToolUse | None,
    prompt: str,
    template_kwargs: Mapping[str, Any],
    outputs: StructuredOutputsParams | None,
    *,
    continued: bool = False,
) -> Reading:
    """How the answers to a prompt are read.

    Args:
        config: names the families.
        tokenizer: of the model.
        tools: those of the request.
        prompt: its text, as the chat template made it.
        template_kwargs: what the template was told; `enable_thinking` (or `thinking`) false means no thought.
        outputs: what the request asks of the model's output.
        continued: the prompt ends in the middle of an answer.

    Raises InvalidRequest for schemas of strict tools that cannot be enforced.
    """
    parser = None
    if tools is not None and tools.choice != "none" and config.tool_call_parser:
        parser = TOOL_PARSERS[config.tool_call_parser]
    trusted, skipped = False, list[str]()
    if parser is not None and tools is not None:
        parser, outputs, trusted = _held(config, tokenizer, parser, tools, outputs, skipped)
    thinker = REASONING_PARSERS[config.reasoning_parser] if config.reasoning_parser else None
    enabled = all(template_kwargs.get(name) is not False for name in ("enable_thinking", "thinking"))
    thinking = thinker is not None and thinker.begins_thinking(prompt, enabled, continued)
    if thinker is not None and outputs is not None:
        outputs = _placed(outputs, thinker, thinking, config)
    return Reading(tools, parser, thinker, thinking, outputs, trusted, tuple(skipped))


def _placed(
    outputs: StructuredOutputsParams, thinker: type[ReasoningParser], thinking: bool, config: ServerConfig
) -> StructuredOutputsParams:
    """Behind the thought."""
    called = outputs.field == TOOLS
    if opening := thinker.opening(
        thinking, "" if called else "said_json" if outputs.kind in ("json", "json_object") else "said"
    ):
        return replace(outputs, before=opening)
    if thinking and not (config.structured_outputs_config or {}).get("enable_in_reasoning"):
        return replace(outputs, after=thinker.end)
    return outputs


def with_budget(
    params: SamplingParams, config: ServerConfig, tokenizer: Tokenizer, *, begun: bool = False
) -> SamplingParams:
    """The parameters with what a thinking_token_budget is in tokens of the model.

    begun: whether answers begin inside of a thought, as far as the prompt says so.

    Raises InvalidRequest where the server has no reasoning parser, as vLLM does, and UnsupportedParameter
    where the model marks its thoughts with no token.
    """
    budget = params.thinking_token_budget
    if budget is None:
        return params
    if config.reasoning_parser is None:
        raise InvalidRequest(
            "thinking_token_budget requires --reasoning-parser to be set.",
            param="thinking_token_budget",
            advice="Start the server with it.",
        )
    family = REASONING_PARSERS[config.reasoning_parser]
    ending = (config.reasoning_config or {}).get("reasoning_end_str")
    return params.with_(thought=thought_limit(tokenizer, budget, family, begun=begun, ending=ending))


def _held(
    config: ServerConfig,
    tokenizer: Tokenizer,
    parser: type[ToolParser],
    tools: ToolUse,
    outputs: StructuredOutputsParams | None,
    skipped: list[str],
) -> tuple[type[ToolParser], StructuredOutputsParams | None, bool]:
    """(who reads the calls, what the model must write, whether that leaves only whole calls); what is not
    enforced goes into `skipped`"""
    # a model that is told of all tools calls some of them only where it cannot call others
    strict = any(tool.strict for tool in tools.callable) or tools.allowed is not None
    if tools.choice == "auto" and not strict and config.tool_strict_level == "auto" and outputs is None:
        return parser, None, False
    own = parser
    form = parser.form_for(lambda token: tokenizer.token_id(token) is not None)
    if form is None:  # the family's own form is no grammar
        if tools.choice == "auto" and outputs is None and tools.allowed is None:
            return parser, None, False
        parser = parser.forced or parser
        form = parser.form_for(lambda token: tokenizer.token_id(token) is not None)
    if form is None:
        return own, outputs, False
    schemas = {}
    for place, tool in enumerate(tools.tools):
        if tool not in tools.callable:
            continue
        where = f"tools[{place}].function.parameters"
        schema: Any = arguments_schema(tool.parameters)
        if tool.strict:
            schema, _ = examine(schema, True, where)
            if loose := not_held(form, schema):
                raise UnsupportedParameter(
                    f"{where}.{loose} cannot be enforced: {config.tool_call_parser} writes texts without "
                    "quotes.",
                    param=f"{where}.{loose}",
                    advice="Leave it out, or set strict to false.",
                )
        elif tools.choice == "auto" and config.tool_strict_level != "parameter":
            schema = {"type": "object"}
        else:
            schema, loosened = examine(schema, False, where)
            skipped += loosened
        schemas[tool.name] = schema
    if tools.must:  # as in vLLM, that wins over the form of what would be said instead
        tag: Format = calls(form, schemas, tools.single)
    elif outputs is None:
        tag = text_and_calls(form, schemas, tools.single)
    else:
        said = _said(outputs)
        if said is None:  # a structural tag says all of it
            return own, outputs, False
        tag = either(form, schemas, tools.single, said)
    held = StructuredOutputsParams(
        structural_tag={"format": tag}, strict=False, whitespace_pattern=_WHITESPACE, field=TOOLS
    )
    return parser, held, tools.must or form.sure


def _said(outputs: StructuredOutputsParams) -> Format | None:
    """What the request asks of the text, as a part of a structural tag; None where it is one."""
    match outputs.kind:
        case "json":
            return {"type": "json_schema", "json_schema": _schema(outputs.json)}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return {"type": "regex", "pattern": outputs.regex}
        case "grammar":
            return {"type": "grammar", "grammar": outputs.grammar}
        case "choice":
            return {"type": "or", "elements": [_constant(text) for text in outputs.choice or ()]}
    return None


def _constant(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _schema(given: Any) -> Any:
    return loads(given, "structured_outputs.json") if isinstance(given, str) else given
