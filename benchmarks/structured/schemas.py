"""Random JSON schemas, of everything that structured outputs enforce.

    schema(random.Random(7)) ──▶ {"type": "object", "properties": {…}, …}

They can be met, nest a few levels, and some of them recurse. Most have an end that a model comes to which
writes anything: digits, properties and letters without end are in a few of them only. Names have characters
that need care: quotes, backslashes, slashes, blanks, accents, Chinese, an emoji. Fractions are halves and
quarters: the validator divides floats."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

NAMES = (
    *(
        "name",
        "id",
        "a",
        "b",
        "value",
        "items",
        "x-y",
        "first name",
        "größe",
        "名前",
        'q"uote',
        "back\\slash",
    ),
    *("a/b", "new\nline", "tab\tbed", "😀", "$ref", "", "0", "true"),
)
PATTERNS = (
    *(r"^[a-z]{2,8}$", r"^\d{3}-\d{4}$", r"^(yes|no|maybe)$", r"^[A-Z][a-z]+( [A-Z][a-z]+){0,2}$"),
    *(r"^[0-9a-f]{8}$", r"^\w{1,6}$", r"^[À-ÿ]{1,5}$", r"^[^\d\s]{3}$", r"^[一-鿿]{1,3}$", r"^.{0,5}ab$"),
    *(r"^(?:[01]\d|2[0-3]):[0-5]\d$", r"^\$[1-9]\d{0,3}(\.\d\d)?$", r"^[+\-*/]{1,3}$"),
)
FORMATS = (*("date", "date-time", "ipv4", "ipv6", "uuid", "time") * 3, "email", "hostname")
KEY_PATTERNS = (r"^k_[a-z]{1,3}$", r"^[A-Z]{2}$", r"^x-")


def schema(draw: random.Random, depth: int = 3) -> Schema:
    """One, with `$defs` where it refers to some."""
    maker = _Maker(draw)
    made = maker.any(depth)
    if maker.defs:
        made = {**made, "$defs": maker.defs}
    return made


class _Maker:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.defs: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        leaves: list[Callable[[], Schema]] = [
            *(self.string, self.string, self.integer, self.number, self.fixed),
            *(lambda: {"type": "boolean"}, lambda: {"type": "null"}),
        ]
        if depth <= 0 or self.draw.random() < 0.15:
            return self.draw.choice(leaves)()
        branches: list[Callable[[int], Schema]] = [
            *(self.object, self.object, self.object, self.array, self.tuple),
            *(self.either, self.tagged, self.both, self.several_types, self.recursive, self.map),
        ]
        return self.draw.choice(branches)(depth - 1)

    # ---- leaves ----
    def string(self) -> Schema:
        draw = self.draw
        kind = draw.random()
        if kind < 0.02:
            return {"type": "string", "pattern": draw.choice(("ab", "^a|b$", "c$"))}
        if kind < 0.3:
            return {"type": "string", "pattern": draw.choice(PATTERNS)} | (
                {} if draw.random() < 0.8 else {"title": "a pattern"}
            )
        if kind < 0.45:
            return {"type": "string", "format": draw.choice(FORMATS)}
        low = draw.randrange(4)
        made: Schema = {"type": "string", "maxLength": low + draw.randrange(12)}
        return made | ({"minLength": low} if draw.random() < 0.5 else {})

    def integer(self) -> Schema:
        draw = self.draw
        made: Schema = {"type": "integer"}
        if draw.random() < 0.02:
            return made
        low = draw.choice((-(10**9), -1000, -7, 0, 1, 42, 2**31))
        if draw.random() < 0.2:
            made["multipleOf"] = draw.choice((2, 3, 7, 10, 25))
            return made | {"minimum": low, "maximum": low + 10**4}
        return made | self._bounds(low, low + draw.choice((0, 1, 9, 100, 10**6, 10**12)))

    def number(self) -> Schema:
        draw = self.draw
        if draw.random() < 0.95:
            low = draw.choice((-1e6, -3.5, -0.25, 0.0, 0.5, 99.75))
            made = {"type": "number", "multipleOf": draw.choice((0.5, 0.25, 5))}
            return made | {"minimum": low, "maximum": low + draw.choice((5.0, 12.5, 1e4))}
        low = draw.choice((-1e6, -3.5, -0.25, 0.0, 0.5, 1e-3, 99.75))
        return {"type": "number"} | self._bounds(low, low + draw.choice((0.5, 1.25, 10.0, 1e4)))

    def fixed(self) -> Schema:
        draw = self.draw
        values = [
            1,
            -2.5,
            "a",
            "b c",
            'quo"te',
            "back\\slash",
            "ünï",
            "",
            True,
            False,
            None,
            [1, "x"],
            {"k": [None]},
        ]
        if draw.random() < 0.3:
            return {"const": draw.choice(values)}
        return {"enum": draw.sample(values, draw.randrange(1, 7))}

    # ---- branches ----
    def object(self, depth: int) -> Schema:
        draw = self.draw
        names = draw.sample(NAMES, draw.randrange(1, 5))
        made: Schema = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        required = [name for name in names if draw.random() < 0.7]
        if required:
            made["required"] = draw.sample(required, len(required))
        kind = draw.random()
        if kind < 0.96:
            made["additionalProperties"] = False
        elif kind < 0.985:
            made["additionalProperties"] = self.any(0)
        if len(required) == len(names) and draw.random() < 0.2:
            made["maxProperties"] = len(required) + draw.randrange(2)
            made["minProperties"] = len(required)
        return made

    def map(self, depth: int) -> Schema:
        made: Schema = {
            "type": "object",
            "patternProperties": {self.draw.choice(KEY_PATTERNS): self.any(min(depth, 1))},
            "additionalProperties": False,
            "maxProperties": self.draw.randrange(1, 4),
        }
        return made

    def array(self, depth: int) -> Schema:
        low = self.draw.randrange(3)
        made: Schema = {
            "type": "array",
            "items": self.any(depth),
            "maxItems": low + self.draw.randrange(1, 4),
        }
        return made | ({"minItems": low} if low else {})

    def tuple(self, depth: int) -> Schema:
        count = self.draw.randrange(1, 4)
        return {
            "type": "array",
            "prefixItems": [self.any(depth - 1) for _ in range(count)],
            "items": False,
            "minItems": self.draw.randrange(count + 1),
        }

    def either(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self.draw.randrange(2, 4))]}

    def tagged(self, depth: int) -> Schema:
        """oneOf whose alternatives exclude each other by a constant."""
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": tag}, "of": self.any(depth - 1)},
                    "required": ["kind", "of"],
                    "additionalProperties": False,
                }
                for tag in self.draw.sample(("cat", "dog", "tree"), 2)
            ]
        }

    def both(self, depth: int) -> Schema:
        """allOf of objects with other properties, or of bounds."""
        if self.draw.random() < 0.95:
            return {"allOf": [{"type": "integer", "minimum": 0}, {"maximum": self.draw.randrange(1, 500)}]}
        first, second = self.draw.sample(NAMES, 2)
        parts = [
            {"type": "object", "properties": {name: self.any(depth - 1)}, "required": [name]}
            for name in (first, second)
        ]
        return {"allOf": parts}

    def several_types(self, _: int) -> Schema:
        types = self.draw.sample(["string", "integer", "null", "boolean"], 2)
        return {"type": types, "maxLength": 10, "minimum": 0, "maximum": 99}

    def recursive(self, depth: int) -> Schema:
        """A list or a tree that refers to itself."""
        name = f"node{len(self.defs)}"
        self.defs[name] = {}
        here = {"$ref": f"#/$defs/{name}"}
        nested = (
            {"anyOf": [{"type": "null"}, here]}
            if self.draw.random() < 0.5
            else {"type": "array", "items": here, "maxItems": 2}
        )
        self.defs[name] = {
            "type": "object",
            "properties": {"value": self.any(min(depth - 1, 0)), "next": nested},
            "required": ["value"],
            "additionalProperties": False,
        }
        return dict(here)

    def _bounds(self, low: float, high: float) -> Schema:
        draw = self.draw
        made: Schema = {}
        if draw.random() < 0.95:
            strictly = draw.random() < 0.3 and high - low > 1
            made["exclusiveMinimum" if strictly else "minimum"] = low
        if draw.random() < 0.95:
            strictly = draw.random() < 0.3 and high - low > 1
            made["exclusiveMaximum" if strictly else "maximum"] = high
        return made
