"""What a pooling model can be asked, and the vectors that it answers with.

    task             of a prompt of n tokens
    embed            one vector
    token_embed      a vector for each token
    classify         one number for each label
    token_classify   the same for each token

`PoolingInfo` is what is known of a model before anything runs: from its files, by whoever loads it. `Pooling`
is one request's part. Plain data; how vectors are computed is the business of executors.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from .errors import InvalidRequest, UnsupportedParameter

Task: TypeAlias = Literal["embed", "token_embed", "classify", "token_classify"]

PoolingType: TypeAlias = Literal["last", "cls", "mean", "all"]
"""Which hidden states make a vector: that of the last or of the first position, the mean of all; or each by
itself."""

Activation: TypeAlias = Literal["none", "normalize", "softmax", "sigmoid", "relu"]
"""What is done to a vector at the end. normalize: to length 1."""


class Vectors(NamedTuple):
    """Rows of float32 numbers, in the machine's byte order."""

    width: int
    data: bytes

    @classmethod
    def of(cls, *rows: Sequence[float]) -> Vectors:
        """These rows, which are equally long."""
        numbers = array("f")
        for row in rows:
            numbers.extend(row)
        return cls(len(rows[0]), numbers.tobytes())

    @property
    def rows(self) -> list[list[float]]:
        """As Python's numbers."""
        numbers = array("f", self.data).tolist()
        return [numbers[first : first + self.width] for first in range(0, len(numbers), self.width)]

    @property
    def row(self) -> list[float]:
        """The first one."""
        return array("f", self.data[: 4 * self.width]).tolist()


@dataclass(frozen=True, slots=True)
class Pooling:
    """Vectors of the whole prompt are wanted, and no token."""

    type: PoolingType = "last"
    """Of the hidden states after the final norm."""
    task: Task = "embed"
    """Which of the model's heads they go through."""
    activate: bool = True
    """Whether the task's activation is applied: embeddings to length 1, labels to probabilities."""
    dimensions: int | None = None
    """Of embeddings, the first so many numbers (matryoshka); before they are normalised."""

    @property
    def needs_all(self) -> bool:
        """Whether every position must pass through the model: none may come from the prefix cache."""
        return self.type != "last"


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What a model that pools can do."""

    tasks: tuple[Task, ...] = ("embed", "token_embed")
    """The first one is what is done where nothing is said."""
    type: PoolingType = "last"
    """How one vector is made of a prompt: last, cls or mean."""
    activations: dict[str, Activation] | None = None
    """task → what is done by default where `activate` is true; see `activation`."""
    activate: bool = True
    """Whether embeddings are normalised where the request does not say."""
    dimension: int = 0
    """Width of an embedding."""
    matryoshka: bool | tuple[int, ...] = False
    """Whether embeddings may be cut; or to which sizes."""
    labels: tuple[str, ...] = ()
    """Of classes, in order."""
    pairs: Literal["segments", "plain", "template"] = "segments"
    """How a query and a document become one prompt for a cross-encoder: with the tokenizer's separators, one
    text behind the other, or by the chat template (roles query and document)."""
    instructions: dict[str, str] | None = None
    """What texts are for → what they begin with then, as the model was trained."""
    max_length: int | None = None
    """Longest prompt, by sentence-transformers' setting; texts are cut there, as it does."""

    def activation(self, task: str) -> Activation:
        """What is done at the end of a task."""
        default: Activation = "normalize" if task.endswith("embed") else "softmax"
        return (self.activations or {}).get(task, default)

    def pooling(
        self, task: str | None = None, *, activate: bool | None = None, dimensions: int | None = None
    ) -> Pooling:
        """What a request asks for. Raises InvalidRequest where the model cannot do it."""
        chosen = next((each for each in self.tasks if each == (task or self.tasks[0])), None)
        if chosen is None:
            raise UnsupportedParameter(
                f"The model does not support the task {task}.",
                param="task",
                advice=f"It supports {', '.join(self.tasks)}.",
            )
        if dimensions is not None:
            self._check_dimensions(chosen, dimensions)
        if activate is None:
            activate = self.activate if chosen.endswith("embed") else True
        kind: PoolingType = "all" if chosen.startswith("token") else self.type
        return Pooling(kind, chosen, activate, dimensions)

    def scoring(self) -> Task:
        """The task by which the model scores two texts. Raises InvalidRequest where it does not."""
        first = self.tasks[0]
        if first in ("embed", "token_embed") or (first == "classify" and len(self.labels) == 1):
            return first
        raise InvalidRequest(
            f"The model does not score: it has {len(self.labels)} labels, and a score is of one.",
            param="model",
            advice="It classifies." if "classify" in self.tasks else "It labels tokens.",
        )

    def _check_dimensions(self, task: str, dimensions: int) -> None:
        if not task.endswith("embed"):
            raise InvalidRequest(f"dimensions are of embeddings, not of the task {task}.", param="dimensions")
        if not self.matryoshka:
            raise InvalidRequest(
                f"The model does not support matryoshka embeddings: dimensions must be left out, got "
                f"{dimensions}.",
                param="dimensions",
                advice=f"Its embeddings have {self.dimension} dimensions.",
            )
        sizes = () if self.matryoshka is True else self.matryoshka
        if sizes and dimensions not in sizes:
            listed = ", ".join(map(str, sizes))
            raise InvalidRequest(f"dimensions must be one of {listed}, got {dimensions}.", param="dimensions")
        if not 1 <= dimensions <= self.dimension:
            raise InvalidRequest(
                f"dimensions must be 1 to {self.dimension}, got {dimensions}.", param="dimensions"
            )


def scores(task: Task, vectors: Sequence[Vectors], queries: int) -> list[float]:
    """How near texts are, by what a model made of them for its task (`PoolingInfo.scoring`).

    classify: `vectors` are of pairs. Else those of so many queries, then those of the documents: one query
    for all of them, or one for each. embed: cosines. token_embed: for each vector of the query the largest
    product with one of the document's, added up (MaxSim of ColBERT, arXiv 2004.12832).
    """
    if task == "classify":
        return [each.row[0] for each in vectors]
    near = _cosine if task == "embed" else _max_sim
    left, right = vectors[:queries], vectors[queries:]
    return [near(left[0 if queries == 1 else place], each) for place, each in enumerate(right)]


def _cosine(first: Vectors, second: Vectors) -> float:
    a, b = first.row, second.row
    size = math.sqrt(_product(a, a) * _product(b, b))
    return _product(a, b) / size if size else 0.0


def _max_sim(first: Vectors, second: Vectors) -> float:
    documents = second.rows
    return sum(max(_product(query, document) for document in documents) for query in first.rows)


def _product(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(map(operator.mul, a, b))
