import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.errors import BenchError
from penstock.bench.prompts import FIRST_TOKEN_ID, Prompt, RandomPrompts, read_jsonl


@given(
    input_len=st.integers(1, 200),
    output_len=st.integers(1, 200),
    ratio=st.floats(0, 0.99),
    prefix_len=st.integers(0, 50),
    vocab_size=st.integers(2, 5000),
    seed=st.integers(0, 1000),
)
def test_token_id_prompts_have_the_wanted_lengths(
    input_len: int, output_len: int, ratio: float, prefix_len: int, vocab_size: int, seed: int
) -> None:
    source = RandomPrompts(input_len, output_len, ratio, prefix_len, vocab_size=vocab_size)
    prompts = source.draw(5, seed)
    assert prompts == source.draw(5, seed)
    for prompt in prompts:
        assert isinstance(prompt.content, list)
        assert prompt.input_tokens == len(prompt.content)
        assert prompt.content[:prefix_len] == prompts[0].content[:prefix_len]
        assert all(0 <= token < vocab_size for token in prompt.content)  # type: ignore[operator]
        assert max(1, round(input_len * (1 - ratio))) <= len(prompt.content) - prefix_len
        assert len(prompt.content) - prefix_len <= max(1, round(input_len * (1 + ratio)))
        assert max(1, round(output_len * (1 - ratio))) <= prompt.max_tokens
        assert prompt.max_tokens <= max(1, round(output_len * (1 + ratio)))


def test_low_token_ids_are_left_to_the_special_tokens() -> None:
    prompts = RandomPrompts(input_len=1000, vocab_size=200).draw(2, seed=0)
    assert min(min(prompt.content) for prompt in prompts) >= FIRST_TOKEN_ID  # type: ignore[type-var]


def test_more_prompts_do_not_change_the_first_ones() -> None:
    source = RandomPrompts(range_ratio=0.5)
    assert source.draw(9, seed=3)[:4] == source.draw(4, seed=3)
    assert source.draw(4, seed=3) != source.draw(4, seed=4)


def test_text_prompts_are_words_scaled_to_the_tokenizer() -> None:
    (prompt,) = RandomPrompts(input_len=30, prefix_len=12, format="text", tokens_per_word=1.5).draw(1, seed=0)
    assert isinstance(prompt.content, str)
    assert len(prompt.content.split()) == 20 + 8
    assert prompt.input_tokens is None


@pytest.mark.parametrize(
    "arguments",
    [{"input_len": 0}, {"output_len": 0}, {"prefix_len": -1}, {"range_ratio": 1.0}, {"vocab_size": 1}],
)
def test_impossible_lengths_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(BenchError):
        RandomPrompts(**arguments)  # type: ignore[arg-type]


def test_a_prompt_becomes_the_body_of_its_endpoint() -> None:
    assert Prompt("Hi", 5).body(chat=False) == {"prompt": "Hi", "max_tokens": 5}
    messages = [{"role": "user", "content": "Hi"}]
    assert Prompt("Hi", 5).body(chat=True) == {"messages": messages, "max_completion_tokens": 5}
    assert Prompt(messages, 5).body(chat=True)["messages"] == messages


def _write(folder: Path, *rows: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8"
    )
    return path


def test_json_lines_are_read_in_order_and_repeated(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        {"prompt": "a"},
        "",
        {"prompt": [1, 2], "max_tokens": 7},
        {"prompt": "c", "output_tokens": 9},
    )
    prompts = read_jsonl(path, 4, chat=False, output_len=16)
    assert prompts == [Prompt("a", 16), Prompt([1, 2], 7, 2), Prompt("c", 9), Prompt("a", 16)]


def test_messages_are_for_chat(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = _write(tmp_path, {"messages": messages})
    assert read_jsonl(path, 1, chat=True, output_len=16) == [Prompt(messages, 16)]
    with pytest.raises(BenchError, match=r"prompts.jsonl:1.*--endpoint /v1/chat/completions"):
        read_jsonl(path, 1, chat=False, output_len=16)


@pytest.mark.parametrize(
    ("row", "chat", "complaint"),
    [
        ("{", False, "jsonl:1: not JSON"),
        ([1], False, 'needs a non-empty "prompt"'),
        ({"prompt": ""}, False, 'needs a non-empty "prompt"'),
        ({"prompt": {"text": "a"}}, False, "must be text or a list of token ids"),
        ({"prompt": [1, 2]}, True, "--endpoint /v1/completions"),
        ({"prompt": "a", "max_tokens": 0}, False, "max_tokens is 0"),
        ("", False, "has no prompts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, chat: bool, complaint: str) -> None:
    with pytest.raises(BenchError, match=complaint):
        read_jsonl(_write(tmp_path, row), 1, chat=chat, output_len=16)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot read --dataset-path .*nowhere"):
        read_jsonl(tmp_path / "nowhere", 1, chat=False, output_len=16)
