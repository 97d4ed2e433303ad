"""Whether a model pools, and how: from its configuration, sentence-transformers' files and the flags.

    config.json                        architecture and labels; matryoshka_dimensions, task_instructions
    modules.json                       sentence-transformers' parts in order, of which these are served:
      1_Pooling/config.json              cls, mean or lasttoken
      2_Normalize                        embeddings of length 1
      1_LogitScore/config.json           of rerankers that answer with a token
    config_sentence_transformers.json  the activation of a cross-encoder; what texts begin with (prompts)
    sentence_bert_config.json          max_seq_length, the longest prompt
    sparse_linear.pt, colbert_linear.pt  BGE-M3's heads

Imports no torch: whoever plans a model's memory reads it, too. What is there and cannot be served as it says
is refused by name: an embedding that is nearly right is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from penstock.core.errors import ModelLoadError, StartupError
from penstock.core.pooling import Activation, PoolingInfo, PoolingType, Task
from penstock.files import exists, read_json, read_json_list, shown

from .model_config import ModelConfig

RUNNERS = ("auto", "generate", "pooling")
CONVERTS = ("auto", "none", "embed", "classify")

_MODES: Mapping[str, PoolingType] = {
    "cls": "cls",
    "pooling_mode_cls_token": "cls",
    "mean": "mean",
    "pooling_mode_mean_tokens": "mean",
    "lasttoken": "last",
    "pooling_mode_lasttoken": "last",
}
_POOLER_TYPES: Mapping[str, PoolingType] = {"CLS": "cls", "MEAN": "mean", "LAST": "last"}
_ACTIVATIONS: Mapping[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_BGE_M3 = ("sparse_linear.pt", "colbert_linear.pt")


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """How a model pools."""

    info: PoolingInfo
    head: Literal["none", "classifier", "tokens"] = "none"
    """Where the numbers of labels come from: nowhere, a classifier, or the output layer's rows of tokens."""
    tokens: tuple[str | int, ...] = ()
    """These tokens, by name or id."""
    difference: bool = False
    """There is one label, whose number is the second token's logit less the first one's."""
    bge_m3: bool = False
    """Tokens have vectors and weights of their own, by BGE-M3's two heads."""


def pooling_plan(
    directory: Path,
    config: ModelConfig,
    *,
    runner: str = "auto",
    convert: str = "auto",
    pooler: Mapping[str, Any] | None = None,
) -> PoolingPlan | None:
    """How the model pools; None where it generates.

    Args:
        runner, convert: as the flags say; one of RUNNERS and CONVERTS.
        pooler: --pooler-config.

    Raises StartupError for what the model is not made for, ModelLoadError for files that say what is not
    supported.
    """
    files = _Files(directory, config)
    generates = config.head == "generate"
    scored = files.logit_score() is not None or config.raw.get("classifier_from_token") is not None
    if runner == "generate" or (runner == "auto" and convert in ("auto", "none") and generates):
        wants = runner == "auto" and convert == "auto" and (files.pools or scored)
        if not wants:
            if not generates:
                raise _refusal(
                    config, "--runner generate", "it has no output layer for a vocabulary", "pooling"
                )
            if pooler is not None or convert in ("embed", "classify"):
                flag = "--pooler-config" if pooler is not None else f"--convert {convert}"
                raise StartupError(
                    f"{flag} is of models that pool.", param=flag, advice="Use --runner pooling."
                )
            return None
    if convert == "auto":
        convert = "none" if not generates else "classify" if scored else "embed"
    if generates and convert == "none":
        raise _refusal(config, "--convert none", "it generates unless it is converted", "embed")
    if not generates and convert == "embed" and config.head != "embed":
        raise _refusal(config, "--convert embed", "it classifies", "none")
    if convert == "classify" and config.head in ("generate", "embed") and not scored:
        raise _refusal(config, "--convert classify", "it has no classifier", "embed")
    classifies = config.head in ("classify", "token_classify") or convert == "classify"
    plan = _classifier(config, files) if classifies else _embedder(config, files)
    return _adjusted(plan, pooler or {})


def _refusal(config: ModelConfig, flag: str, why: str, instead: str) -> StartupError:
    name, _, _ = flag.partition(" ")
    return StartupError(
        f"{flag}: {shown(config.path)} is of {config.raw.get('architectures', ['?'])[0]}: {why}.",
        param=name,
        advice=f"Use {name} {instead}, or leave it out.",
    )


def _embedder(config: ModelConfig, files: _Files) -> PoolingPlan:
    bge = not config.causal and all(exists(files.directory / name) for name in _BGE_M3)
    kind, normalize = files.pooling()
    tasks: tuple[Task, ...] = ("embed", "token_embed", "token_classify") if bge else ("embed", "token_embed")
    info = PoolingInfo(
        tasks=tasks,
        type=kind or ("last" if config.causal else "cls"),
        activations={"token_classify": "relu"} if bge else None,
        activate=normalize,
        dimension=config.hidden_size,
        matryoshka=_matryoshka(config),
        instructions=files.instructions(),
        max_length=files.longest(),
    )
    return PoolingPlan(info, bge_m3=bge)


