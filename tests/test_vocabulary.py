"""Tokenizers rebuilt from lists must give the ids of the tokenizers that the lists came from."""

from __future__ import annotations

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Library

from llama.checkpoints import tokenizer_file, vocabulary
from llama.checkpoints.gguf_container import Container
from llama.checkpoints.model_proto import CONTROL, NORMAL, USER_DEFINED
from llama.errors import LlamaError
from llama.format import TokenizerKind

PLACE = Path("vocab.gguf")

TORTURE = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n \t ", "Hello", " Hello", "Hello ",
    "  Hello   world  ", "a\tb\nc", "I'll, you'RE, they'd; it's 'S", "1234567890 12 3 ٣٤٥ ½ Ⅷ",
    "3.14159,2.71", "foo_bar->baz(); // {[<>]}", "x" * 300, "ab" * 200, "....!!!???",
    "\x00\x01\x7f",
    "été naïve e\u0301", "Ελληνικά кириллица", "עברית ‏العربية", "中文字符测试", "日本語テスト",
    "한국어", "👨‍👩‍👧‍👦 👍🏽 🇫🇷", "\ufeffbom", "\u200b\u200d\u2028\u3000\u00a0x",
    "𝔘𝔫𝔦 𐍈 \U0010ffff",
    "<s>", "</s> <unk>", "<0x41>", "▁▁a▁", "<|begin_of_text|>", "<|im_start|>user\n",
    "\ue000\uffff",
]  # fmt: skip


def corpus(n: int, seed: int = 0) -> list[str]:
    """TORTURE and N random texts out of every plane and kind of character."""
    draw = random.Random(seed)
    pools = ["abcdefghij ", " \t\n\r", "0123456789", "'sStTmMlLdD ve re", ".,;:!?-_()[]{}<>|/\\"]
    pools += [
        "".join(chr(draw.randrange(low, high)) for _ in range(40))
        for low, high in [
            (0, 0x80), (0x80, 0x250), (0x250, 0x800), (0x800, 0x3000), (0x3000, 0xD800),
            (0xE000, 0x10000), (0x10000, 0x20000), (0x1F300, 0x1FAFF), (0xE0000, 0x110000),
        ]
    ]  # fmt: skip
    texts = []
    for _ in range(n):
        pool = "".join(draw.sample(pools, draw.randrange(1, 4)))
        texts.append("".join(draw.choice(pool) for _ in range(draw.randrange(1, 40))))
    return TORTURE + texts


def json_ids(data: bytes) -> Any:
    library = Library.from_str(data.decode("utf-8"))
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


# ---- GGUF ----


@pytest.mark.parametrize("name", ["spm", "bpe"])
def test_llama_cpps_own_answers(data: Path, name: str) -> None:
    stem = data / f"vocab/ggml-vocab-llama-{name}.gguf"
    found = vocabulary.from_gguf(stem, Container(stem).metadata, [])
    if name == "spm":
        ids = SentencePieceProcessor(model_proto=found.data).encode
        assert (found.bos_id, found.eos_ids) == (1, (2,))
    else:
        ids = json_ids(found.data)
        assert (found.bos_id, found.eos_ids) == (128000, (128001, 128009))
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    answers = Path(f"{stem}.out").read_text().split("\n")
    assert len(texts) == len(answers) == 47
    for text, answer in zip(texts, answers, strict=True):
        assert ids(text) == [int(n) for n in answer.split()], repr(text)


