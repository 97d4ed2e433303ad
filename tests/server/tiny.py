"""The model of these tests, as far as the server sees one: a byte-level tokenizer and a chat template."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from penstock.text.tokenizer import Tokenizer

MODEL = "tiny"
REPLY = "Hello, wörld! 🌊"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}{{ mood | default('') }}"
)


def make_tokenizer() -> Tokenizer:
    """One token for each byte (ids 0 to 255), and three special tokens (256 to 258)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(t, special=True) for t in ("<|start|>", "<|end|>", "<|eos|>")])
    return Tokenizer(rust, special_tokens={"eos_token": "<|eos|>"}, chat_templates={"default": TEMPLATE})
