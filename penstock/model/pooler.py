"""From hidden states to what was asked for: vectors of prompts or of their tokens, numbers of labels.

    hidden [T, H] ─▶ cls · last · mean [P, H] ─▶ head ─▶ activation ─▶ a vector of each prompt
          or all of a prompt's rows [n, H]    ─▶ head ─▶ activation ─▶ n of them

In float32, whatever the model computes in. It knows tensors and how a model pools; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.errors import ModelLoadError
from penstock.core.pooling import Activation, Pooling, PoolingInfo, Vectors
from penstock.files import check, shown
from penstock.kernels.transfer import on_device

from .model_config import ModelConfig
from .pooling import PoolingPlan
from .weights import Weights

Head = Callable[[Tensor], Tensor]
"""[n, H] → [n, width], float32."""

_PT_BYTES = 1 << 28
"""Most bytes of one of BGE-M3's heads: 4 MB for the larger one."""

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


class Pooler:
    """Made with a model, from the same checkpoint."""

    def __init__(
        self,
        plan: PoolingPlan,
        config: ModelConfig,
        weights: Weights | None,
        directory: Path,
        token_ids: Sequence[int] = (),
    ) -> None:
        """token_ids: of the plan's tokens."""
        self.plan = plan
        self.own = weights is not None
        """Whether it was loaded with its model, which then does nothing else."""
        self._ends = (config.raw.get("bos_token_id", 0), config.raw.get("eos_token_id", 2))
        self._heads: dict[str, Head] = {}
        if weights is None:
            return
        if plan.head == "classifier":
            head = _classifier(config, weights, len(plan.info.labels))
            self._heads = {"classify": head, "token_classify": head}
        elif plan.head == "tokens":
            head = _of_tokens(config, weights, token_ids, plan.difference)
            self._heads = {"classify": head, "token_classify": head}
        if plan.bge_m3:
            hidden = config.hidden_size
            self._heads["token_embed"] = _linear_file(
                directory / "colbert_linear.pt", hidden, hidden, weights
            )
            self._heads["token_classify"] = _linear_file(directory / "sparse_linear.pt", 1, hidden, weights)

    @torch.inference_mode()
    def __call__(
        self, pooling: Pooling, hidden: Tensor, lengths: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> list[Vectors | None]:
        """What is wanted of each prompt; None where it is not finite.

        Args:
            hidden: [T, H] of prompts one after the other: all rows, or the last ones where that is the type.
            lengths: rows of each, Σ = T.
            ids: the tokens of each.
        """
        if pooling.type == "all":
            whole = self._finished(pooling, hidden.float())
            parts = torch.split(whole, list(lengths))
            return [_vectors(self._trimmed(pooling, rows, own)) for rows, own in zip(parts, ids, strict=True)]
        table = self._finished(pooling, _pooled(pooling.type, hidden, lengths)).cpu().contiguous()
        finite = table.isfinite().all(-1).tolist()
        width, data = table.shape[1], table.numpy().tobytes()
        size = 4 * width
        return [
            Vectors(width, data[size * row : size * (row + 1)]) if fine else None
            for row, fine in enumerate(finite)
        ]

    def _finished(self, pooling: Pooling, states: Tensor) -> Tensor:
        """[n, H] → [n, width]."""
        head = self._heads.get(pooling.task)
        if head is not None:
            states = head(states)
        if pooling.dimensions is not None:
            states = states[:, : pooling.dimensions]
        if not pooling.activate:
            return states
        return _FUNCTIONS[self.plan.info.activation(pooling.task)](states)

    def _trimmed(self, pooling: Pooling, rows: Tensor, ids: Sequence[int]) -> Tensor:
        """BGE-M3 has no vector of its first token, and no weight of the last one either; as in vLLM."""
        if not self.plan.bge_m3:
            return rows
        first, last = self._ends
        begin = int(len(ids) > 0 and ids[0] == first)
        ends = pooling.task == "token_classify" and len(ids) > begin and ids[-1] == last
        return rows[begin : len(ids) - int(ends)]


def plain_pooler(config: ModelConfig) -> Pooler:
    """Of a model that generates: its hidden states are what there is."""
    info = PoolingInfo(dimension=config.hidden_size)
    return Pooler(PoolingPlan(info), config, None, config.path.parent)


def _pooled(kind: str, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, H] → [P, H], float32."""
    count = on_device(torch.tensor(lengths), hidden.device)
    ends = count.cumsum(0)
    if kind == "mean":
        return torch.segment_reduce(hidden.float(), "mean", lengths=count)
    rows = ends - 1 if kind == "last" else ends - count
    return hidden.index_select(0, rows).float()


def _vectors(rows: Tensor) -> Vectors | None:
    if not bool(rows.isfinite().all()):
        return None
    return Vectors(rows.shape[1], rows.cpu().contiguous().numpy().tobytes())


def _classifier(config: ModelConfig, weights: Weights, labels: int) -> Head:
    """The head that transformers has for this architecture."""
    hidden = config.hidden_size
    if config.causal:
        return _linear(weights, "score", labels, hidden, bias=weights.has("score.bias"))
    if config.head == "token_classify":
        return _linear(weights, "classifier", labels, hidden)
    if weights.has("classifier.out_proj.weight") or config.architecture.startswith(("Roberta", "XLMRoberta")):
        return _dense(
            _linear(weights, "classifier.dense", hidden, hidden),
            _linear(weights, "classifier.out_proj", labels, hidden),
        )
    return _dense(
        _linear(weights, "pooler.dense", hidden, hidden), _linear(weights, "classifier", labels, hidden)
    )


def _linear(weights: Weights, name: str, outs: int, ins: int, bias: bool = True) -> Head:
    weight = weights.exact(f"{name}.weight", outs, ins)
    vector = weights.exact(f"{name}.bias", outs) if bias else None
    return lambda x: F.linear(x, weight, vector)


def _dense(first: Head, second: Head) -> Head:
    return lambda x: second(torch.tanh(first(x)))


def _of_tokens(config: ModelConfig, weights: Weights, ids: Sequence[int], difference: bool) -> Head:
    """Logits of some tokens."""
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    rows = weights.rows(name, (config.vocab_size, config.hidden_size), ids)
    weight = (rows[1] - rows[0])[None] if difference else rows
    return lambda x: F.linear(x, weight)


def _linear_file(file: Path, outs: int, ins: int, weights: Weights) -> Head:
    """One of BGE-M3's heads, which are published as torch's own files: tensors only, nothing is run."""
    check(file, _PT_BYTES)
    try:
        state = torch.load(file, map_location=weights.device, weights_only=True)
        weight, bias = state["weight"].float(), state["bias"].float()
    except Exception as error:  # whatever a broken pickle makes of it
        raise ModelLoadError(f"{shown(file)} cannot be read: {shown(str(error))}.") from error
    if weight.shape != (outs, ins) or bias.shape != (outs,):
        raise ModelLoadError(
            f"{shown(file)}: weight {list(weight.shape)}, bias {list(bias.shape)}; need {[outs, ins]} and "
            f"{[outs]}."
        )
    return lambda x: F.linear(x, weight, bias)
