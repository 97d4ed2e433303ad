"""Text to token ids and back, for one model directory in Hugging Face's layout.

    tokenizer.json            vocabulary, merges, normaliser, decoder, special tokens to add   (required)
    tokenizer_config.json     bos/eos/…, chat_template (not add_bos_token: tokenizer.json decides, as in
                              transformers 5)
    special_tokens_map.json   the same names, in older checkpoints
    chat_template.jinja       the chat template, in newer checkpoints; more of them in
    chat_template.json        additional_chat_templates/*.jinja

It knows pieces, bytes and special tokens. It knows nothing of requests, streams or the model. Everything
here is read-only after construction and may be used from any thread; encoding and decoding release the GIL.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

# Read at each call by the Rust side. Rayon's threads do not survive a fork, and the server encodes from a
# thread pool already; a value of the user's own wins.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.files import TEMPLATE_BYTES, TOKENIZER_BYTES, check, exists, read_json, read_text, shown

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SPACE = "\u2581"  # SentencePiece's visible space, "▁"
_DEFAULT = "default"


class Pieces(Enum):
    """How pieces of the vocabulary become text; decides how a stream of them can be decoded."""

    BYTE_LEVEL = "byte level"
    """Each character of a piece stands for one byte (GPT-2, Llama 3, Qwen, Falcon, NeoX)."""
    SENTENCEPIECE = "sentencepiece"
    """`▁` is a space and `<0x0A>` a byte; the text's first space may be dropped (Llama 2, Mistral)."""
    OTHER = "other"
    """Only the tokenizer's own decoder knows (WordPiece, BPE with suffixes, …)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Special tokens around one text, or two: before the first, between them, behind the last."""

    single: tuple[tuple[int, ...], tuple[int, ...]]
    """(before, behind) a text that is alone."""
    pair: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    has_types: bool
    """Whether the second text has tokens of type 1."""
    typed: int = 0
    """Of the tokens between two texts, how many have type 1, too."""

    def around(self, ids: Sequence[int]) -> list[int]:
        """One text."""
        before, behind = self.single
        return [*before, *ids, *behind]

    def between(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], int | None]:
        """Two texts: (token ids, where those of type 1 begin)."""
        before, middle, behind = self.pair
        ids = [*before, *first, *middle]
        begin = len(ids) - self.typed if self.has_types else None
        return [*ids, *second, *behind], begin


