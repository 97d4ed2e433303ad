"""Agent loops against the demo model's tool FAQ: by hand with the official clients, two agent libraries, and
all that the official clients for JavaScript do."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from .server import Server, serving

FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--served-model-name", "demo")
ASKED: list[tuple[str, dict[str, Any]]] = []
"""What the tools were asked, in order."""


def get_weather(city: str) -> str:
    """The weather in a city."""
    ASKED.append(("get_weather", {"city": city}))
    return {"Paris": "18 degrees and sunny", "London": "9 degrees and rainy"}[city]


def add(a: int, b: int) -> str:
    """The sum of two numbers."""
    ASKED.append(("add", {"a": a, "b": b}))
    return str(a + b)


def search(query: str) -> str:
    """Pages about something."""
    ASKED.append(("search", {"query": query}))
    return f"{query}: 3 results"


FUNCTIONS: dict[str, Callable[..., str]] = {"get_weather": get_weather, "add": add, "search": search}
TYPES = {
    "get_weather": {"city": "string"},
    "add": {"a": "integer", "b": "integer"},
    "search": {"query": "string"},
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": function.__doc__,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in TYPES[name].items()},
                "required": list(TYPES[name]),
            },
        },
    }
    for name, function in FUNCTIONS.items()
]

#: Question → what is called, and what the answer says.
QUESTIONS = [
    ("What is the weather in Paris?", [("get_weather", {"city": "Paris"})], "18 degrees and sunny"),
    ("What is 12 plus 30?", [("add", {"a": 12, "b": 30})], "42"),
    ("Search for Redis", [("search", {"query": "Redis"})], "3 results"),
    ("What is a Pod?", [], "container"),
]
asks = pytest.mark.parametrize(
    ("question", "called", "told"), QUESTIONS, ids=["weather", "add", "search", "faq"]
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving("--kv-cache-memory-bytes", "64MiB", *FLAGS, log=log) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    ASKED.clear()


def said(client: openai.OpenAI, stream: bool, **fields: Any) -> Any:
    """A choice, streamed or not."""
    if not stream:
        return client.chat.completions.create(model="demo", **fields).choices[0]
    with client.chat.completions.stream(model="demo", **fields) as events:
        for _ in events:
            pass
        return events.get_final_completion().choices[0]


def loop(client: openai.OpenAI, question: str, stream: bool) -> str:
    """What an agent does: ask, call, tell, until there is nothing to call."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(4):
        choice = said(client, stream, messages=messages, tools=TOOLS, temperature=0)
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        if not calls:
            return str(choice.message.content)
        messages.append(choice.message.to_dict())
        for call in calls:
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    raise AssertionError(f"still calling after 4 turns: {messages}")


@asks
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_by_hand(client: openai.OpenAI, question: str, called: list[Any], told: str, stream: bool) -> None:
    assert told in loop(client, question, stream)
    assert called == ASKED


def told_by_claude(client: anthropic.Anthropic, stream: bool, **fields: Any) -> Any:
    """A message, streamed or not."""
    fields |= {"model": "demo", "max_tokens": 200, "extra_body": {"temperature": 0}}
    if not stream:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as events:
        return events.get_final_message()


@pytest.mark.parametrize(("number", "stream"), [(0, False), (1, True), (2, False)])
def test_by_hand_with_anthropic(server: Server, number: int, stream: bool) -> None:
    question, called, told = QUESTIONS[number]
    messages: list[Any] = [{"role": "user", "content": question}]
    tools = [
        {"name": each["name"], "description": each["description"], "input_schema": each["parameters"]}
        for each in (tool["function"] for tool in TOOLS)
    ]
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=60) as client:
        for _ in range(4):
            answer = told_by_claude(client, stream, messages=messages, tools=tools)
            calls = [block for block in answer.content if block.type == "tool_use"]
            assert answer.stop_reason == ("tool_use" if calls else "end_turn")
            if not calls:
                break
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": FUNCTIONS[call.name](**call.input)}
                for call in calls
            ]
            assert all(call.id.startswith("toolu_") for call in calls)
            messages += [
                {"role": "assistant", "content": answer.content},
                {"role": "user", "content": results},
            ]
    assert told in "".join(block.text for block in answer.content)
    assert called == ASKED


@pytest.mark.parametrize(("number", "stream"), [(0, False), (1, True)])
def test_by_hand_with_responses(client: openai.OpenAI, number: int, stream: bool) -> None:
    question, called, told = QUESTIONS[number]
    tools = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"input": question}
    for _ in range(4):
        fields: dict[str, Any] = {"model": "demo", "tools": tools, "temperature": 0, **asked}
        if stream:
            with client.responses.stream(**fields) as events:
                answer: Any = events.get_final_response()
        else:
            answer = client.responses.create(**fields)
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            break
        results = [FUNCTIONS[call.name](**json.loads(call.arguments)) for call in calls]
        asked = {
            "previous_response_id": answer.id,
            "input": [
                {"type": "function_call_output", "call_id": call.call_id, "output": result}
                for call, result in zip(calls, results, strict=True)
            ],
        }
    assert told in answer.output_text
    assert called == ASKED


JAVASCRIPT = Path(__file__).parents[2] / ".tools" / "clients"


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
@pytest.mark.skipif(
    not (JAVASCRIPT / "node_modules" / "openai").is_dir(),
    reason="no clients for JavaScript in .tools; .ci/run puts them there",
)
def test_javascript(server: Server) -> None:
    pytest.importorskip("llguidance")
    script = Path(__file__).with_name("clients.mjs")
    command = ["node", str(script), server.url, str(JAVASCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    assert {check["name"]: check["error"] for check in checks if check["error"]} == {}, done.stderr
    assert len(checks) == 12, done.stdout + done.stderr


@asks
def test_openai_agents(server: Server, question: str, called: list[Any], told: str) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    agents.set_tracing_disabled(True)

    async def ask() -> str:
        async with agents.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60
        ) as client:
            agent = agents.Agent(
                name="demo",
                model=agents.OpenAIChatCompletionsModel(model="demo", openai_client=client),
                tools=[agents.function_tool(function) for function in FUNCTIONS.values()],
                model_settings=agents.ModelSettings(temperature=0),
            )
            return str((await agents.Runner.run(agent, question, max_turns=4)).final_output)

    assert told in asyncio.run(ask())
    assert called == ASKED


@asks
def test_langchain(server: Server, question: str, called: list[Any], told: str) -> None:
    pytest.importorskip("langgraph", reason="langgraph is not installed")
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    model = ChatOpenAI(
        model="demo", base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60, temperature=0
    )
    bound = model.bind_tools(list(FUNCTIONS.values()))
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode(list(FUNCTIONS.values())))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    messages = graph.compile().invoke({"messages": [("user", question)]})["messages"]
    assert told in messages[-1].content
    assert called == ASKED


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_must_be_called_is_called(client: openai.OpenAI, stream: bool) -> None:
    """Whatever was asked, and however the model is drawn: the arguments follow the schema."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["unit", "days"],
    }
    tool = {"type": "function", "function": {"name": "report", "parameters": schema}}
    for seed, choice in enumerate(["required", {"type": "function", "function": {"name": "report"}}] * 3):
        answer = said(
            client,
            stream,
            messages=[{"role": "user", "content": "What is a Pod?"}],
            tools=[*TOOLS, tool] if choice != "required" else [tool],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=2,
            seed=seed,
            max_tokens=200,
        )
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
        assert call.function.name == "report"
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == {"unit", "days"}
        assert arguments["unit"] in ("C", "F")
        assert 1 <= arguments["days"] <= 9
