"""What quantised weights cost in quality: perplexity of the demo model's answers, through the real engine.

    python -m benchmarks.quality

For questions that the model was trained on and for paraphrases that it never saw: perplexity of the right
answer's tokens (given the question and the answer so far), and the share of answers whose every token is the
most probable one, which is what greedy decoding would write. A model of two million parameters has less to
spare than a large one, so a large one loses less.
"""

from __future__ import annotations

import math
import random
from typing import Any

from penstock import LLM, SamplingParams
from penstock.kernels.quantization import INTEGERS as SCHEMES
from tools.demo.corpus import IM_END, chat_prompt, held_out_questions, load_faq

from .common import save

QUESTIONS = 366


def cases() -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) pairs by kind."""
    entries = load_faq().entries
    trained = [
        (question, entry.answer)
        for entry in entries
        for question in entry.questions
        if question not in held_out_questions(entry)
    ]
    unseen = [(question, entry.answer) for entry in entries for question in held_out_questions(entry)]
    sample = random.Random(0).sample(trained, QUESTIONS)
    return {
        name: [(chat_prompt([], question), answer) for question, answer in pairs]
        for name, pairs in (("trained", sample), ("held out", unseen))
    }


def measure(llm: LLM, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Perplexity per token, and the share of answers that greedy decoding would write."""
    tokenizer = llm.get_tokenizer()
    prompts, starts = [], []
    for prompt, answer in pairs:
        before = tokenizer.encode(prompt, add_special_tokens=False)
        prompts.append([*before, *tokenizer.encode(answer + IM_END, add_special_tokens=False)])
        starts.append(len(before))
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    logprobs: list[float] = []
    exact = 0
    for output, start, ids in zip(outputs, starts, prompts, strict=True):
        entries = [
            (position or {})[token]
            for position, token in zip((output.prompt_logprobs or [])[start:], ids[start:], strict=True)
        ]
        logprobs += [entry.logprob for entry in entries]
        exact += all(entry.rank == 1 for entry in entries)
    return {
        "answers": len(pairs),
        "tokens": len(logprobs),
        "perplexity": math.exp(-math.fsum(logprobs) / len(logprobs)),
        "exact": exact / len(pairs),
    }


def run() -> dict[str, Any]:
    """Every scheme, on the same questions."""
    groups = cases()
    result: dict[str, Any] = {}
    for scheme in ("none", *SCHEMES):
        llm = LLM("demo", quantization=scheme)
        result[scheme] = {name: measure(llm, pairs) for name, pairs in groups.items()}
        for name, values in result[scheme].items():
            base = result["none"][name]["perplexity"]
            values["change"] = values["perplexity"] / base - 1
            print(
                f"{scheme:5} {name:9} perplexity {values['perplexity']:.4f} ({values['change']:+.2%}), "
                f"{values['exact']:.1%} of {values['answers']} answers word for word",
                flush=True,
            )
    return {"model": "demo", "schemes": result}


def main() -> None:
    """Command line."""
    save("quality", run())


if __name__ == "__main__":
    main()
