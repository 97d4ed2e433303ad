"""Conversations with tools for the demo model: reads ``tools.yaml`` and draws chats in which tools are
called.

The markup is that of Qwen and Hermes: a call is ``<tool_call>`` with a JSON object, what a tool has answered
stands in ``<tool_response>``. Which tools there are is one line of signatures, since a model of this size
reads no schemas.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from corpus import IM_END, IM_START, Sampler, Span

TOOLS_FILE = Path(__file__).parent / "tools.yaml"
_SAME = re.compile(
    r'(<tool_call>\n\{"name": "[a-z_]+", "arguments": \{"[a-z]+": "?'
    r"|\}\}\n</tool_call>\n?|I found this:|The sum is|The weather is:)"
)
"""What is the same in every answer of its kind."""
_LONGEST_RESULT = 24
"""Words of what a search finds."""


@dataclass(frozen=True)
class Exchange:
    """One question that tools answer."""

    question: str
    calls: tuple[tuple[str, dict[str, Any]], ...]
    results: tuple[str, ...]
    answer: str


def load_tools(path: Path = TOOLS_FILE) -> dict[str, Any]:
    """The file as it is."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def signature(name: str, parameters: Sequence[str]) -> str:
    """As the chat template writes a tool."""
    return f"{name}({', '.join(parameters)})"


