"""A tokenizer that lies in a file of its own, told apart by its content and not by its name.

Four kinds occur beside checkpoints: SentencePiece's model (Llama 1 and 2), Meta's tiktoken ranks
(Llama 3: lines of base64 and a number), Hugging Face's tokenizer.json, and llama2.c's
tokenizer.bin. The first three are stored as they are, but for what added_tokens.py and infill.py
change; the last is rebuilt as SentencePiece.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from pathlib import Path

from llama.checkpoints.checkpoint import Options, Tokenizer
from llama.checkpoints.model_proto import BYTE, CONTROL, NORMAL, UNKNOWN, sentencepiece_model
from llama.errors import LlamaError, refused
from llama.format import TokenizerKind

# Meta's 256 special tokens stand after the ranks, in this order, then the reserved ones. The
# names are 3.1's; Llama 3 called 4, 8 and 10 reserved and never used them.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
N_SPECIAL = 256
LARGEST = 256 << 20


def beside(
    directory: Path, names: tuple[str, ...], options: Options, notes: list[str]
) -> Tokenizer:
    """The tokenizer that OPTIONS names, or the first of NAMES in DIRECTORY or the one above it.

    None at all is a note, not an error.
    """
    if options.tokenizer is not None:
        return read(options.tokenizer)
    for place in (directory, directory.resolve().parent):
        for name in names:
            if (place / name).is_file():
                return read(place / name)
    notes.append(f"no {' or '.join(names)} beside it: the model will take token ids only")
    return Tokenizer()


def read(path: Path) -> Tokenizer:
    """Recognises and checks a tokenizer's file; LlamaError where it is none of the four."""
    try:
        if path.stat().st_size > LARGEST:
            raise LlamaError(f"{path}: too large for a tokenizer, at most {LARGEST} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise LlamaError(f"{path}: cannot read: {error.strerror}") from None
    if data[:64].lstrip().startswith(b"{"):
        return _json(path, data)
    first = data[:512].split(b"\n")[0].split()
    if len(first) == 2 and first[1].isdigit():
        return _tiktoken(path, data)
    if path.suffix == ".bin":
        return _llama2c(path, data)
    return _sentencepiece(path, data)


def _sentencepiece(path: Path, data: bytes) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        library = SentencePieceProcessor(model_proto=data)
        size, bos, eos = library.vocab_size(), library.bos_id(), library.eos_id()
    except RuntimeError:
        raise LlamaError(
            f"{path}: expected a SentencePiece model, tiktoken ranks, a tokenizer.json or "
            "llama2.c's tokenizer.bin"
        ) from None
    if size == 0:
        raise LlamaError(f"{path}: expected a SentencePiece model, found one without pieces")
    ends = (eos,) if eos >= 0 else ()
    return Tokenizer(TokenizerKind.SENTENCEPIECE, data, size, bos if bos >= 0 else None, ends)


def _json(path: Path, data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer as Library

    with refused(f"{path}: expected a tokenizer.json"):
        json.loads(data)  # for its better messages
        library = Library.from_str(data.decode("utf-8"))
    ids = library.get_vocab(with_added_tokens=True).values()
    return Tokenizer(TokenizerKind.JSON, data, max(ids, default=-1) + 1)


def _tiktoken(path: Path, data: bytes) -> Tokenizer:
    ranks = []
    lacking = {bytes([byte]) for byte in range(256)}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split()
        try:
            token, rank = fields
            ranks.append(int(rank))
            lacking.discard(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error):
            raise LlamaError(f"{path}: line {number}: expected base64 and a rank") from None
        if ranks[-1] != len(ranks) - 1:
            raise LlamaError(
                f"{path}: line {number}: expected rank {len(ranks) - 1}, found {ranks[-1]}"
            )
    if lacking:
        raise LlamaError(f"{path}: its ranks lack {len(lacking)} of the 256 bytes")
    names = list(LLAMA3_SPECIAL)
    names += [f"<|reserved_special_token_{n + 2}|>" for n in range(N_SPECIAL - len(names))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    bos = special["<|begin_of_text|>"]
    ends = tuple(special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
    size = len(ranks) + N_SPECIAL
    return Tokenizer(TokenizerKind.TIKTOKEN, data, size, bos, ends, special)


def _llama2c(path: Path, data: bytes) -> Tokenizer:
    """u32 longest | f32 score, i32 length, bytes: a token each, spaces written as spaces."""
    pieces: list[tuple[str, float, int]] = []
    at = 4
    while at < len(data):
        i = len(pieces)
        if at + 8 > len(data):
            raise LlamaError(f"{path}: truncated in token {i}")
        score, length = struct.unpack_from("<fi", data, at)
        raw = data[at + 8 : at + 8 + length] if length >= 0 else b""
        if length < 0 or len(raw) != length:
            raise LlamaError(f"{path}: truncated: token {i} says it has {length} bytes")
        at += 8 + length
        try:
            piece = raw.decode("utf-8").replace(" ", "\u2581")
        except UnicodeDecodeError:
            raise LlamaError(f"{path}: token {i} is not UTF-8") from None
        if i in (1, 2):
            pieces.append((piece.strip(), score, CONTROL))  # written as "\n<s>\n"
        else:
            byte = 3 <= i < 259 and piece == f"<0x{i - 3:02X}>"
            pieces.append((piece, score, UNKNOWN if i == 0 else BYTE if byte else NORMAL))
    if len(pieces) < 3 or [pieces[i][0] for i in (1, 2)] != ["<s>", "</s>"]:
        raise LlamaError(f"{path}: expected llama2.c's tokenizer.bin: tokens 1, 2 <s> and </s>")
    model = sentencepiece_model(path, pieces)
    return Tokenizer(TokenizerKind.SENTENCEPIECE, model, len(pieces), 1, (2,))
