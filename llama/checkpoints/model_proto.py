"""SentencePiece's ModelProto: written from lists, and changed in place where a source says more.

A small protobuf, encoded by hand here. Later fields of a message win over earlier ones and
repeated ones go on, so a piece's type is changed, and pieces are added, by writing at an end.

  ModelProto: 1 piece (repeated), 2 trainer_spec, 3 normalizer_spec
  piece: 1 text, 2 score (float32), 3 type
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from llama.errors import LlamaError

# The types of piece; ggml's token types have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def _varint(n: int) -> bytes:
    out = bytearray()
    n &= 2**64 - 1
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out + bytes([n]))


def _number(field: int, n: int) -> bytes:
    return _varint(field << 3) + _varint(n)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def sentencepiece_model(
    path: Path,
    pieces: Sequence[tuple[str, float, int]],
    *,
    dummy_prefix: bool = True,
    squeeze: bool = False,
) -> bytes:
    """A BPE ModelProto of (piece, score, type); checked by loading it.

    DUMMY_PREFIX puts a space before a text; SQUEEZE joins runs of spaces (Llama does not).
    """
    out = bytearray()
    ids = {UNKNOWN: -1}
    for i, (piece, score, kind) in enumerate(pieces):
        if kind == UNKNOWN and ids[UNKNOWN] < 0:
            ids[UNKNOWN] = i
        body = _bytes(1, piece.encode("utf-8")) + b"\x15" + struct.pack("<f", score)
        out += _bytes(1, body + (_number(3, kind) if kind != NORMAL else b""))
    names = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == CONTROL}
    byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, byte_fallback)
    unknown = pieces[ids[UNKNOWN]][0] if ids[UNKNOWN] >= 0 else "<unk>"
    trainer += _number(40, ids[UNKNOWN])
    trainer += _number(41, names.get("<s>", -1)) + _number(42, names.get("</s>", -1))
    trainer += _number(43, -1) + _bytes(45, unknown.encode("utf-8"))
    normalizer = _bytes(1, b"identity") + _bytes(2, b"")
    normalizer += _number(3, dummy_prefix) + _number(4, squeeze) + _number(5, True)
    data = bytes(out + _bytes(2, trainer) + _bytes(3, normalizer))
    _try_sentencepiece(path, data, len(pieces))
    return data


def _try_sentencepiece(path: Path, data: bytes, n: int) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        library = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise LlamaError(f"{path}: the vocabulary makes no tokenizer: {error}") from None
    if library.vocab_size() != n:
        raise LlamaError(f"{path}: expected a tokenizer of {n} pieces, got {library.vocab_size()}")


def change(
    path: Path, data: bytes, kinds: Mapping[int, int],
    added: Sequence[tuple[str, int]] = (), names: Mapping[int, str] = MappingProxyType({}),
) -> bytes:  # fmt: skip
    """A ModelProto with other types (KINDS) and other texts (NAMES) for some pieces, by id, and
    with ADDED pieces (text, type) behind the last; checked by loading it. PATH is for messages."""
    out = bytearray()
    n = 0
    for tag, start, body, end in _fields(path, data):
        if tag != (1 << 3 | 2):
            out += data[start:end]
            continue
        piece = data[body:end]
        piece += _number(3, kinds[n]) if n in kinds else b""
        piece += _bytes(1, names[n].encode("utf-8")) if n in names else b""
        out += _bytes(1, piece)
        n += 1
    for text, kind in added:
        score = b"\x15" + struct.pack("<f", 0.0)
        out += _bytes(1, _bytes(1, text.encode("utf-8")) + score + _number(3, kind))
    changed = bytes(out)
    _try_sentencepiece(path, changed, n + len(added))
    return changed


def _fields(path: Path, data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tag, start, where its value starts, end) of each field of a message."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _read_varint(path, data, at)
        wire = tag & 7
        if wire == 0:
            body, at = at, _read_varint(path, data, at)[1]
        elif wire == 2:
            size, body = _read_varint(path, data, at)
            at = body + size
        elif wire in (1, 5):
            body, at = at, at + (8 if wire == 1 else 4)
        else:
            raise LlamaError(f"{path}: expected a SentencePiece model, found wire type {wire}")
        if at > len(data):
            raise LlamaError(f"{path}: expected a SentencePiece model, found one cut short")
        yield tag, start, body, at


def _read_varint(path: Path, data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise LlamaError(f"{path}: expected a SentencePiece model, found one cut short")