class Tokenizer:
    """Encodes and decodes with `tokenizers`; built by `from_directory`."""

    def __init__(
        self,
        rust: RustTokenizer,
        *,
        special_tokens: Mapping[str, str | list[str]] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        model_max_length: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap `rust` as it is.

        Args:
            rust: the tokenizer; padding and truncation must be off.
            special_tokens: `bos_token`, `eos_token`, … as templates see them; the value of
                `additional_special_tokens` is a list.
            chat_templates: templates by name; the usual one is called "default".
            model_max_length: from the configuration; None when it gives none.
            config: what tokenizer_config.json says, for those who ask.
        """
        self._rust = rust
        self.special_tokens: dict[str, str | list[str]] = dict(special_tokens or {})
        self.chat_templates: dict[str, str] = dict(chat_templates or {})
        self.model_max_length = model_max_length
        self.config: dict[str, Any] = dict(config or {})
        added = rust.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        ids = rust.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max([0, *(id + 1 for id in ids), *(id + 1 for id in added)])
        """One more than the highest id, added tokens included; ids between may have no token, and the model's
        own vocabulary may be padded beyond it."""
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pieces, self._drops_space = _classify(rust)
        self._added = {id: token.content for id, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        fallback = self.pieces is Pieces.SENTENCEPIECE
        self._byte_ids = frozenset(map(rust.token_to_id, _FALLBACK)) - {None} if fallback else frozenset()

    @classmethod
    def from_directory(cls, path: Path, *, model_max_length: int | None = None) -> Tokenizer:
        """Read the tokenizer of a model directory.

        Args:
            path: directory with `tokenizer.json`, or that file itself.
            model_max_length: overrides the configuration's.

        Raises:
            ModelLoadError: a file is missing or cannot be read; names it.
        """
        path = Path(path)
        file = path if os.path.isfile(path) else path / "tokenizer.json"
        directory = file.parent
        if not exists(file):
            raise ModelLoadError(
                f"{shown(directory)} has no tokenizer.json.", advice=_missing_advice(directory)
            )
        check(file, TOKENIZER_BYTES)
        try:
            rust = RustTokenizer.from_file(str(file))
        except BaseException as error:  # the binding raises plain Exception, and panics beside it
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelLoadError(
                f"{shown(file)} cannot be read: {shown(str(error))}.",
                advice="The file may be incomplete, or newer than the installed `tokenizers` package.",
            ) from error
        rust.no_truncation()
        rust.no_padding()
        config_file = directory / "tokenizer_config.json"
        config = _read_json(config_file)
        special = _special_tokens(config, _read_json(directory / "special_tokens_map.json"))
        _add_tokens(rust, config, special, config_file)
        limit = config.get("model_max_length")
        if model_max_length is None and isinstance(limit, int | float) and 0 < limit < 1e12:
            model_max_length = int(limit)  # transformers writes 1e30 for "none"
        return cls(
            rust,
            special_tokens=special,
            chat_templates=_chat_templates(directory, config),
            model_max_length=model_max_length,
            config=config,
        )

    @property
    def chat_template(self) -> str | None:
        """The template called "default" (or the only one), as text; None when the model has none."""
        if len(self.chat_templates) == 1:
            return next(iter(self.chat_templates.values()))
        return self.chat_templates.get(_DEFAULT)

    @property
    def added_tokens(self) -> dict[int, str]:
        """Tokens that stand beside the vocabulary that was learnt, special or not, by id."""
        return dict(self._added)

    @functools.cached_property
    def frame(self) -> Frame:
        """What encoding with special tokens puts around texts, as an encoded letter shows it."""
        one = self._rust.encode("a")
        two = self._rust.encode("a", "a")
        owners = two.sequence_ids
        first, second = owners.index(0), owners.index(1)
        end = len(owners) - owners[::-1].index(0)
        last = len(owners) - owners[::-1].index(1)
        own = one.sequence_ids
        alone, behind = own.index(0), len(own) - own[::-1].index(0)
        return Frame(
            (tuple(one.ids[:alone]), tuple(one.ids[behind:])),
            (tuple(two.ids[:first]), tuple(two.ids[end:second]), tuple(two.ids[last:])),
            has_types=two.type_ids[second] == 1,
            typed=sum(two.type_ids[end:second]),
        )

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding removes the space that encoding put before the first word."""
        return self._drops_space

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequest if it is no valid Unicode (a lone surrogate)."""
        try:
            return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise _not_unicode(text, error) from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; parallel when TOKENIZERS_PARALLELISM says so."""
        try:
            encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):
            return [self.encode(text, add_special_tokens) for text in texts]  # names the one at fault
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD, ids without a token become nothing.

        Spaces are left as they are: `clean_up_tokenization_spaces` is not applied, as in vLLM.
        Raises InvalidRequest for an id that is negative or has more than 32 bits.
        """
        try:
            return str(self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except (OverflowError, TypeError) as error:
            raise InvalidRequest(
                f"token ids must be integers from 0 to {self.vocab_size - 1}.", param="tokens"
            ) from error

    def token(self, id: int) -> str:
        """The piece as the vocabulary has it (`Ġhello`, `▁hello`, `<0x0A>`); "" for an id without one."""
        return (self._rust.id_to_token(id) or "") if 0 <= id < self.vocab_size else ""

    def token_id(self, token: str) -> int | None:
        """The id of a piece, or None."""
        id: int | None = self._rust.token_to_id(token)
        return id

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to the text; of some tokens not whole characters. b"" for no token."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._to_bytes(id)
        return known

    def token_text(self, id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is no whole character."""
        known = self._texts.get(id)
        if known is None:
            known = self._texts[id] = self.token_bytes(id).decode("utf-8", errors="replace")
        return known

    def is_byte(self, id: int) -> bool:
        """Whether a SentencePiece token is one byte of a character, like `<0x0A>`."""
        return id in self._byte_ids

    def _to_bytes(self, id: int) -> bytes:
        piece = self.token(id)
        if self.pieces is Pieces.BYTE_LEVEL:
            try:
                return bytes(_BYTE_OF[character] for character in piece)
            except KeyError:  # an added token with characters of its own
                return piece.encode()
        if self.pieces is Pieces.SENTENCEPIECE:
            byte = _FALLBACK.get(piece)
            return bytes([byte]) if byte is not None else piece.replace(_SPACE, " ").encode()
        return self.decode([id], skip_special_tokens=False).encode() if piece else b""

    def to_json(self) -> str:
        """tokenizer.json, with what other files have added to it."""
        text: str = self._rust.to_str()
        return text

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return self.token_id(token) if isinstance(token, str) else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


