"""Tokenizers rebuilt from what a checkpoint holds in their place.

GGUF and llama2.c keep a vocabulary as bare lists. From those lists is made the file that the real
library reads: a SentencePiece ModelProto (model_proto.py) or a Hugging Face tokenizer.json (here).
The ids that come out must be the source's own, on any text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoints.checkpoint import Tokenizer
from llama.checkpoints.model_proto import CONTROL, NORMAL, USER_DEFINED, sentencepiece_model
from llama.errors import LlamaError, refused
from llama.format import TokenizerKind

# How byte-level BPE cuts text into words before it merges: the regular expressions of the
# published tokenizer.json files.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS_GPT2 = [{"type": "Digits", "individual_digits": True}, GPT2]


def _split(words: str) -> list[dict[str, Any]]:
    pattern = {"Regex": words}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        BYTES,
    ]


@dataclass(frozen=True)
class Words:
    """One pre-tokenizer: its steps, and what else its family does differently."""

    steps: list[dict[str, Any]]
    whole_words: bool = False  # a word that is in the vocabulary needs no merges
    nfc: bool = False
    bos: bool = False  # a text starts with bos unless the file says otherwise


LLAMA3 = Words(_split(LLAMA3_WORDS), whole_words=True, bos=True)
WORDS = {
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smollm": Words(DIGITS_GPT2),
    "starcoder": Words(DIGITS_GPT2),
    "gpt-2": Words([GPT2]),
    "qwen2": Words(_split(QWEN2_WORDS), nfc=True),
}
# Tokens that end a turn: a model whose vocabulary has them stops there too.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def from_gguf(path: Path, metadata: dict[str, Any], notes: list[str]) -> Tokenizer:
    """The tokenizer of a GGUF file; none, with a note, where its lists do not suffice."""
    model = metadata.get("tokenizer.ggml.model")
    pieces = metadata.get("tokenizer.ggml.tokens")
    if model is None or model == "no_vocab":
        notes.append("no tokenizer in the file: the model will take token ids only")
        return Tokenizer()
    if not _all(pieces, str) or not pieces:
        raise LlamaError(f"{path}: tokenizer.ggml.tokens: expected a list of strings")
    types = metadata.get("tokenizer.ggml.token_type")
    scores = metadata.get("tokenizer.ggml.scores")
    for key, values, of in (("token_type", types, int), ("scores", scores, float)):
        if values is not None and (not _all(values, of) or len(values) != len(pieces)):
            raise LlamaError(f"{path}: tokenizer.ggml.{key}: expected {len(pieces)} numbers")
    if model == "llama":
        if scores is None or types is None:
            notes.append("tokenizer without scores or types: the model will take token ids only")
            return Tokenizer()
        data = sentencepiece_model(
            path,
            list(zip(pieces, scores, types, strict=True)),
            dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is not False,
            squeeze=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False) is True,
        )
        return _with_ids(path, TokenizerKind.SENTENCEPIECE, data, pieces, types, metadata, True)
    if model != "gpt2":
        raise LlamaError(
            f"{path}: tokenizer.ggml.model: expected llama or gpt2, found {str(model)[:60]!r}"
        )
    words = _words(path, metadata, pieces, notes)
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None or not _all(merges, str):
        raise LlamaError(f"{path}: tokenizer.ggml.merges: expected a list of strings")
    types = types if types is not None else [NORMAL] * len(pieces)
    data = byte_level_json(path, pieces, types, merges, words)
    return _with_ids(path, TokenizerKind.JSON, data, pieces, types, metadata, words.bos)


def _all(values: Any, of: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, of) for value in values)


def _words(path: Path, metadata: dict[str, Any], pieces: list[str], notes: list[str]) -> Words:
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, "default"):
        name = "llama-bpe" if "<|begin_of_text|>" in pieces else "gpt-2"
        notes.append(f"pre-tokenizer not named in the file, inferred: {name}")
    if name not in WORDS:
        raise LlamaError(
            f"{path}: tokenizer.ggml.pre {str(name)[:60]!r} is not known; known are "
            f"{', '.join(sorted(WORDS))}"
        )
    return WORDS[name]


def _with_ids(
    path: Path,
    kind: TokenizerKind,
    data: bytes,
    pieces: list[str],
    types: Sequence[int],
    metadata: dict[str, Any],
    bos_by_default: bool,
) -> Tokenizer:
    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value == 2**32 - 1:
            return None
        if not isinstance(value, int) or not 0 <= value < len(pieces):
            raise LlamaError(f"{path}: {name} token id {value} is not in the vocabulary")
        return value

    bos = token_id("bos")
    if not metadata.get("tokenizer.ggml.add_bos_token", bos_by_default):
        bos = None
    ends = [token_id(name) for name in ("eos", "eot", "eom")]
    ends += [i for i, piece in enumerate(pieces) if types[i] == CONTROL and piece in TURN_ENDS]
    eos = tuple(dict.fromkeys(token for token in ends if token is not None))
    named = {
        name: token_id(f"fim_{key}") if token_id(f"fim_{key}") is not None else token_id(name)
        for name, key in (("prefix", "pre"), ("suffix", "suf"), ("middle", "mid"))
    }  # fmt: skip
    infill = {name: token for name, token in named.items() if token is not None}
    return Tokenizer(kind, data, len(pieces), bos, eos[:8], infill=infill)


def byte_level_json(
    path: Path, pieces: list[str], types: Sequence[int], merges: list[str], words: Words
) -> bytes:
    """A tokenizer.json for byte-level BPE; checked by loading it."""
    added = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    # Added tokens at the vocabulary's end get their ids by counting on; elsewhere they must be
    # words of the model as well, to hold their places.
    tail = len(pieces)
    for i in reversed(added):
        if i != tail - 1:
            break
        tail = i
    vocab = {piece: i for i, piece in enumerate(pieces[:tail])}
    if len(set(pieces)) != len(pieces):
        raise LlamaError(f"{path}: tokenizer.ggml.tokens: a token stands twice")
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise LlamaError(f"{path}: tokenizer.ggml.merges: expected pairs of tokens")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], **plain, "special": types[i] == CONTROL} for i in added
        ],
        "normalizer": {"type": "NFC"} if words.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words.steps},
        "post_processor": None,
        "decoder": {**GPT2, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words.whole_words,
            "vocab": vocab,
            "merges": pairs,
        },
    }
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    _try_json(path, data, pieces)
    return data


def _try_json(path: Path, data: bytes, pieces: list[str]) -> None:
    from tokenizers import Tokenizer as Library

    with refused(f"{path}: the vocabulary makes no tokenizer"):
        library = Library.from_str(data.decode("utf-8"))
    found = library.get_vocab(with_added_tokens=True)
    if found != {piece: i for i, piece in enumerate(pieces)}:
        raise LlamaError(f"{path}: the vocabulary makes a tokenizer with other ids")