def test_rebuilt_sentencepiece_is_llama2s(data: Path) -> None:
    path = data / "vocab/ggml-vocab-llama-spm.gguf"
    found = vocabulary.from_gguf(path, Container(path).metadata, [])
    ours = SentencePieceProcessor(model_proto=found.data)
    theirs = SentencePieceProcessor(model_file=str(data / "tokenizers/llama2_tokenizer.model"))
    assert ours.vocab_size() == theirs.vocab_size() and ours.bos_id() == 1 and ours.eos_id() == 2
    for text in corpus(2000):
        assert ours.encode(text) == theirs.encode(text), repr(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    for i in range(ours.vocab_size()):
        assert ours.id_to_piece(i) == theirs.id_to_piece(i)
        assert (ours.is_control(i), ours.is_byte(i)) == (theirs.is_control(i), theirs.is_byte(i))


def test_rebuilt_byte_level_is_llama3s(data: Path) -> None:
    path = data / "vocab/ggml-vocab-llama-bpe.gguf"
    found = vocabulary.from_gguf(path, Container(path).metadata, [])
    theirs = Library.from_file(str(data / "tokenizers/hf_llama3_tokenizer.json"))
    ours = Library.from_str(found.data.decode("utf-8"))
    assert ours.get_vocab() == theirs.get_vocab()
    for special in (True, False):
        ours.encode_special_tokens = theirs.encode_special_tokens = special
        for text in corpus(2000):
            a = ours.encode(text, add_special_tokens=False).ids
            assert a == theirs.encode(text, add_special_tokens=False).ids, repr(text)
            assert ours.decode(a) == theirs.decode(a)


def gguf_of(document: dict[str, Any], pre: str) -> dict[str, Any]:
    """The lists that llama.cpp's converter would take from a tokenizer.json."""
    pieces = dict(document["model"]["vocab"])
    types = dict.fromkeys(pieces.values(), NORMAL)
    for token in document["added_tokens"]:
        pieces[token["content"]] = token["id"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = document["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(pieces, key=lambda piece: pieces[piece]),
        "tokenizer.ggml.token_type": [types[i] for i in range(len(pieces))],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
    }


@pytest.mark.parametrize(
    "pre, file",
    [
        ("gpt-2", "tiny_bpe_bytelevel_tokenizer.json"),
        ("smollm", "tiny_bpe_digits_bytelevel_tokenizer.json"),
        ("llama-bpe", "tiny_bpe_split_cl100k_tokenizer.json"),
    ],
)
def test_pre_tokenizers_are_the_published_ones(data: Path, pre: str, file: str) -> None:
    source = (data / "tiny_hf" / file).read_text(encoding="utf-8")
    found = vocabulary.from_gguf(PLACE, gguf_of(json.loads(source), pre), [])
    ours, theirs = json_ids(found.data), json_ids(source.encode("utf-8"))
    for text in corpus(1500):
        assert ours(text) == theirs(text), repr(text)


def test_special_tokens_at_the_front_or_between(data: Path) -> None:
    """SmolLM2 has them first; a rebuilt tokenizer must leave every id where it was."""
    source = json.loads((data / "tiny_hf/tiny_bpe_bytelevel_tokenizer.json").read_text())
    lists = gguf_of(source, "gpt-2")
    pieces = lists["tokenizer.ggml.tokens"]
    pieces[:0] = ["<|im_start|>", "<|im_end|>"]
    pieces.insert(50, "<mid>")
    lists["tokenizer.ggml.token_type"] = [CONTROL, CONTROL] + [NORMAL] * (len(pieces) - 2)
    lists["tokenizer.ggml.token_type"][50] = USER_DEFINED
    lists |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    found = vocabulary.from_gguf(PLACE, lists, [])
    library = Library.from_str(found.data.decode("utf-8"))
    assert library.encode("<|im_start|>a<mid>b<|im_end|>").tokens[0] == "<|im_start|>"
    assert [library.token_to_id(piece) for piece in pieces] == list(range(len(pieces)))
    assert (found.bos_id, found.eos_ids) == (None, (1,))  # gpt2 puts no bos unless told to
    lists["tokenizer.ggml.add_bos_token"] = True
    assert vocabulary.from_gguf(PLACE, lists, []).bos_id == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre": "gpt-99"}, "tokenizer.ggml.pre 'gpt-99' is not known"),
        ({"tokens": None}, "tokenizer.ggml.tokens: expected a list"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "stands twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: expected"),
        ({"merges": None}, "tokenizer.ggml.merges: expected a list"),
        ({"merges": ["a b c"]}, "expected pairs"),
        ({"merges": ["qqq zzz"]}, "makes no tokenizer"),
        ({"bos_token_id": 10**6}, "bos token id 1000000 is not in the vocabulary"),
        ({"model": "t5"}, "expected llama or gpt2, found 't5'"),
    ],
)
def test_bad_lists_are_one_line(data: Path, changes: dict[str, Any], message: str) -> None:
    source = json.loads((data / "tiny_hf/tiny_bpe_bytelevel_tokenizer.json").read_text())
    lists = gguf_of(source, "gpt-2") | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(LlamaError, match=message) as caught:
        vocabulary.from_gguf(PLACE, lists, [])
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_guessed_is_said(data: Path) -> None:
    notes: list[str] = []
    assert vocabulary.from_gguf(PLACE, {}, notes).kind == TokenizerKind.NONE
    few = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    assert vocabulary.from_gguf(PLACE, few, notes).kind == TokenizerKind.NONE
    source = json.loads((data / "tiny_hf/tiny_bpe_bytelevel_tokenizer.json").read_text())
    vocabulary.from_gguf(PLACE, gguf_of(source, "default"), notes)
    assert [note.split(" ")[0] for note in notes] == ["no", "tokenizer", "pre-tokenizer"]


