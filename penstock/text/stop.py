"""Stop strings in a stream: found across any borders, and nothing held back that need not be.

It knows strings only. The match that *ends* first wins, and of those that end together the longest: so the
result does not depend on how the text is cut into deltas.

The stop strings are compiled once, into the automaton of Aho and Corasick (Communications of the ACM 18(6),
1975), which all sequences of a request share. A sequence keeps a state of it and that state's text: the
longest end of its text that begins a stop string. A match that is still to come starts there or later.

    text    ……… the answer is 42 <|e             stop string  <|end|>
                                 └ tail: may become a match, all before it cannot

The work of a delta is linear in its length, whatever the stop strings and however many they are; the
automaton is linear in their characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_NONE: Mapping[str, int] = {}


class StopStrings:
    """Some stop strings, none of them empty, compiled. Never changes."""

    def __init__(self, stops: Sequence[str]) -> None:
        after: list[dict[str, int]] = [{}]
        self.matched: list[str | None] = [None]
        """The longest stop string that ends in each state."""
        self.depth: list[int] = [0]
        """Characters of each state's text."""
        for stop in stops:
            state = 0
            for character in stop:
                reached = after[state].get(character)
                if reached is None:
                    reached = after[state][character] = len(after)
                    after.append({})
                    self.matched.append(None)
                    self.depth.append(self.depth[state] + 1)
                state = reached
            self.matched[state] = stop
        self._after: list[Mapping[str, int]] = [edges or _NONE for edges in after]
        self._shorter = [0] * len(after)
        """The state of the longest proper end of each state's text that is a state, too."""
        self.kept = [0] * len(after)
        """The state without what cannot grow into a stop string: itself, unless no longer one begins so."""
        self._firsts = frozenset(after[0])
        self._link()

    def _link(self) -> None:
        """Fill in what refers to shorter states: breadth first, so that those are complete."""
        layer = [0]
        while layer:
            following: list[int] = []
            for state in layer:
                for character, reached in self._after[state].items():
                    shorter = self.step(self._shorter[state], character) if state else 0
                    self._shorter[reached] = shorter
                    if self.matched[reached] is None:
                        self.matched[reached] = self.matched[shorter]
                    self.kept[reached] = reached if self._after[reached] else self.kept[shorter]
                    following.append(reached)
            layer = following

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while (reached := self._after[state].get(character)) is None:
            if state == 0:
                return 0
            state = self._shorter[state]
        return reached

    def none_begins_in(self, text: str) -> bool:
        """Whether no character of `text` is the first of a stop string."""
        return self._firsts.isdisjoint(text)


class StopChecker:
    """Searches one stream of text for its stop strings."""

    def __init__(self, stops: StopStrings | Sequence[str], include: bool = False) -> None:
        """Look for `stops`, compiled by whoever has several streams; with `include` a match stays in the
        text."""
        self._stops = stops if isinstance(stops, StopStrings) else StopStrings(stops)
        self._include = include
        self._state = 0
        self._tail = ""
        """The text of the state: held back unless `include`."""
        self._done = False

    def push(self, delta: str, search: bool = True) -> tuple[str, str | None]:
        """Take new text; return (text to give out, stop string found or None).

        After a match nothing more comes out. With `search` false (before `min_tokens`) no match may end in
        this delta; its characters can still begin one that ends later.
        """
        if self._done or not delta:
            return "", None
        stops, state, old = self._stops, self._state, len(self._tail)
        if state == 0 and stops.none_begins_in(delta):
            return delta, None
        text = self._tail + delta
        shown = old if self._include else 0
        for end, character in enumerate(delta, start=old + 1):
            state = stops.step(state, character)
            if search and (stop := stops.matched[state]) is not None:
                self._done = True
                self._tail = ""
                return text[shown : end if self._include else end - len(stop)], stop
            state = stops.kept[state]
        start = len(text) - stops.depth[state]
        self._state, self._tail = state, text[start:]
        return text[shown : None if self._include else start], None

    def flush(self) -> str:
        """What was held back, when the stream has ended without a match."""
        held = "" if self._include else self._tail
        self._state, self._tail = 0, ""
        return held
