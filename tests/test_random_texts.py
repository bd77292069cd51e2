"""Every vocabulary at hand on random texts: what comes out of a .bin against the source's own
library, or its procedure in other words. make tokenizers runs 100,000 texts for each."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
import struct
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import random_texts
import small_models
import tiktoken
from sentencepiece import SentencePieceProcessor
from test_tokenizer import meta_splits
from test_vocabulary import PLACE, gguf_of, llama2c_file
from tokenizers import Tokenizer as Library

from llama.checkpoints import tokenizer_file, vocabulary
from llama.checkpoints.checkpoint import Tokenizer as Found
from llama.checkpoints.gguf_container import Container
from llama.format import TokenizerKind
from llama.generate import Llama
from llama.tokenizer import BYTE_OF, StreamDecoder, Tokenizer

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str] | None
Source = tuple[Found, Encode, Decode]  # what the readers found; the library that is right
SPM = ["llama2", "llama2 GGUF", "llama2 weights GGUF", "llama2.c"]
TINY = ["spm", "spm_bpe", "spm_bytefallback"]
TINY_BPE = {"bytelevel": "gpt-2", "digits_bytelevel": "smollm", "split_cl100k": "llama-bpe"}
NAMES = [
    *SPM, "llama2 json", "llama3", "llama3 GGUF", "llama3 json", "tok512", "SmolLM2",
    *TINY, *TINY_BPE, *(f"{name} GGUF" for name in TINY_BPE),
]  # fmt: skip


def source(name: str, data: Path, folder: Path, request: pytest.FixtureRequest) -> Source:
    files = data / "tokenizers"
    if name in SPM:
        return llama2(name, data, folder)
    if name in ("llama2 json", "llama3 json"):
        file = files / f"hf_{name.split()[0]}_tokenizer.json"
        return tokenizer_file.read(file), *by_tokenizers(file.read_bytes())
    if name == "llama3":
        return tokenizer_file.read(files / "llama3_tokenizer.model"), *by_tiktoken(data)
    if name == "llama3 GGUF":
        return from_gguf(data / "vocab/ggml-vocab-llama-bpe.gguf"), *by_tiktoken(data)
    if name == "tok512":
        found = tokenizer_file.read(files / "tok512.bin")
        return found, by_run_c((files / "tok512.bin").read_bytes()), None
    if name == "SmolLM2":
        gguf: Path = request.getfixturevalue("gguf_file")
        return from_gguf(gguf), by_ranks(Container(gguf).metadata), None
    if name in TINY:
        file = data / f"tiny_hf/tiny_{name}.model"
        model = SentencePieceProcessor(model_file=str(file))
        return tokenizer_file.read(file), model.encode, model.decode
    kind = name.removesuffix(" GGUF")
    raw = (data / f"tiny_hf/tiny_bpe_{kind}_tokenizer.json").read_bytes()
    found = Found(TokenizerKind.JSON, raw)
    if kind != name:
        found = vocabulary.from_gguf(PLACE, gguf_of(json.loads(raw), TINY_BPE[kind]), [])
    return found, *by_tokenizers(raw)


def llama2(name: str, data: Path, folder: Path) -> Source:
    file = data / "tokenizers/llama2_tokenizer.model"
    model = SentencePieceProcessor(model_file=str(file))
    if name == "llama2.c":
        path = folder / "tokenizer.bin"
        path.write_bytes(llama2c_file(model))
        found = tokenizer_file.read(path)
    elif name == "llama2":
        found = tokenizer_file.read(file)
    else:
        weights = name == "llama2 weights GGUF"
        file = data / "weights/llama-2-tiny-random.gguf"
        found = from_gguf(file if weights else data / "vocab/ggml-vocab-llama-spm.gguf")
    return found, model.encode, model.decode


def from_gguf(path: Path) -> Found:
    return vocabulary.from_gguf(path, Container(path).metadata, [])


def by_tokenizers(raw: bytes) -> tuple[Encode, Decode]:
    library = Library.from_str(raw.decode())
    library.encode_special_tokens = True
    return (
        lambda text: list(library.encode(text, add_special_tokens=False).ids),
        lambda ids: str(library.decode(ids)),
    )


def by_tiktoken(data: Path) -> tuple[Encode, Decode]:
    """Meta's llama3/tokenizer.py."""
    described = json.loads((data / "tokenizers/hf_llama3_tokenizer.json").read_text())
    lines = (data / "tokenizers/llama3_tokenizer.model").read_bytes().splitlines()
    library = tiktoken.Encoding(
        "llama3", special_tokens={t["content"]: t["id"] for t in described["added_tokens"]},
        pat_str=described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
        mergeable_ranks={base64.b64decode(a): int(b) for a, b in (line.split() for line in lines)},
    )  # fmt: skip

    def encode(text: str) -> list[int]:
        return [i for part in meta_splits(text) for i in library.encode_ordinary(part)]

    return encode, lambda ids: library.decode([token for token in ids if token < 128_000])


