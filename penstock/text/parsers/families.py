"""Which parser a name of --tool-call-parser or --reasoning-parser means."""

from __future__ import annotations

from .deepseek import DeepSeekV3, DeepSeekV31
from .harmony import GptOss, Harmony
from .hermes import Hermes
from .llama import Llama3Json
from .mistral import Mistral
from .pythonic import Pythonic
from .qwen_coder import Qwen3Coder
from .reasoning import DeepSeekR1, Qwen3, ReasoningParser
from .tools import ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "mistral": Mistral,
    "openai": Harmony,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
    "qwen3_json": Hermes,
    "qwen3_xml": Qwen3Coder,
}
"""By the name of --tool-call-parser, as vLLM's."""

REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "deepseek_r1": DeepSeekR1,
    "openai_gptoss": GptOss,
    "qwen3": Qwen3,
}
"""By the name of --reasoning-parser, as vLLM's."""