def _classify(rust: RustTokenizer) -> tuple[Pieces, bool]:
    """(kind, whether the first space is dropped), from the decoder; anything unusual is OTHER."""
    decoder = rust.decoder
    if decoder is None:
        return Pieces.OTHER, False
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces.BYTE_LEVEL, False
    # The two shapes in which the converters of transformers write SentencePiece's decoder.
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == {
        "type": "Replace",
        "pattern": {"String": _SPACE},
        "content": " ",
    }:
        if kinds[3:] == []:
            return Pieces.SENTENCEPIECE, False
        if kinds[3:] == ["Strip"] and steps[3] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return Pieces.SENTENCEPIECE, True
    return Pieces.OTHER, False


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Named special tokens; the first source that has a name wins."""
    found: dict[str, str | list[str]] = {}
    for source in sources:
        for name in _NAMED:
            text = _content(source.get(name))
            if text is not None:
                found.setdefault(name, text)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = source.get(key)
            if isinstance(extra, list) and extra:
                texts = [text for text in map(_content, extra) if text is not None]
                found.setdefault("additional_special_tokens", texts)
            elif isinstance(extra, dict):  # named ones of multimodal models
                for name, value in extra.items():
                    text = _content(value)
                    if text is not None:
                        found.setdefault(name, text)
    return found


def _content(token: object) -> str | None:
    """A token's text, given as a string or as a serialised AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_tokens(
    rust: RustTokenizer, config: Mapping[str, Any], special: Mapping[str, Any], file: Path
) -> None:
    """Register tokens that only the configuration lists, and mark the named ones as special."""
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        for key in listed:
            if not (key.isascii() and key.isdigit() and len(key) < 11):
                raise ModelLoadError(
                    f"{shown(file)}: added_tokens_decoder has the key {shown(key)}, which is no token id."
                )
        for key in sorted(listed, key=int):
            entry = listed[key]
            text = _content(entry)
            if isinstance(entry, dict) and text and rust.token_to_id(text) is None:
                rust.add_tokens(
                    [
                        AddedToken(
                            text,
                            single_word=bool(entry.get("single_word", False)),
                            lstrip=bool(entry.get("lstrip", False)),
                            rstrip=bool(entry.get("rstrip", False)),
                            normalized=bool(entry.get("normalized", False)),
                            special=bool(entry.get("special", False)),
                        )
                    ]
                )
    marked = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    for name in _NAMED:
        text = special.get(name)
        if isinstance(text, str) and text not in marked and rust.token_to_id(text) is not None:
            rust.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; files of their own win over the configuration, as in transformers."""
    found = _named_templates(config.get("chat_template"))
    found |= _named_templates(_read_json(directory / "chat_template.json").get("chat_template"))
    file = directory / "chat_template.jinja"
    if exists(file):
        found[_DEFAULT] = read_text(file, TEMPLATE_BYTES)
    more = directory / "additional_chat_templates"
    if os.path.isdir(more):
        for file in sorted(more.glob("*.jinja")):
            found[file.stem] = read_text(file, TEMPLATE_BYTES, root=directory)
    return found


def _named_templates(value: object) -> dict[str, str]:
    """A template, or a list of {name, template}."""
    if isinstance(value, str):
        return {_DEFAULT: value}
    if isinstance(value, list):
        return {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, dict)
            and isinstance(entry.get("template"), str)
            and isinstance(entry.get("name"), str)
        }
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; {} when there is no such file."""
    return read_json(file) if exists(file) else {}


def _missing_advice(directory: Path) -> str:
    convertible = [
        name for name in ("tokenizer.model", "vocab.json", "tekken.json") if os.path.isfile(directory / name)
    ]
    if convertible:
        return (
            f"It has {convertible[0]}: make the fast format once with transformers, "
            f"`AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})`."
        )
    return "Download it from the model's repository, or point to the right directory."


def _not_unicode(text: object, error: Exception) -> InvalidRequest:
    if not isinstance(text, str):
        return InvalidRequest(f"text to encode must be a string, got {type(text).__name__}.", param="prompt")
    return InvalidRequest(f"the text is no valid Unicode: {error}.")
