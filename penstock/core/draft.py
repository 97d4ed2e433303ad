"""A plan in the making: what is left of the step's token budget, and who has got which part of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .plan import Admission, Copy, PlanItem
from .request import Request

PROMPT_TOKENS_PER_DECODE = 4
"""Where prompts are limited in a step that also decodes, each request that decodes lets so many more pass: it
makes the step longer by itself, and more prompts wait behind more requests."""


@dataclass(slots=True)
class Draft:
    """One step."""

    budget: int
    """Tokens left."""
    prompts: int
    """Tokens that prompts may still take, as far as the budget goes."""
    requests: list[Request] = field(default_factory=list)
    items: list[PlanItem] = field(default_factory=list)
    """One for each of `requests`."""
    admitted: list[Admission] = field(default_factory=list)
    swap_in: list[Copy] = field(default_factory=list)
    preempted: bool = False
    """Whether somebody had to yield who is waited for: then nobody is admitted."""
    squeezed: bool = False
    """Whether background work had to yield: then none is admitted."""

    @property
    def room(self) -> int:
        """Tokens left for prompts."""
        return min(self.budget, self.prompts)

    def limit_prompts(self, most: int) -> None:
        """Prompts take at most so many tokens beside the decodes planned so far, and some for each; 0 is
        no limit."""
        if most and self.items:
            self.prompts = most + PROMPT_TOKENS_PER_DECODE * len(self.items)

    def decode(self, request: Request, item: PlanItem) -> None:
        """Plan the next token of a request."""
        self.budget -= item.tokens
        self.requests.append(request)
        self.items.append(item)

    def put(self, request: Request, item: PlanItem) -> None:
        """Plan any item."""
        self.prompts -= _of_prompt(item)
        self.decode(request, item)

    def drop(self, request: Request) -> None:
        """Take back what was planned for this request, if anything was."""
        if request in self.requests:
            place = self.requests.index(request)
            del self.requests[place]
            item = self.items.pop(place)
            self.budget += item.tokens
            self.prompts += _of_prompt(item)


def _of_prompt(item: PlanItem) -> int:
    """Its tokens that count as a prompt's; the last one of a prompt counts as decode."""
    decodes = item.samples or item.pools
    return item.tokens if not decodes or item.tokens > max(1, item.samples) else 0
