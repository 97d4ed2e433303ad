"""The set of `penstock eval` for the demo model, penstock/assets/evaluation/demo.jsonl, from the FAQ.

    python -m tools.demo.evaluation > penstock/assets/evaluation/demo.jsonl

Tags say where a question comes from: `trained` (a sample of those that the model has learnt), `held-out` (a
paraphrase of each answer's question that it has never seen), `declined` (what the FAQ does not answer, and
the model shall say so).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .corpus import held_out_questions, load_faq, normalise

TRAINED = 250
"""Questions that the model has learnt."""


def lines() -> Iterator[dict[str, Any]]:
    """The set, its defaults first."""
    faq = load_faq()
    scope = faq.out_of_scope
    yield {"defaults": {"grader": "exact", "request": {"max_tokens": 200}}}
    held_out = {entry.question: held_out_questions(entry) for entry in faq.entries}
    trained = [
        (question, entry.answer)
        for entry in faq.entries
        for question in entry.questions
        if question not in held_out[entry.question]
    ]
    fresh = [
        line.strip() for line in (Path(__file__).parent / "near_fresh.txt").read_text("utf-8").splitlines()
    ]
    kinds = {
        "trained": random.Random(0).sample(trained, TRAINED),
        "held-out": [
            (question, entry.answer) for entry in faq.entries for question in held_out[entry.question]
        ],
        "declined": [
            (question, scope.answer)
            for question in (*scope.held_out, *scope.near_held_out, *scope.near_tuning, *fresh)
            if question and not question.startswith("#")
        ],
    }
    seen = set[str]()
    for kind, pairs in kinds.items():
        number = 0
        for question, answer in pairs:
            if normalise(question) in seen:
                continue
            seen.add(normalise(question))
            number += 1
            yield {"id": f"{kind}-{number}", "prompt": question, "expected": answer, "tags": [kind]}


if __name__ == "__main__":
    for line in lines():
        print(json.dumps(line, ensure_ascii=False))
