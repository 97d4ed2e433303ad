"""Models that pool, against transformers: vectors, labels and scores within 1e-4 in float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import InvalidRequest, ModelLoadError, StartupError, UnsupportedParameter
from penstock.core.pooling import Pooling, Vectors
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.engine import build
from penstock.engine.build import Engine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.messages import Add
from penstock.model.config import load_config, pooling_architectures
from penstock.model.pooling import pooling_plan
from tests.model.encoders import ENCODERS, expected, make_encoder, modules

IDS = (0, 17, 5, 33, 88, 2, 9, 41, 12, 7, 7, 50, 2)
PROMPTS = [IDS, (0, 3, 2), tuple(range(3, 60)), (4,)]


@dataclass
class Asking:
    """An engine, asked for vectors."""

    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # two steps are needed for the prompts, and one of them is longer than a step
        given = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "max_model_len": 60} | self.settings
        self.engine: Engine = build_engine(
            EngineConfig(
                model=str(self.directory), dtype="float32", kv_cache_memory_bytes=1 << 22, threads=1, **given
            )
        )
        info = self.engine.info.pooling
        assert info is not None
        self.info = info

    def __call__(self, prompts: list[Prompt], pooling: Pooling | None = None) -> list[Vectors]:
        wanted, loop = pooling or self.info.pooling(), self.engine.loop
        got: dict[str, Vectors] = {}
        loop.handle(Add(RequestSpec(id="r", prompts=tuple(prompts), pooling=wanted)))
        while loop.has_work:
            for event in loop.step():
                assert event.failure is None, event.failure
                assert event.pooled is not None
                assert event.device_seconds > 0
                got[event.request] = event.pooled
            loop.scheduler.check()
        names = [f"r:{index}" for index in range(len(prompts))] if len(prompts) > 1 else ["r"]
        return [got[name] for name in names]


def prompts_of(*ids: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(each, 0) for each in ids]


def close(got: Vectors, want: torch.Tensor) -> None:
    rows = torch.tensor(got.rows)
    torch.testing.assert_close(rows, want.reshape(rows.shape), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def _measured_once() -> Iterator[None]:
    """What the machine can do is not measured anew for each model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "inspect_hardware", functools.cache(build.inspect_hardware))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → its checkpoint."""
    there: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in there:
            there[name] = make_encoder(tmp_path_factory.mktemp(name), name)
        return there[name]

    return make


@pytest.mark.parametrize(
    "name", ["bert", "bert-masked", "bert-relu", "roberta", "xlm-roberta", "qwen3-model"]
)
def test_embeddings_are_those_of_transformers(made: Any, name: str) -> None:
    ask = Asking(made(name))
    assert ask.info.tasks == ("embed", "token_embed")
    assert ask.info.dimension == 48
    last = name.startswith("qwen")
    for ids, vector in zip(PROMPTS, ask(prompts_of(*PROMPTS)), strict=True):
        hidden = expected(made(name), name, ids)
        close(vector, torch.nn.functional.normalize(hidden[-1 if last else 0], dim=0))
    plain = ask.info.pooling("token_embed", activate=False)
    for ids, vectors in zip(PROMPTS, ask(prompts_of(*PROMPTS), plain), strict=True):
        close(vectors, expected(made(name), name, ids))


@pytest.mark.parametrize(
    "name", ["bert-classes", "bert-cross", "xlm-roberta-cross", "qwen3-cross", "llama-classes"]
)
def test_labels_are_those_of_transformers(made: Any, name: str) -> None:
    ask = Asking(made(name))
    labels = ENCODERS[name][2]["num_labels"]
    assert (ask.info.tasks, len(ask.info.labels)) == (("classify", "token_classify"), labels)
    plain = ask.info.pooling("classify", activate=False)
    for ids, numbers in zip(PROMPTS, ask(prompts_of(*PROMPTS), plain), strict=True):
        close(numbers, expected(made(name), name, ids))
    logits = expected(made(name), name, IDS)
    close(ask(prompts_of(IDS))[0], logits.sigmoid() if labels == 1 else logits.softmax(-1))


def test_tokens_are_labelled(made: Any) -> None:
    ask = Asking(made("bert-tokens"))
    assert ask.info.tasks == ("token_classify",)
    close(ask(prompts_of(IDS))[0], expected(made("bert-tokens"), "bert-tokens", IDS).softmax(-1))


def test_the_second_of_two_texts_has_a_type_of_its_own(made: Any) -> None:
    """Beside a prompt of one text, in the same step."""
    ask, name = Asking(made("bert-cross")), "bert-cross"
    pair, alone = ask([Prompt(IDS, 0, second=6), Prompt(IDS, 0)])
    close(pair, expected(made(name), name, IDS, second=6).sigmoid())
    close(alone, expected(made(name), name, IDS).sigmoid())
    assert pair != alone


@pytest.mark.parametrize("name", ["bert", "qwen3-lm"])
@pytest.mark.parametrize(("mode", "normalize", "old"), [("mean", True, True), ("cls", False, False)])
def test_pooling_is_as_the_files_say(
    tmp_path: Path, name: str, mode: str, normalize: bool, old: bool
) -> None:
    """A decoder pools in chunks, and none of its positions may come from the prefix cache."""
    path = make_encoder(tmp_path, name, files=modules(mode, normalize=normalize, old=old))
    ask = Asking(path)
    for _ in range(2):
        for ids, vector in zip(PROMPTS, ask(prompts_of(*PROMPTS)), strict=True):
            hidden = expected(path, name, ids)
            want = hidden.mean(0) if mode == "mean" else hidden[0]
            close(vector, torch.nn.functional.normalize(want, dim=0) if normalize else want)


def test_a_decoder_finds_prefixes_where_its_last_position_is_wanted(tmp_path: Path) -> None:
    ask = Asking(make_encoder(tmp_path, "qwen3-lm"), {"convert": "embed", "block_size": 4})
    first, again = ask(prompts_of(PROMPTS[2]))[0], ask(prompts_of(PROMPTS[2]))[0]
    assert first.row == pytest.approx(again.row, abs=1e-5)
    assert ask.engine.loop.scheduler.totals.prefix_hits == 56
    ask(prompts_of(PROMPTS[2]), ask.info.pooling("token_embed"))
    assert ask.engine.loop.scheduler.totals.prefix_hits == 56


@pytest.mark.parametrize("tied", [True, False])
def test_a_reranker_that_answers_with_a_token(tmp_path: Path, tied: bool) -> None:
    """Qwen3-Reranker: the logit of one token less that of another."""
    score = {"modules.json": [], "1_LogitScore/config.json": {"true_token_id": 7, "false_token_id": 30}}
    kinds = [("", "base.modules.Transformer"), ("1_LogitScore", "cross_encoder.modules.LogitScore")]
    score["modules.json"] = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in kinds]
    path = make_encoder(tmp_path, "qwen3-lm", files=score, tie_word_embeddings=tied)
    ask = Asking(path)
    assert (ask.info.tasks[0], ask.info.pairs, len(ask.info.labels)) == ("classify", "template", 1)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, -1]
    close(ask(prompts_of(IDS))[0], (logits[7] - logits[30]).sigmoid())


def test_bge_m3_has_three_kinds_of_vectors(tmp_path: Path) -> None:
    path = make_encoder(tmp_path, "xlm-roberta", files=modules("cls", normalize=True))
    generator = torch.Generator().manual_seed(5)
    heads = {}
    for name, width in (("colbert_linear", 48), ("sparse_linear", 1)):
        heads[name] = {
            "weight": torch.randn(width, 48, generator=generator),
            "bias": torch.randn(width, generator=generator),
        }
        torch.save(heads[name], path / f"{name}.pt")
    ask = Asking(path)
    assert ask.info.tasks == ("embed", "token_embed", "token_classify")
    hidden = expected(path, "xlm-roberta", IDS)
    close(ask(prompts_of(IDS))[0], torch.nn.functional.normalize(hidden[0], dim=0))
    dense = torch.nn.functional.linear(hidden[1:], **heads["colbert_linear"])
    close(
        ask(prompts_of(IDS), ask.info.pooling("token_embed"))[0], torch.nn.functional.normalize(dense, dim=-1)
    )
    sparse = torch.nn.functional.linear(hidden[1:-1], **heads["sparse_linear"]).relu()
    close(ask(prompts_of(IDS), ask.info.pooling("token_classify"))[0], sparse)
    (path / "sparse_linear.pt").write_bytes(b"no pickle")
    with pytest.raises(ModelLoadError, match=r"sparse_linear\.pt cannot be read"):
        Asking(path)


def test_matryoshka_cuts_before_it_normalises(tmp_path: Path) -> None:
    path = make_encoder(tmp_path, "bert")
    ask = Asking(path, {"hf_overrides": {"matryoshka_dimensions": [16, 48]}})
    want = torch.nn.functional.normalize(expected(path, "bert", IDS)[0, :16], dim=0)
    close(ask(prompts_of(IDS), ask.info.pooling("embed", dimensions=16))[0], want)
    with pytest.raises(InvalidRequest, match="one of 16, 48, got 20"):
        ask.info.pooling("embed", dimensions=20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"architectures": ["BertForCausalLM"]}, "'BertForCausalLM' is not supported"),
        ({"pad_token_id": -1, "architectures": ["RobertaModel"]}, "pad_token_id=-1"),
        ({"max_position_embeddings": 2, "architectures": ["RobertaModel"]}, "no room behind the first 2"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        load_config(make_encoder(tmp_path, "bert"), changes)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (modules("max"), "the pooling mode"),
        (
            {"modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]},
            "'Dense' is not",
        ),
        ({"modules.json": {}}, "must hold a JSON array"),
        ({"modules.json": [{"path": "../x", "type": "a.Pooling"}]}, "no folder of this model"),
        ({"sentence_bert_config.json": {"max_seq_length": -4}}, "max_seq_length=-4"),
    ],
)
def test_files_that_say_what_is_not_supported(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    path = make_encoder(tmp_path, "bert", files=files)
    with pytest.raises(ModelLoadError, match=words):
        pooling_plan(path, load_config(path))


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("bert", {"runner": "generate"}, "--runner generate: .* no output layer"),
        ("bert", {"convert": "classify"}, "--convert classify: .* no classifier"),
        ("qwen3-lm", {"convert": "classify"}, "--convert classify: .* no classifier"),
        ("bert-cross", {"convert": "embed"}, "--convert embed: .* it classifies"),
        ("qwen3-lm", {"runner": "pooling", "convert": "none"}, "it generates unless it is converted"),
        ("qwen3-lm", {"pooler": {"pooling_type": "CLS"}}, "--pooler-config is of models that pool"),
        ("bert", {"pooler": {"pooling_type": "STEP"}}, "'pooling_type': 'STEP' is not supported"),
        ("bert", {"pooler": {"colour": 1}}, "colour"),
    ],
)
def test_flags_that_the_model_is_not_made_for(
    made: Any, name: str, flags: dict[str, Any], words: str
) -> None:
    path = made(name)
    with pytest.raises(StartupError, match=words):
        pooling_plan(path, load_config(path), **flags)


@pytest.mark.parametrize(
    ("prompts", "options", "known"),
    [
        ({"query": "Q: ", "document": ""}, {}, {"query": "Q: ", "document": ""}),
        ({"query": "", "document": ""}, {}, None),  # what sentence-transformers writes where there are none
        ({"query": "Q: ", "other": 5}, {}, {"query": "Q: "}),
        ({"query": "Q: "}, {"task_instructions": {"retrieval.query": "R: "}}, {"retrieval.query": "R: "}),
        ([], {}, None),
        (None, {}, None),
    ],
)
def test_what_texts_begin_with_is_as_the_files_say(
    tmp_path: Path, prompts: Any, options: dict[str, Any], known: dict[str, str] | None
) -> None:
    files = {**modules(), "config_sentence_transformers.json": {"prompts": prompts}}
    path = make_encoder(tmp_path, "bert", files=files, **options)
    plan = pooling_plan(path, load_config(path))
    assert plan is not None
    assert plan.info.instructions == known


def test_what_generates_still_does(made: Any, tmp_path: Path) -> None:
    path = made("qwen3-lm")
    assert pooling_plan(path, load_config(path)) is None
    pools = pooling_plan(path, load_config(path), runner="pooling")
    assert pools is not None
    assert pools.info.type == "last"
    told = make_encoder(tmp_path, "qwen3-lm", files=modules("lasttoken", normalize=True))
    assert pooling_plan(told, load_config(told)) is not None
    assert pooling_plan(told, load_config(told), runner="generate") is None


def test_the_pooler_is_told_by_a_flag(made: Any) -> None:
    path = made("bert")
    plan = pooling_plan(
        path,
        load_config(path),
        pooler={"pooling_type": "MEAN", "use_activation": False, "task": "token_embed"},
    )
    assert plan is not None
    assert plan.info.tasks == ("token_embed", "embed")
    assert plan.info.pooling("embed") == Pooling("mean", "embed", False)
    with pytest.raises(UnsupportedParameter, match="does not support the task classify"):
        plan.info.pooling("classify")


def test_every_architecture_is_named() -> None:
    names = pooling_architectures()
    assert {"BertModel", "XLMRobertaForSequenceClassification", "Qwen3ForSequenceClassification"} <= set(
        names
    )
    assert not {"BertForCausalLM", "LlamaForMaskedLM"} & set(names)