def _matryoshka(config: ModelConfig) -> bool | tuple[int, ...]:
    sizes = config.raw.get("matryoshka_dimensions")
    if sizes is None:
        return config.raw.get("is_matryoshka") is True
    if not isinstance(sizes, list) or not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 < size <= config.hidden_size
        for size in sizes
    ):
        raise ModelLoadError(
            f"{shown(config.path)}: matryoshka_dimensions={shown(sizes)}: must list sizes from 1 to "
            f"{config.hidden_size}."
        )
    return tuple(sizes)


def _classifier(config: ModelConfig, files: _Files) -> PoolingPlan:
    tasks: tuple[Task, ...] = ("classify", "token_classify")
    if config.head == "token_classify":
        tasks = ("token_classify",)
    labels = _labels(config)
    plan = PoolingPlan(PoolingInfo(), "classifier")
    tokens, difference = _tokens(config, files)
    if tokens:
        plan = PoolingPlan(PoolingInfo(), "tokens", tokens, difference)
        labels = ("LABEL_0",) if difference or len(tokens) == 1 else tuple(map(str, tokens))
    activation: Activation = "softmax" if len(labels) > 1 else "sigmoid"
    activation = files.activation() or activation
    info = PoolingInfo(
        tasks=tasks,
        type="last" if config.causal else "cls",
        activations={"classify": activation, "token_classify": activation},
        labels=labels,
        pairs="template" if tokens else "plain" if config.raw.get("use_sep_token") is False else "segments",
        max_length=files.longest(),
    )
    return replace(plan, info=info)


def _tokens(config: ModelConfig, files: _Files) -> tuple[tuple[str | int, ...], bool]:
    """Of rerankers that answer with a token: which tokens count, and whether their difference does."""
    score = files.logit_score()
    if score is not None:
        true, false = score.get("true_token_id"), score.get("false_token_id")
        if not isinstance(true, int) or not (false is None or isinstance(false, int)):
            raise ModelLoadError(
                f"{shown(files.directory)}: LogitScore names the tokens {shown(true)} and {shown(false)}; "
                "needs ids."
            )
        return ((true,), False) if false is None else ((false, true), True)
    names = config.raw.get("classifier_from_token")
    if names is None:
        return (), False
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelLoadError(
            f"{shown(config.path)}: classifier_from_token={shown(names)}: must list tokens, such as "
            '["no", "yes"].'
        )
    method = config.raw.get("method")
    two = config.raw.get("is_original_qwen3_reranker") is True or method == "from_2_way_softmax"
    if two and len(names) != 2:
        raise ModelLoadError(
            f"{shown(config.path)}: classifier_from_token={shown(names)}: a score is of two tokens."
        )
    return tuple(names), two


def _labels(config: ModelConfig) -> tuple[str, ...]:
    """As transformers reads them: id2label, else as many as num_labels, else two."""
    named = config.raw.get("id2label")
    count = config.raw.get("num_labels")
    if isinstance(named, dict) and named and not isinstance(count, int):
        try:
            by_id = {int(key): str(value) for key, value in named.items()}
        except ValueError:
            by_id = {}
        if sorted(by_id) != list(range(len(by_id))) or not by_id:
            raise ModelLoadError(
                f"{shown(config.path)}: id2label={shown(named)}: must name the labels 0, 1, 2, …"
            )
        return tuple(by_id[index] for index in range(len(by_id)))
    count = 2 if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1 << 20:
        raise ModelLoadError(f"{shown(config.path)}: num_labels={shown(count)}: must be a positive integer.")
    return tuple(f"LABEL_{index}" for index in range(count))


def _adjusted(plan: PoolingPlan, pooler: Mapping[str, Any]) -> PoolingPlan:
    """With what --pooler-config says."""
    info = plan.info
    for key, value in pooler.items():
        if value is None:
            continue
        if key in ("pooling_type", "seq_pooling_type"):
            kind = _POOLER_TYPES.get(value) if isinstance(value, str) else None
            if kind is None:
                raise _bad_pooler(key, value, ", ".join(_POOLER_TYPES))
            info = replace(info, type=kind)
        elif key == "use_activation":
            if not isinstance(value, bool):
                raise _bad_pooler(key, value, "true, false")
            off = dict.fromkeys(info.tasks, "none")
            info = replace(info, activate=value, activations=info.activations if value else off)  # type: ignore[arg-type]
        elif key == "task":
            if value not in info.tasks:
                raise _bad_pooler(key, value, ", ".join(info.tasks))
            info = replace(info, tasks=(value, *(task for task in info.tasks if task != value)))
        else:
            raise _bad_pooler(key, value, "pooling_type, seq_pooling_type, use_activation, task", of="keys")
    return replace(plan, info=info)