def by_ranks(metadata: dict[str, Any]) -> Encode:
    """SmolLM2's by tiktoken: its ids rise as its merges do. A byte that has no token is left out,
    and what stands around it is merged as if it were not there, as in tokenizers."""
    pieces = metadata["tokenizer.ggml.tokens"]
    first = pieces.index(metadata["tokenizer.ggml.merges"][0].replace(" ", "", 1))
    ranks = {bytes(BYTE_OF[c] for c in piece): i for i, piece in enumerate(pieces)
             if i >= first or len(piece) == 1}  # fmt: skip
    missing = {bytes([b]): 1_000_000 + b for b in range(256) if bytes([b]) not in ranks}
    words = (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
    )
    library = tiktoken.Encoding(
        "smollm2", pat_str=words, mergeable_ranks=ranks | missing, special_tokens={}
    )
    lost = frozenset(missing)

    def encode(text: str) -> list[int]:
        if any(bytes([b]) in lost for b in text.encode()):
            return []
        parts = [""]
        for char in text:
            if unicodedata.category(char)[0] == "N":
                parts += [char, ""]
            else:
                parts[-1] += char
        return [i for part in parts for i in library.encode_ordinary(part)]

    return encode


def by_run_c(file: bytes) -> Encode:
    """llama2.c's run.c, encode(): a space before the text, bytes for what has no token, then the
    neighbours whose merger has the best score, the first of equals, again and again. It does not
    take a text's own "▁" for a space, as the SentencePiece model that the file is of would."""
    scores: list[float] = []
    ids: dict[bytes, int] = {}
    at = 4
    while at < len(file):
        score, length = struct.unpack_from("<fi", file, at)
        ids.setdefault(file[at + 8 : at + 8 + length], len(scores))
        scores.append(score)
        at += 8 + length

    def encode(text: str) -> list[int]:
        if "▁" in text:
            return []
        tokens: list[tuple[bytes, int]] = []
        for char in " " * (text != "") + text:
            raw = char.encode()
            parts = [(raw, ids[raw])] if raw in ids else [(b"", byte + 3) for byte in raw]
            tokens += parts
        while True:
            best = None
            for n, ((a, _), (b, _)) in enumerate(itertools.pairwise(tokens)):
                merged = ids.get(a + b) if a and b else None
                if merged is not None and (best is None or scores[merged] > best[0]):
                    best = (scores[merged], n, a + b, merged)
            if best is None:
                return [token for _, token in tokens]
            tokens[best[1] : best[1] + 2] = [best[2:]]

    return encode


@functools.cache
def opened(name: str, data: Path, request: pytest.FixtureRequest) -> tuple[Tokenizer, Source]:
    """What a program that opens a .bin with this vocabulary has."""
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp("bins")
    found, *library = source(name, data, folder, request)
    size = found.vocab_size or 1024
    shape = small_models.config(
        vocab_size=size, dim=2, hidden_dim=2, head_dim=2, n_heads=1, n_kv_heads=1, n_layers=1,
        bos_id=found.bos_id, eos_ids=found.eos_ids,
    )  # fmt: skip
    path = small_models.write_bin(
        folder / "a.bin", shape, tokenizer=(found.kind, found.data),
        meta={"tokenizer.special": json.dumps(found.special)},
    )  # fmt: skip
    with Llama(path) as llm:
        return llm.tokenizer, (found, *library)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, data: Path) -> tuple[Tokenizer, Source]:
    return opened(request.param, data, request)


def test_ids_are_the_librarys(case: tuple[Tokenizer, Source], pytestconfig: pytest.Config) -> None:
    ours, (_, encode, _) = case
    count = 0
    for text in random_texts.texts(pytestconfig.getoption("texts"), 11):
        expect = encode(text)
        assert ours.encode(text) == expect or not expect, repr(text)
        count += bool(expect)
    assert count > 0.7 * pytestconfig.getoption("texts")


def runs(ours: Tokenizer, n: int) -> Iterable[list[int]]:
    """Random ids: any, bytes in any order, control tokens in the middle."""
    rng = random.Random(12)
    single = [t for t in range(ours.size) if len(ours.token_bytes(t)) == 1] or [0]
    for _ in range(n):
        few = rng.random() < 0.5
        yield [
            rng.choice(single) if few and rng.random() < 0.8 else rng.randrange(ours.vocab_size)
            for _ in range(rng.randrange(1, 12))
        ]


def test_no_byte_is_lost_or_made(
    case: tuple[Tokenizer, Source], pytestconfig: pytest.Config
) -> None:
    """Of any ids whatever: text that comes token by token is the text of all, is the bytes of
    each, is what the library says."""
    ours, (_, _, decode) = case
    for ids in runs(ours, pytestconfig.getoption("texts") // 4):
        decoder = StreamDecoder(ours)
        pieces = [decoder.feed(token) for token in ids]
        pieces.append(decoder.finish())
        text = ours.decode(ids)
        assert "".join(pieces) == text, ids
        parts = [b""]
        for token in ids:
            if ours.is_control(token) and ours.kind == "sentencepiece":
                parts.append(b"")  # which no character goes across
            parts[-1] += ours.token_bytes(token)
        plain = "".join(part.decode("utf-8", ours.errors) for part in parts)
        assert plain.endswith(text) and not plain[: len(plain) - len(text)].strip(" "), ids
        # tokenizers writes U+FFFD for all of a run of byte tokens in which one is wrong
        if decode is not None and ("\ufffd" not in text or ours.kind != "json"):
            assert text == decode(ids), ids