def test_hostile_sentencepiece_lists(data: Path) -> None:
    for pieces, types in [
        (["a", "a"], [1, 1]),
        (["", "b"], [1, 1]),
        (["<0xZZ>"], [6]),
        (["a"], [9]),
    ]:
        lists = {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": [0.0] * len(pieces),
        }  # fmt: skip
        try:
            vocabulary.from_gguf(PLACE, lists, [])
        except LlamaError as error:
            assert "makes no tokenizer" in str(error)


# ---- files of their own ----


def llama2c_file(model: SentencePieceProcessor) -> bytes:
    """A tokenizer.bin as llama2.c writes it."""
    out = bytearray(struct.pack("<I", 27))
    for i in range(model.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, model.id_to_piece(i)).replace("▁", " ")
        raw = piece.encode("utf-8")
        out += struct.pack("<fi", model.get_score(i), len(raw)) + raw
    return bytes(out)


def test_llama2cs_tokenizer_bin(data: Path, tmp_path: Path) -> None:
    """Written here as llama2.c writes it, from Llama 2's model; rebuilt to the same ids."""
    theirs = SentencePieceProcessor(model_file=str(data / "tokenizers/llama2_tokenizer.model"))
    out = llama2c_file(theirs)
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(out)
    found = tokenizer_file.read(path)
    assert (found.bos_id, found.eos_ids, found.vocab_size) == (1, (2,), 32000)
    ours = SentencePieceProcessor(model_proto=found.data)
    for text in corpus(2000):
        assert ours.encode(text) == theirs.encode(text), repr(text)
    for size in [*range(0, 3000, 7), len(out) - 1]:
        path.write_bytes(out[:size])
        try:
            tokenizer_file.read(path)
        except LlamaError as error:
            assert "\n" not in str(error)


def test_tok512(data: Path) -> None:
    known = json.loads((data / "reference/stories260K_greedy.json").read_text())
    found = tokenizer_file.read(data / "tokenizers/tok512.bin")
    library = SentencePieceProcessor(model_proto=found.data)
    assert library.encode(known["text"])[:64] == known["first_64_ids"]


def test_files_are_told_apart_by_content(data: Path, tmp_path: Path) -> None:
    for name, kind, size in [
        ("llama2_tokenizer.model", TokenizerKind.SENTENCEPIECE, 32000),
        ("llama3_tokenizer.model", TokenizerKind.TIKTOKEN, 128256),
        ("hf_llama3_tokenizer.json", TokenizerKind.JSON, 128256),
        ("hf_llama2_tokenizer.json", TokenizerKind.JSON, 32000),
        ("tok512.bin", TokenizerKind.SENTENCEPIECE, 512),
    ]:
        found = tokenizer_file.read(data / "tokenizers" / name)
        assert (found.kind, found.vocab_size) == (kind, size)
    for name, content in [
        ("none.model", b"not a tokenizer at all"), ("empty.model", b""), ("a.bin", bytes(40)),
        ("a.json", b"{}"), ("b.json", b"{"), ("c.model", b"YQ== 0\nYg== 2\n"),
        ("d.model", b"YQ== 0\n!!!! 1\n"), ("e.model", b"\x0a\x02"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LlamaError, match=name) as caught:
            tokenizer_file.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(LlamaError, match="cannot read"):
        tokenizer_file.read(tmp_path / "nothing")


def test_llama3_special_tokens(data: Path) -> None:
    """Stored as they are; their names and ids are the published ones, the ids tiktoken's."""
    found = tokenizer_file.read(data / "tokenizers/llama3_tokenizer.model")
    published = json.loads((data / "tokenizers/hf_llama3_tokenizer.json").read_text())
    for token in published["added_tokens"]:
        if "reserved" not in token["content"]:
            assert found.special[token["content"]] == token["id"]
    assert sorted(found.special.values()) == list(range(128000, 128256))
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in found.data.splitlines() if line)
    }
    library = tiktoken.Encoding(
        "llama3", pat_str=vocabulary.LLAMA3_WORDS, mergeable_ranks=ranks,
        special_tokens=found.special,
    )  # fmt: skip
    theirs = json_ids((data / "tokenizers/hf_llama3_tokenizer.json").read_bytes())
    for text in corpus(300):
        assert library.encode(text, disallowed_special=()) == theirs(text), repr(text)