def _bad_pooler(key: str, value: object, choices: str, of: str = "values") -> StartupError:
    return StartupError(
        f"--pooler-config: {shown(key)}: {shown(value)} is not supported.",
        param="--pooler-config",
        advice=f"Supported {of}: {choices}.",
    )


class _Files:
    """sentence-transformers' files of a model's folder."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.directory = directory
        self._config = config
        modules = directory / "modules.json"
        self._modules: list[tuple[str, str]] = []
        """(class, path) of each part."""
        if exists(modules):
            for entry in read_json_list(modules):
                if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
                    raise ModelLoadError(f"{shown(modules)}: {shown(entry)} is no module with a type.")
                self._modules.append((entry["type"].rpartition(".")[2], str(entry.get("path", ""))))

    @property
    def pools(self) -> bool:
        """Whether they say how to make embeddings."""
        return any(name == "Pooling" for name, _ in self._modules)

    def pooling(self) -> tuple[PoolingType | None, bool]:
        """(how embeddings are made, whether they are normalised). Without files: by the architecture, and
        normalised, as in vLLM."""
        if not self._modules:
            return None, True
        kind: PoolingType | None = None
        for name, path in self._modules:
            if name == "Pooling":
                kind = self._mode(path)
            elif name not in ("Transformer", "Normalize"):
                raise ModelLoadError(
                    f"{shown(self.directory / 'modules.json')}: the module {shown(name)} is not supported.",
                    advice="Supported: Transformer, Pooling, Normalize, LogitScore.",
                )
        return kind, any(name == "Normalize" for name, _ in self._modules)

    def logit_score(self) -> Mapping[str, Any] | None:
        """The configuration of the module that scores by the logits of tokens."""
        path = next((path for name, path in self._modules if name == "LogitScore"), None)
        return None if path is None else self._of(path)

    def longest(self) -> int | None:
        """max_seq_length."""
        for name in (
            "sentence_bert_config.json",
            "sentence_roberta_config.json",
            "sentence_xlm-roberta_config.json",
        ):
            file = self.directory / name
            if exists(file):
                value = read_json(file).get("max_seq_length")
                if value is None:
                    return None
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ModelLoadError(
                        f"{shown(file)}: max_seq_length={shown(value)}: must be a positive integer."
                    )
                return value
        return None

    def instructions(self) -> dict[str, str] | None:
        """What texts begin with, by what they are for; None where they all begin alike. Entries that are no
        texts do not count, as in vLLM."""
        own = self.directory / "config_sentence_transformers.json"
        given = self._config.raw.get("task_instructions")
        if not (isinstance(given, dict) and given):
            given = read_json(own).get("prompts") if exists(own) else None
        found = given.items() if isinstance(given, dict) else ()
        texts = {name: words for name, words in found if isinstance(words, str)}
        return texts if any(texts.values()) else None

    def activation(self) -> Activation | None:
        """Of a cross-encoder."""
        own = self.directory / "config_sentence_transformers.json"
        nested = self._config.raw.get("sentence_transformers")
        name = nested.get("activation_fn") if isinstance(nested, dict) else None
        name = name or self._config.raw.get("sbert_ce_default_activation_function")
        if name is None and exists(own):
            name = read_json(own).get("activation_fn")
        if name is None:
            kind = self._config.raw.get("problem_type")
            kinds: dict[object, Activation] = {"regression": "none", "multi_label_classification": "sigmoid"}
            return kinds.get(kind)
        activation = _ACTIVATIONS.get(str(name).rpartition(".")[2])
        if activation is None:
            raise ModelLoadError(
                f"{shown(self._config.path)}: activation_fn={shown(name)} is not supported.",
                advice=f"Supported: {', '.join(_ACTIVATIONS)} of torch.nn.",
            )
        return activation

    def _mode(self, path: str) -> PoolingType:
        config = self._of(path)
        mode = config.get("pooling_mode")
        modes = (
            [mode]
            if mode is not None
            else [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        )
        kind = _MODES.get(modes[0]) if len(modes) == 1 and isinstance(modes[0], str) else None
        if kind is None:
            raise ModelLoadError(
                f"{shown(self.directory / path / 'config.json')}: the pooling mode {shown(modes)} is not "
                "supported.",
                advice="Supported: cls, mean, lasttoken, one of them.",
            )
        return kind

    def _of(self, path: str) -> dict[str, Any]:
        """The configuration of a module, in a folder of the model's."""
        parts = path.split("/")
        if any(part in ("..", ".") for part in parts) or path.startswith("/") or "\0" in path:
            raise ModelLoadError(
                f"{shown(self.directory / 'modules.json')}: {shown(path)} is no folder of this model."
            )
        file = self.directory / path / "config.json"
        return read_json(file, root=self.directory)