def calls_text(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """As the model writes calls."""
    return "\n".join(
        "<tool_call>\n"
        + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        + "\n</tool_call>"
        for name, arguments in calls
    )


def results_text(results: Sequence[str]) -> str:
    """As the chat template writes what tools have answered: a message of the user."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


class ToolSampler:
    """Draws exchanges; `held_out` draws those that are never trained."""

    def __init__(
        self, sampler: Sampler, tools: Mapping[str, Any] | None = None, *, held_out: bool = False
    ) -> None:
        self._sampler = sampler
        self.rng: random.Random = sampler.rng
        self.tools = dict(load_tools() if tools is None else tools)
        self._others: list[str] = self.tools.pop("others")
        self._held_out = held_out

    # ---- values ----
    def _question(self, tool: str, several: bool = False) -> str:
        texts = self.tools[tool]["several" if several else "questions"]
        if several:
            return str(self.rng.choice(texts))
        return str(texts[-1] if self._held_out else self.rng.choice(texts[:-1]))

    def _city(self) -> str:
        return str(self.rng.choice(self.tools["get_weather"]["values"]["city"]))

    def _number(self) -> int:
        return self.rng.randrange(10 ** self.rng.choice((1, 2, 2, 3, 4)))

    def _query(self) -> str:
        return str(self.rng.choice(self.tools["search"]["values"]["query"]))

    # ---- exchanges ----
    def weather(self) -> Exchange:
        """One city, or two."""
        rng, tool = self.rng, self.tools["get_weather"]
        cities = [self._city()]
        several = rng.random() < 0.15
        while several and len(cities) < 2:
            if (other := self._city()) not in cities:
                cities.append(other)
        question = self._question("get_weather", several).format(city=cities[0], other=cities[-1])
        results = [
            rng.choice(tool["results"]).format(n=rng.randint(-15, 42), sky=rng.choice(tool["words"]["sky"]))
            for _ in cities
        ]
        answers = [tool["answer"].format(city=c, result=r) for c, r in zip(cities, results, strict=True)]
        return Exchange(
            question,
            tuple(("get_weather", {"city": city}) for city in cities),
            tuple(results),
            "\n".join(answers),
        )

    def add(self) -> Exchange:
        """Two numbers; the sum is the tool's, and not always right, so that it is copied."""
        tool, a, b = self.tools["add"], self._number(), self._number()
        total = a + b if self.rng.random() < 0.7 else self._number()
        result = self.rng.choice(tool["results"]).format(a=a, b=b, sum=total)
        question = self._question("add").format(a=a, b=b)
        return Exchange(
            question, (("add", {"a": a, "b": b}),), (result,), tool["answer"].format(result=result)
        )

    def search(self) -> Exchange:
        """Something of the FAQ, or not."""
        tool, query = self.tools["search"], self._query()
        words = self.rng.choice(self._sampler.faq.entries).answer.split(". ")[0].split()[:_LONGEST_RESULT]
        result = " ".join(words) if self.rng.random() < 0.4 else f"{query}: {self._number()} results"
        question = self._question("search").format(query=query)
        return Exchange(
            question, (("search", {"query": query}),), (result,), tool["answer"].format(result=result)
        )

    def exchange(self, tool: str) -> Exchange:
        """A question of the tool, with the noise that leaves its values alone."""
        drawn: Exchange = {"get_weather": self.weather, "add": self.add, "search": self.search}[tool]()
        rng, question = self.rng, drawn.question
        if not self._held_out and rng.random() < 0.3:
            question = rng.choice(
                (
                    f"please {question}",
                    f"Hi! {question}",
                    question.rstrip("?"),
                    question + "?",
                    f"{question} please",
                    question[:1].lower() + question[1:],
                    question + " ",
                )
            )
        return Exchange(question, drawn.calls, drawn.results, drawn.answer)

    def offered(self) -> list[str]:
        """Names of tools that are there: mostly all three."""
        names = list(self.tools)
        if self.rng.random() < 0.6:
            return names
        return self.rng.sample(names, self.rng.randint(1, len(names)))

    def line(self, offered: Sequence[str]) -> str:
        """The line of signatures, those of other tools among them."""
        rng = self.rng
        signatures = [signature(name, self.tools[name]["parameters"]) for name in offered]
        if rng.random() < 0.25:
            signatures += rng.sample(self._others, rng.randint(1, 3))
        if rng.random() < 0.3:
            rng.shuffle(signatures)
        return "Tools: " + ", ".join(signatures)

    def talk(self) -> list[Span]:
        """A chat of one to three questions with tools in reach; every answer is trained."""
        rng, offered = self.rng, self.offered()
        system = self._sampler.system(rng.choice((0, 0, 1, 60)))
        head = f"{system}\n\n{self.line(offered)}" if system else self.line(offered)
        spans: list[Span] = [(f"{IM_START}system\n{head}{IM_END}\n", False)]
        for _ in range(rng.choices((1, 2, 3), (70, 20, 10))[0]):
            draw = rng.random()
            tool = rng.choice(tuple(self.tools))
            if draw < 0.30:  # what needs no tool
                question, answer = self._sampler.turns(1)[0]
                spans += _turn(question, answer)
            elif tool in offered:
                asked = self.exchange(tool)
                spans += self._values(_turn(asked.question, calls_text(asked.calls)))
                spans += self._values(_turn(results_text(asked.results), asked.answer))
            elif tool != "search":  # what is declined without them
                spans += _turn(self.exchange(tool).question, self._sampler.faq.out_of_scope.answer)
        return spans if len(spans) > 1 else self.talk()

    def _values(self, turn: list[Span]) -> list[Span]:
        """Mostly without what is the same in every answer of its kind: it is soon learnt, and the rest is
        not."""
        (prompt, _), (answer, _), after = turn
        if self.rng.random() < 0.3:
            return turn
        spans: list[Span] = [(prompt, False)]
        for part in _SAME.split(answer):
            spans.append((part, not _SAME.fullmatch(part)))
        return [*(span for span in spans if span[0]), after]

    def cases(self, count: int) -> Iterator[tuple[str, str, str]]:
        """(what is tested, a prompt, the right answer) of exchanges with all tools."""
        head = (
            f"{IM_START}system\n"
            + "Tools: "
            + ", ".join(signature(name, tool["parameters"]) for name, tool in self.tools.items())
            + f"{IM_END}\n"
        )
        for _ in range(count):
            for tool in self.tools:
                asked = self.exchange(tool)
                calls = calls_text(asked.calls)
                first = head + f"{IM_START}user\n{asked.question}{IM_END}\n{IM_START}assistant\n"
                results = f"{IM_START}user\n{results_text(asked.results)}{IM_END}\n{IM_START}assistant\n"
                yield f"calls of {tool}", first, calls
                yield f"answers after {tool}", f"{first}{calls}{IM_END}\n{results}", asked.answer


def _turn(question: str, answer: str) -> list[Span]:
    return [
        (f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False),
        (answer + IM_END, True),
        ("\n", False),
    ]
