"""A file mapped into memory, and tensors that hand out their rows a chunk at a time.

Every source speaks in these terms, so that a conversion never holds more than a chunk: rows
[first, last) are looked up in the map, and `release` gives the pages back once they are written.
Whatever a file says about itself is checked against its size here, before it is touched.
"""

from __future__ import annotations

import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from llama.errors import LlamaError
from llama.quant import STORED, Array, Kind

CHUNK_BYTES = 1 << 24  # of which a checksum is computed at once


class Mapped:
    """A read-only map of a whole file; raises LlamaError where it cannot be one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise LlamaError(f"{path}: the file is empty")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise LlamaError(f"{path}: cannot read: {error.strerror}") from None

    def bytes(self, offset: int, size: int, what: str) -> bytes:
        """A copy of SIZE bytes; WHAT names them if the file is too short."""
        self.check(offset, size, what)
        return self.map[offset : offset + size]

    def array(self, offset: int, shape: tuple[int, ...], dtype: str, what: str) -> Array:
        """The numbers that stand at OFFSET, not copied."""
        count = 1
        for n in shape:
            count *= n
        kind = np.dtype(dtype)
        self.check(offset, count * kind.itemsize, what)
        return np.frombuffer(self.map, kind, count, offset).reshape(shape)

    def check(self, offset: int, size: int, what: str) -> None:
        """Raises LlamaError unless bytes [offset, offset + size) are in the file."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise LlamaError(
                f"{self.path}: truncated: {what} needs bytes {offset} to {offset + size}, "
                f"the file has {self.size}"
            )

    def release(self) -> None:
        """Lets the system take back the pages read so far; later reads fetch them again."""
        if hasattr(self.map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


class Member(Mapped):
    """A part of a mapped file that has a checksum, compared before its first number is handed out;
    a CRC32 of 0 is none, which torch writes where it is told not to compute one."""

    def __init__(self, file: Mapped, offset: int, size: int, crc32: int, name: str) -> None:
        self.path, self.size, self.map = file.path, file.size, file.map
        self._unread = crc32 != 0
        self._offset, self._end, self._crc32, self._name = offset, offset + size, crc32, name

    def bytes(self, offset: int, size: int, what: str) -> bytes:
        self._verify()
        return super().bytes(offset, size, what)

    def array(self, offset: int, shape: tuple[int, ...], dtype: str, what: str) -> Array:
        self._verify()
        return super().array(offset, shape, dtype, what)

    def _verify(self) -> None:
        if not self._unread:
            return
        found = 0
        for at in range(self._offset, self._end, CHUNK_BYTES):
            found = zlib.crc32(self.map[at : min(at + CHUNK_BYTES, self._end)], found)
            self.release()
        if found != self._crc32:
            raise LlamaError(
                f"{self.path}: {self._name} is damaged: checksum {found:08x}, recorded "
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

    def release(self) -> None:
        """Gives back the memory that reading took."""


@dataclass(frozen=True)
class Plain:
    """A float tensor that lies in one piece, row after row."""

    file: Mapped
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
        return self.file.array(self.offset + first * row, shape, stored.str, self.name)

    def release(self) -> None:
        self.file.release()


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

    def release(self) -> None:
        for part in self.parts:
            part.release()


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

    def release(self) -> None:
        for part in self.parts:
            part.release()


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

    def release(self) -> None:
        self.part.release()


@dataclass(frozen=True)
class Unreadable:
    """A tensor of a dtype that no weight has here: known, so that it can be named."""

    dtype: str
    shape: tuple[int, ...]
    name: str

    def rows(self, first: int, last: int) -> Array:
        raise LlamaError(f"{self.name}: expected float32, float16 or bfloat16, found {self.dtype}")

    def release(self) -> None:
        pass
