"""Offline batches over many machines: a callable for Ray Data's `map_batches`.

    import ray
    from penstock.ray import Generate

    rows = ray.data.read_json("prompts.jsonl")
    done = rows.map_batches(
        Generate,
        fn_constructor_kwargs={"model": "Qwen/Qwen3-0.6B", "sampling": {"max_tokens": 64}},
        batch_size=256, compute=ray.data.ActorPoolStrategy(size=4), num_gpus=1,
    )

Each actor loads the model once, and batches the rows that it gets continuously. It knows rows as columns,
which is what Ray hands over by default; it does not import Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.offline import RequestOutput


class Generate:
    """Completes a column of texts, or answers one of conversations.

    Args:
        model: local directory, Hugging Face id, or "demo".
        sampling: fields of SamplingParams; the model's own defaults without it.
        prompts: the column with prompts; texts, or lists of token ids.
        messages: the column with conversations, in place of prompts.
        output: the column that is added: texts.
        settings: any field of EngineConfig.

    Three more columns tell of each row: `finish_reason`, `completion_tokens`, and `error`. A row that can
    never be served (too long, empty) has an error and no text; the others of its batch are served.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        sampling: Mapping[str, Any] | None = None,
        prompts: str = "prompt",
        messages: str | None = None,
        output: str = "text",
        **settings: Any,
    ) -> None:
        from penstock.core.sampling_params import SamplingParams
        from penstock.offline import LLM

        self._llm = LLM(model, **settings)
        self._params = None if sampling is None else SamplingParams(**sampling)
        self._prompts, self._messages, self._output = prompts, messages, output

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Columns in, the same columns and four more out. Raises KeyError where there is no such column."""
        name = self._messages or self._prompts
        if name not in batch:
            raise KeyError(f"there is no column {name!r}; there are {', '.join(sorted(batch))}.")
        rows = [_plain(row) for row in batch[name]]
        answers = self._answers(rows)
        told = [answer.outputs[0] if not isinstance(answer, str) else None for answer in answers]
        return {
            **batch,
            self._output: ["" if each is None else each.text for each in told],
            "finish_reason": ["" if each is None else each.finish_reason or "" for each in told],
            "completion_tokens": [0 if each is None else len(each.token_ids) for each in told],
            "error": [answer if isinstance(answer, str) else "" for answer in answers],
        }

    def _answers(self, rows: Sequence[Any]) -> list[RequestOutput | str]:
        """Of each row, or why there is none."""
        from penstock.core.errors import PenstockError

        try:
            return list(self._ask(rows))
        except PenstockError:  # somebody's row is at fault: whose, is seen one by one
            pass
        answers: list[RequestOutput | str] = []
        for row in rows:
            try:
                answers += self._ask([row])
            except PenstockError as error:
                answers.append(str(error))
        return answers

    def _ask(self, rows: Sequence[Any]) -> list[RequestOutput]:
        if self._messages is not None:
            return self._llm.chat(list(rows), self._params, use_tqdm=False)
        return self._llm.generate(list(rows), self._params, use_tqdm=False)


def _plain(value: Any) -> Any:
    """A cell without numpy's types."""
    return value.tolist() if hasattr(value, "tolist") else value
