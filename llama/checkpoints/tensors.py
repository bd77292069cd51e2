"""Tensors that hand out their rows a chunk at a time.

Every source speaks in these terms, so that a conversion never holds more than a chunk: rows
[first, last) are read from the file when they are asked for, and no earlier. Whatever a file says
about itself is checked against its size before it is used.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from llama.errors import LlamaError
from llama.quant import STORED, Array, Kind
from llama.reading import File

CHUNK_BYTES = 1 << 24  # of which a checksum is computed at once


class Source(Protocol):
    """Where the bytes of a tensor stand: a File, or a Member of one."""

    def read(self, offset: int, size: int, what: str) -> bytes:
        """SIZE bytes from OFFSET; WHAT names them if the file is too short."""


def array(file: Source, offset: int, shape: tuple[int, ...], dtype: str, what: str) -> Array:
    """The numbers that stand at OFFSET of FILE."""
    kind, count = np.dtype(dtype), math.prod(shape)
    raw = file.read(offset, count * kind.itemsize, what)
    return np.frombuffer(raw, kind, count).reshape(shape)


class Member:
    """A part of a file that has a checksum, compared before its first number is handed out; a
    CRC32 of 0 is none, which torch writes where it is told not to compute one."""

    def __init__(self, file: File, offset: int, size: int, crc32: int, name: str) -> None:
        self.file, self._unread = file, crc32 != 0
        self._offset, self._end, self._crc32, self._name = offset, offset + size, crc32, name

    def read(self, offset: int, size: int, what: str) -> bytes:
        self._verify()
        return self.file.read(offset, size, what)

    def _verify(self) -> None:
        if not self._unread:
            return
        found = 0
        for at in range(self._offset, self._end, CHUNK_BYTES):
            size = min(CHUNK_BYTES, self._end - at)
            found = zlib.crc32(self.file.read(at, size, self._name), found)
        if found != self._crc32:
            raise LlamaError(
                f"{self.file.path}: {self._name} is damaged: checksum {found:08x}, recorded "
                f"{self._crc32:08x}"
            )
        self._unread = False


def check_apart(path: Path, places: list[tuple[int, int, str]]) -> None:
    """Raises LlamaError where two tensors, each (begin, end, name), share bytes: what is read of
    a file is then no more than the file."""
    end, before = 0, ""
    for begin, last, name in sorted(place for place in places if place[0] < place[1]):
        if begin < end:
            raise LlamaError(f"{path}: {before[:80]} and {name[:80]} overlap")
        end, before = last, name


class Tensor(Protocol):
    """What a source offers for each tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(length,) of a vector or (rows, columns) of a matrix."""

    @property
    def dtype(self) -> str:
        """How the source stores it: "f32", "bf16", "Q4_K"."""

    def rows(self, first: int, last: int) -> Array:
        """Rows [first, last) as float32, float16, or uint16 for bf16."""


@dataclass(frozen=True)
class Plain:
    """A float tensor that lies in one piece, row after row."""

    file: Source
    offset: int
    kind: Kind
    shape: tuple[int, ...]
    name: str

    @property
    def dtype(self) -> str:
        return self.kind.label

    def rows(self, first: int, last: int) -> Array:
        stored = STORED[self.kind]
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * stored.itemsize
        shape = (last - first, *self.shape[1:])
        return array(self.file, self.offset + first * row, shape, stored.str, self.name)


@dataclass(frozen=True)
class RowShards:
    """Shards that continue each other downwards."""

    parts: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def rows(self, first: int, last: int) -> Array:
        pieces, start = [], 0
        for part in self.parts:
            end = start + part.shape[0]
            low, high = max(first, start), min(last, end)
            if low < high:
                pieces.append(part.rows(low - start, high - start))
            start = end
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


@dataclass(frozen=True)
class ColumnShards:
    """Shards that continue each other to the right."""

    parts: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def rows(self, first: int, last: int) -> Array:
        return np.concatenate([part.rows(first, last) for part in self.parts], axis=1)


@dataclass(frozen=True)
class Interleaved:
    """wq or wk of a Hugging Face model, its rows back in Meta's order.

    Hugging Face keeps the two halves of each rotary pair head_dim / 2 rows apart; Meta keeps
    them side by side. So row 2i of a head here is row i there, and 2i + 1 is i + head_dim / 2.
    """

    part: Tensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def dtype(self) -> str:
        return self.part.dtype

    def rows(self, first: int, last: int) -> Array:
        head = self.head_dim
        start, end = first // head * head, -(-last // head) * head
        split = self.part.rows(start, end)  # whole heads
        pairs = split.reshape(-1, 2, head // 2, *split.shape[1:])
        joined = np.swapaxes(pairs, 1, 2).reshape(split.shape)
        return joined[first - start : last - start]


@dataclass(frozen=True)
class Unreadable:
    """A tensor of a dtype that no weight has here: known, so that it can be named."""

    dtype: str
    shape: tuple[int, ...]
    name: str

    def rows(self, first: int, last: int) -> Array:
        raise LlamaError(f"{self.name}: expected float32, float16 or bfloat16, found {self.dtype}")
