"""Encoding, decoding, special tokens and templates of a model directory, as transformers reads it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.text.tokenizer import Pieces, Tokenizer

KINDS = ["byte_level", "sentencepiece", "gemma", "metaspace", "wordpiece"]
REVERSIBLE = ["byte_level", "sentencepiece", "gemma"]


def set_config(directory, **changes):
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", REVERSIBLE)
@given(text=st.text())
@settings(derandomize=True, max_examples=100, deadline=None)
def test_what_is_encoded_is_decoded(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    text = text.replace("▁", "_")  # SentencePiece's own space
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", REVERSIBLE)
@given(text=st.text(min_size=1))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_bytes_of_the_tokens_join_to_the_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    text = text.replace("▁", "_")
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined == (" " if tokenizer.drops_first_space else "") + text


def test_kinds_are_recognised(tokenizers):
    assert {kind: tokenizer.pieces for kind, tokenizer in tokenizers.items()} == {
        "byte_level": Pieces.BYTE_LEVEL,
        "sentencepiece": Pieces.SENTENCEPIECE,
        "gemma": Pieces.SENTENCEPIECE,
        "metaspace": Pieces.OTHER,
        "wordpiece": Pieces.OTHER,
    }


def test_special_tokens(tokenizers):
    tokenizer = tokenizers["byte_level"]
    assert (tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)) == ("<s>", "</s>")
    special = [tokenizer.token(id) for id in sorted(tokenizer.special_ids)]
    assert special == ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"
    assert tokenizer.token_text(ids[0]) == "<|im_start|>"
    assert ids[0] in tokenizer.special_ids


def test_pieces_texts_and_bytes(tokenizers):
    byte_level, llama = tokenizers["byte_level"], tokenizers["sentencepiece"]
    newline = llama.token_id("<0x0A>")
    assert (llama.token(newline), llama.token_text(newline), llama.token_bytes(newline)) == (
        "<0x0A>",
        "\n",
        b"\n",
    )
    assert llama.token_text(llama.token_id("<0xF0>")) == "\ufffd"
    assert llama.token_bytes(llama.token_id("<0xF0>")) == b"\xf0"
    assert llama.is_byte(newline)
    [half, *_] = byte_level.encode("😁")
    assert byte_level.token_text(half) == "\ufffd"
    assert "😁".encode().startswith(byte_level.token_bytes(half))
    space = byte_level.token_id("Ġthe")
    assert (byte_level.token(space), byte_level.token_text(space)) == ("Ġthe", " the")
    assert (byte_level.token(10**9), byte_level.token_bytes(10**9), byte_level.token_text(-1)) == (
        "",
        b"",
        "",
    )


def test_batches_equal_single_texts(tokenizers):
    texts = ["hello world", "", "你好 😀"]
    for tokenizer in tokenizers.values():
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizers["sentencepiece"].encode_batch([], add_special_tokens=False) == []


def test_vocabulary_size_counts_added_tokens(model_directory):
    before = Tokenizer.from_directory(model_directory).vocab_size
    set_config(model_directory, added_tokens_decoder={str(before): {"content": "<tool>", "special": False}})
    tokenizer = Tokenizer.from_directory(model_directory)
    assert tokenizer.vocab_size == before + 1
    assert tokenizer.encode("<tool>") == [before]
    assert tokenizer.decode([before]) == "<tool>"


@pytest.mark.parametrize("value", [True, False, None])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("form", ["string", "dict"])
def test_tokenizer_json_decides_about_bos_as_in_transformers(directories, tmp_path, kind, value, form):
    directory = tmp_path / kind
    directory.mkdir()
    (directory / "tokenizer.json").write_text((directories[kind] / "tokenizer.json").read_text())
    bos = "<s>" if form == "string" else {"content": "<s>", "__type": "AddedToken", "special": True}
    config = {"bos_token": bos, "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if value is not None:
        config["add_bos_token"] = value
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    wanted = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer = Tokenizer.from_directory(directory)
    for text in ("hello world", ""):
        assert tokenizer.encode(text) == wanted(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == wanted.encode(
            text, add_special_tokens=False
        )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (wanted.bos_token_id, wanted.eos_token_id)


def test_names_come_from_the_old_map_too(model_directory):
    (model_directory / "tokenizer_config.json").write_text("{}")
    (model_directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<s>"]})
    )
    tokenizer = Tokenizer.from_directory(model_directory)
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>")
    assert tokenizer.bos_id is None
    assert tokenizer.special_tokens["additional_special_tokens"] == ["<s>"]


def test_a_named_token_is_special_even_if_only_the_vocabulary_has_it(model_directory):
    set_config(model_directory, eos_token="Ġthe")
    tokenizer = Tokenizer.from_directory(model_directory)
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_truncation_and_padding_of_the_file_are_ignored(model_directory):
    file = model_directory / "tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(state))
    assert len(Tokenizer.from_directory(model_directory).encode("hello hello hello hello hello")) > 2


def test_model_max_length(model_directory):
    for value, wanted in ((4096, 4096), (1e30, None), (None, None)):
        set_config(model_directory, model_max_length=value)
        assert Tokenizer.from_directory(model_directory).model_max_length == wanted
    assert Tokenizer.from_directory(model_directory, model_max_length=7).model_max_length == 7


def test_templates_and_where_they_come_from(model_directory):
    def templates():
        return Tokenizer.from_directory(model_directory).chat_templates

    assert templates() == {}
    set_config(model_directory, chat_template="one")
    assert templates() == {"default": "one"}
    set_config(
        model_directory,
        chat_template=[{"name": "default", "template": "two"}, {"name": "tool_use", "template": "tools"}],
    )
    assert templates() == {"default": "two", "tool_use": "tools"}
    assert Tokenizer.from_directory(model_directory).chat_template == "two"
    (model_directory / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert templates()["default"] == "three"
    (model_directory / "chat_template.jinja").write_text("four")
    assert templates()["default"] == "four"
    (model_directory / "additional_chat_templates").mkdir()
    (model_directory / "additional_chat_templates" / "rag.jinja").write_text("five")
    assert templates() == {"default": "four", "tool_use": "tools", "rag": "five"}


def test_a_directory_without_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json\. Download it"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model: make the fast format"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"version": "1.0", "model"', "[]", "\x00\x01"])
def test_a_damaged_tokenizer_is_named(model_directory, text):
    (model_directory / "tokenizer.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_directory(model_directory)


@pytest.mark.parametrize(
    ("content", "cause"), [(b"{", "not valid JSON"), (b"[]", "JSON object"), (b"\xff", "read")]
)
def test_a_damaged_configuration_is_named(model_directory, content, cause):
    (model_directory / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"tokenizer_config\.json.*{cause}"):
        Tokenizer.from_directory(model_directory)


def test_bad_input_is_the_clients_fault(tokenizers):
    tokenizer = tokenizers["byte_level"]
    with pytest.raises(InvalidRequest, match="no valid Unicode"):
        tokenizer.encode("half a pair: \ud83d")
    with pytest.raises(InvalidRequest, match="no valid Unicode"):
        tokenizer.encode_batch(["fine", "\ud83d"])
    for ids in ([-1], [2**40]):
        with pytest.raises(InvalidRequest, match="token ids must be integers"):
            tokenizer.decode(ids)


def test_ids_that_no_tokenizer_has_name_the_field(tokenizers):
    for ids in ([-1], [2**40]):
        with pytest.raises(InvalidRequest, match="token ids must be integers from 0 to") as caught:
            tokenizers["byte_level"].decode(ids)
        assert caught.value.param == "tokens"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_batch_is_encoded_as_its_texts_are(tokenizers, kind, special):
    tokenizer, texts = tokenizers[kind], ["hello", "", "你好 x"]
    wanted = [tokenizer.encode(text, special) for text in texts]
    assert tokenizer.encode_batch(texts, special) == wanted


def test_an_id_between_others_may_have_no_token():
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    rust.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(rust)
    assert tokenizer.special_tokens == {}
    assert [tokenizer.token(id) for id in (-1, 0, 3, 5, 5000)] == ["", "a", "", "b", ""]
    assert [tokenizer.token_bytes(id) for id in (0, 3, 5, 5000)] == [b"a", b"", b"b", b""]
    (special,) = tokenizer.special_ids
    assert tokenizer.token_bytes(special) == b"<s>"


def test_what_cannot_be_encoded_is_refused(tokenizers):
    for text, said in (("\ud800", "the text is no valid Unicode"), (5, "must be a string, got int")):
        with pytest.raises(InvalidRequest, match=said):
            tokenizers["byte_level"].encode(text)


def added(directory, **fields):
    """The token `<x>`, which only the configuration lists, as it was added."""
    set_config(directory, added_tokens_decoder={"900": {"content": "<x>", **fields}})
    tokenizer = Tokenizer.from_directory(directory)
    [token] = [each for each in tokenizer._rust.get_added_tokens_decoder().values() if each.content == "<x>"]
    return token


FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@pytest.mark.parametrize("field", FIELDS)
def test_an_added_token_has_the_fields_that_it_is_listed_with(model_directory, field):
    token = added(model_directory)
    assert [getattr(token, name) for name in FIELDS] == [False] * 5
    token = added(model_directory, **{field: True})
    assert [getattr(token, name) for name in FIELDS] == [name == field for name in FIELDS]


@pytest.mark.parametrize("key", ["", "x", "-1", "1.5", "１", "²", "12345678901"])
def test_a_token_is_listed_under_its_id(model_directory, key):
    set_config(model_directory, added_tokens_decoder={key: {"content": "<x>"}})
    with pytest.raises(ModelLoadError, match=r"added_tokens_decoder has the key .*, which is no token id"):
        Tokenizer.from_directory(model_directory)


def test_what_is_listed_without_a_text_is_no_token(model_directory):
    before = Tokenizer.from_directory(model_directory).vocab_size
    listed = {"1234567890": {"content": ""}, "901": {}, "902": None, "903": {"content": 5}}
    set_config(model_directory, added_tokens_decoder=listed)
    assert Tokenizer.from_directory(model_directory).vocab_size == before


def test_a_named_token_is_marked_as_special_only_where_the_vocabulary_has_it(model_directory):
    before = Tokenizer.from_directory(model_directory)
    set_config(model_directory, pad_token="<no such token>", unk_token="e", mask_token="t")
    after = Tokenizer.from_directory(model_directory)
    assert after.vocab_size == before.vocab_size
    assert {after.token(id) for id in after.special_ids - before.special_ids} == {"e", "t"}
    token = after._rust.get_added_tokens_decoder()[after.token_id("e")]
    assert (token.special, token.normalized) == (True, False)
    assert after.special_tokens["mask_token"] == "t"


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_more_special_tokens_by_either_name(model_directory, key):
    set_config(model_directory, **{key: ["<a>", {"content": "<b>"}, 5]})
    found = Tokenizer.from_directory(model_directory).special_tokens
    assert found["additional_special_tokens"] == ["<a>", "<b>"]
    set_config(model_directory, **{key: {"image_token": "<i>", "none": 5}})
    found = Tokenizer.from_directory(model_directory).special_tokens
    assert (found["image_token"], "none" in found, "additional_special_tokens" in found) == (
        "<i>",
        False,
        False,
    )
    set_config(model_directory, **{key: []})
    assert "additional_special_tokens" not in Tokenizer.from_directory(model_directory).special_tokens


def test_templates_without_a_name_or_a_text_are_passed_over(model_directory):
    templates = [
        {"name": "a", "template": "x"},
        {"name": "b"},
        {"template": "y"},
        {"name": 5, "template": "z"},
        "w",
    ]
    set_config(model_directory, chat_template=templates)
    assert Tokenizer.from_directory(model_directory).chat_templates == {"a": "x"}


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_another_format_is_named_in_the_advice(tmp_path, name):
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.from_directory(tmp_path)
    assert caught.value.advice.startswith("Download it")
    (tmp_path / name).write_text("{}")
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert caught.value.advice.startswith(f"It has {name}: make the fast format")
