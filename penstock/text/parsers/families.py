"""Which parser a name of --tool-call-parser means."""

from __future__ import annotations

from .deepseek import DeepSeekV3, DeepSeekV31
from .hermes import Hermes
from .llama import Llama3Json
from .mistral import Mistral
from .pythonic import Pythonic
from .qwen_coder import Qwen3Coder
from .tools import ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
    "qwen3_json": Hermes,
    "qwen3_xml": Qwen3Coder,
}
"""By the name of --tool-call-parser, as vLLM's."""
