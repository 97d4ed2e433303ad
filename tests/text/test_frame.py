"""What is put around texts by hand is what the tokenizer puts around them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from penstock.text.tokenizer import Tokenizer

WORDS = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6, "[UNK]": 7}
PROCESSORS = {
    "bert": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "bert-template": processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    ),
    "xlm-roberta": processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    ),
    "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    "qwen3-embedding": processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    ),
    "typed-separator": processors.TemplateProcessing(
        single="$A", pair="$A [SEP]:1 $B:1", special_tokens=[("[SEP]", 3)]
    ),
    "none": None,
}
TEXT = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


def tokenizer_of(name: str) -> Tokenizer:
    rust = RustTokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    if (processor := PROCESSORS[name]) is not None:
        rust.post_processor = processor
    return Tokenizer(rust)


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=20, deadline=None)
@given(first=TEXT, second=TEXT)
def test_one_text_and_two(name: str, first: str, second: str) -> None:
    tokenizer = tokenizer_of(name)
    frame, rust = tokenizer.frame, tokenizer._rust
    bare = [tokenizer.encode(text, add_special_tokens=False) for text in (first, second)]
    assert frame.around(bare[0]) == tokenizer.encode(first)
    whole = rust.encode(first, second)
    ids, begin = frame.between(*bare)
    assert ids == whole.ids
    types = [0] * len(ids) if begin is None else [int(place >= begin) for place in range(len(ids))]
    assert types == whole.type_ids
