"""The bundled demo model: its files are complete, small and consistent with the FAQ it was trained on."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "penstock" / "assets" / "demo"
CORPUS = ROOT / "tools" / "demo" / "corpus.py"
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read(name: str) -> dict[str, Any]:
    """One JSON file of the checkpoint."""
    content: dict[str, Any] = json.loads((DEMO / name).read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    """``tools/demo/corpus.py``, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("demo_corpus", CORPUS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def render(messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    """Render the chat template with the settings that transformers uses."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(read("tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def weight_shapes() -> dict[str, tuple[str, list[int]]]:
    """Name, dtype and shape of every tensor, from the safetensors header alone."""
    with (DEMO / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: (t["dtype"], t["shape"]) for name, t in header.items() if name != "__metadata__"}


def test_files_are_complete_and_small() -> None:
    assert {path.name for path in DEMO.iterdir()} == set(FILES)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 6_000_000


def test_config_describes_a_small_qwen3() -> None:
    config = read("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["torch_dtype"] == "bfloat16"


def test_weights_match_the_config(tokenizer: Tokenizer) -> None:
    config, weights = read("config.json"), weight_shapes()
    hidden, head = config["hidden_size"], config["head_dim"]
    assert {dtype for dtype, _ in weights.values()} == {"BF16"}
    assert weights["model.embed_tokens.weight"][1] == [config["vocab_size"], hidden]
    assert "lm_head.weight" not in weights
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    assert len(layers) == config["num_hidden_layers"]
    attention = "model.layers.0.self_attn."
    assert weights[attention + "q_proj.weight"][1] == [config["num_attention_heads"] * head, hidden]
    assert weights[attention + "k_proj.weight"][1] == [config["num_key_value_heads"] * head, hidden]
    assert weights[attention + "q_norm.weight"][1] == [head]
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_generation_is_greedy_and_ends_at_the_end_marks(tokenizer: Tokenizer) -> None:
    generation, config = read("generation_config.json"), read("config.json")
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert generation["do_sample"] is False
    assert generation["eos_token_id"] == ends
    assert config["eos_token_id"] == ends[0]
    assert config["pad_token_id"] == ends[1]


@pytest.mark.parametrize(
    "text",
    [
        "What is a Pod?",
        "  leading, double  and trailing spaces \n\n\ttabs\r\n",
        "Grüße, naïve café, 漢字かな交じり文, русский, العربية, हिन्दी",
        "e\u0301 is not \u00e9",
        "👩‍💻🏳️‍🌈 and \u200b\ufeff zero width",
        "".join(map(chr, range(1, 256))),
        "\U0010ffff\u0000\ufffd",
    ],
)
def test_tokenizer_returns_every_text_unchanged(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_knows_all_bytes_and_marks(tokenizer: Tokenizer) -> None:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.token_to_id(mark) for mark in marks] == [0, 1, 2]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n").ids.count(1) == 1
    single = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(single) == 256


def test_template_renders_chatml() -> None:
    user = {"role": "user", "content": "What is a Pod?"}
    assert render([user]) == "<|im_start|>user\nWhat is a Pod?<|im_end|>\n<|im_start|>assistant\n"
    assert render([user], add_generation_prompt=False) == "<|im_start|>user\nWhat is a Pod?<|im_end|>\n"
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a Pod?"}]
    assert render([{"role": "user", "content": parts}]) == render([user])


def test_template_is_what_the_model_was_trained_on(corpus: ModuleType) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "what is a pod"},
    ]
    assert render(messages) == corpus.chat_prompt([("hi", "Hello!")], "what is a pod", "Be brief.")
    assert render(messages[1:]) == corpus.chat_prompt([("hi", "Hello!")], "what is a pod")


def test_faq_is_large_and_has_paraphrases(corpus: ModuleType) -> None:
    entries = corpus.load_faq().entries
    assert len(entries) >= 250
    assert sum(len(entry.paraphrases) for entry in entries) >= 4 * len(entries)
    assert all(20 < len(entry.answer) < 400 for entry in entries)


@pytest.mark.parametrize("path", sorted((CORPUS.parent / "faq").glob("*.md")), ids=lambda path: path.stem)
def test_every_faq_file_parses(corpus: ModuleType, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    entries = corpus.parse_entries(text, path.name)
    assert len(entries) == text.count("\n## ")


def test_malformed_entry_is_refused_by_name(corpus: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"x\.md: entry 'What is it\?'"):
        corpus.parse_entries("## What is it?\n- it\n", "x.md")


def test_no_question_has_two_answers(corpus: ModuleType) -> None:
    faq = corpus.load_faq()
    answers: dict[str, str] = {}
    pairs = [(question, entry.answer) for entry in faq.entries for question in entry.questions]
    scope = faq.out_of_scope
    declined = (
        *scope.questions,
        *scope.held_out,
        *scope.near_questions,
        *scope.near_tuning,
        *scope.near_held_out,
    )
    pairs += [(question, scope.answer) for question in declined]
    named = [(term, entry.answer) for entry in faq.entries for term in entry.terms]
    pairs += [(pattern.format(term), answer) for term, answer in named for pattern in corpus.PATTERNS]
    for question, answer in pairs:
        assert answers.setdefault(corpus.normalise(question), answer) == answer, question


def test_samples_repeat_with_the_seed_and_avoid_held_out_questions(corpus: ModuleType) -> None:
    faq = corpus.load_faq()
    first, second = corpus.Sampler(faq, seed=7), corpus.Sampler(faq, seed=7)
    held_out = {corpus.normalise(q) for entry in faq.entries for q in corpus.held_out_questions(entry)}
    assert len(held_out) > 200
    held_out |= {
        corpus.normalise(q) for q in (*faq.out_of_scope.near_held_out, *faq.out_of_scope.near_tuning)
    }
    for _ in range(300):
        turns = first.turns(2)
        assert turns == second.turns(2)
        assert not held_out & {corpus.normalise(question) for question, _ in turns}


def test_no_declined_question_is_a_paraphrase_of_a_held_out_one(corpus: ModuleType) -> None:
    """Else the figures of the README on held-out questions near the FAQ would be those of trained ones."""
    scope = corpus.load_faq().out_of_scope
    sampler = corpus.Sampler(corpus.load_faq(), seed=3)
    held_out = [set(corpus.content(question)) for question in (*scope.near_tuning, *scope.near_held_out)]
    drawn = [sampler.declined()[0] for _ in range(2000)]
    for question in (*scope.near_questions, *drawn):
        words = set(corpus.content(question))
        assert not any(known <= words for known in held_out), question


@pytest.mark.parametrize(
    ("question", "paraphrase"),
    [
        ("who made the containers", "who invented containers"),
        ("When was vllm founded?", "in which year was vLLM released"),
        ("what is the finalizer good for?", "What is a finalizer?"),
    ],
)
def test_paraphrases_have_the_same_content(corpus: ModuleType, question: str, paraphrase: str) -> None:
    assert set(corpus.content(question)) == set(corpus.content(paraphrase))


def test_declined_questions_put_together_by_chance_are_none_that_the_faq_answers(corpus: ModuleType) -> None:
    faq = corpus.load_faq()
    answered = {frozenset(corpus.content(question)) for entry in faq.entries for question in entry.questions}
    sampler = corpus.Sampler(faq, seed=4)
    drawn = [sampler.combined() for _ in range(1000)]
    assert not [question for question in drawn if frozenset(corpus.content(question)) in answered]
    assert len(set(drawn)) > 900
