"""Whether every finished output is valid against its schema, by another library.

    python -m benchmarks.structured.valid [--count 10000] [--seed 0] [--temperature 2] [--max-tokens 400]

Random schemas (`schemas`), the demo model at a temperature at which it writes anything, one seed for each.
What ended by itself is read as JSON and validated by `jsonschema`, formats included. Those that are cut by
length are counted: more than a tenth would say little. Schemas that are refused are counted and shown by
their reasons."""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from penstock import LLM, SamplingParams
from penstock.core.errors import InvalidRequest
from penstock.core.structured import StructuredOutputsParams
from penstock.grammar.prepare import prepare

from .schemas import Schema, schema

_AT_ONCE = 256


@dataclass(slots=True)
class Result:
    """Of one run."""

    finished: int = 0
    cut: int = 0
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[tuple[Schema, str, str]] = field(default_factory=list)
    """(schema, output, what the validator says)"""
    tokens: int = 0

    @property
    def count(self) -> int:
        """Schemas in all."""
        return self.finished + self.cut + sum(self.refused.values())


def measure(
    llm: LLM, count: int, seed: int, temperature: float, max_tokens: int, told: Callable[[Result], None]
) -> Result:
    """Run `count` schemas; tells how far it is."""
    result = Result()
    for start in range(0, count, _AT_ONCE):
        schemas, params = [], []
        for number in range(start, min(count, start + _AT_ONCE)):
            made = schema(random.Random(f"{seed}/{number}"))
            outputs = StructuredOutputsParams(json=made, strict=True)
            try:
                # as the server does before an engine hears of it
                llm.check_grammar(prepare(outputs)[0])
            except InvalidRequest as error:
                result.refused[str(error)[:160]] += 1
                continue
            schemas.append(made)
            params.append(
                SamplingParams(
                    temperature=temperature, seed=number, max_tokens=max_tokens, structured_outputs=outputs
                )
            )
        for made, request in zip(schemas, llm.generate(["JSON:"] * len(params), params), strict=True):
            output = request.outputs[0]
            result.tokens += len(output.token_ids)
            if output.finish_reason == "length":
                result.cut += 1
                continue
            result.finished += 1
            if problem := invalid(made, output.text):
                result.wrong.append((made, output.text, problem))
        told(result)
    return result


def invalid(made: Schema, text: str) -> str:
    """What is wrong with an output; "" if nothing is."""
    try:
        value: Any = json.loads(text)
        validator = jsonschema.Draft202012Validator(
            made, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        validator.validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def main() -> int:
    """Print the counts; 1 if an output is wrong or too many are cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    llm = LLM("demo", threads=args.threads, max_num_seqs=64)
    began = time.process_time()

    def told(result: Result) -> None:
        print(f"{result.count} schemas, {len(result.wrong)} invalid", file=sys.stderr, flush=True)

    result = measure(llm, args.count, args.seed, args.temperature, args.max_tokens, told)
    print(
        f"{result.count} schemas, {result.tokens} tokens, {time.process_time() - began:.0f} s of processor: "
        f"{result.finished} finished, {result.cut} cut by length "
        f"({result.cut / max(1, result.finished + result.cut):.1%}), {sum(result.refused.values())} refused, "
        f"{len(result.wrong)} invalid"
    )
    for reason, times in result.refused.most_common(10):
        print(f"  refused {times}: {reason}")
    for made, text, problem in result.wrong[:10]:
        print(f"  INVALID {problem}\n    {json.dumps(made, ensure_ascii=False)}\n    {text}")
    return 1 if result.wrong or result.cut > 0.1 * (result.finished + result.cut) else 0


if __name__ == "__main__":
    sys.exit(main())
