"""The GGUF container: typed metadata and a directory of tensors, read with every length checked.

  "GGUF" | u32 version | u64 n_tensors | u64 n_metadata
  metadata  string key | u32 type | value              (array: u32 type | u64 n | values)
  tensors   string name | u32 n_dims | u64 dims[n_dims], columns first | u32 type | u64 offset
  zeros up to the alignment, then the data; offsets count from here

Strings are u64 length and bytes. All of it is little-endian here; only the meaning of the
quantised blocks is left to the `gguf` package.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama.checkpoints.tensors import Plain, Tensor, array, check_apart
from llama.errors import LlamaError
from llama.quant import Array, Kind
from llama.reading import File

MAGIC = b"GGUF"
MAX_NAME = 1 << 16
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
FLOAT_TYPES = {
    GGMLQuantizationType.F32: Kind.F32,
    GGMLQuantizationType.F16: Kind.F16,
    GGMLQuantizationType.BF16: Kind.BF16,
}


@dataclass(frozen=True)
class Quantised:
    """A tensor in one of ggml's block types, dequantised a few rows at a time."""

    file: File
    offset: int
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    name: str

    @property
    def dtype(self) -> str:
        return str(self.type.name)

    def rows(self, first: int, last: int) -> Array:
        block, size = GGML_QUANT_SIZES[self.type]
        row = self.shape[-1] // block * size
        if len(self.shape) == 1:  # a vector is one row of blocks
            return self._dequantised(0, 1, row)[0, first:last]
        return self._dequantised(first, last, row)

    def _dequantised(self, first: int, last: int, row: int) -> Array:
        place, shape = self.offset + first * row, (last - first, row)
        data = array(self.file, place, shape, "<u1", f"tensor {self.name}")
        values: Array = dequantize(np.ascontiguousarray(data), self.type)
        return values.reshape(last - first, self.shape[-1]).astype(np.float32, copy=False)


class _Cursor:
    """Walks through the front of the file and refuses to walk out of it."""

    def __init__(self, file: File) -> None:
        self.file, self.at = file, 0

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, self.file.read(self.at, size, what))
        self.at += size
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        size = self.number("Q", what)
        if limit is not None and size > limit:
            raise LlamaError(f"{self.file.path}: {what} is {size} bytes long, at most {limit}")
        raw = self.file.read(self.at, size, what)
        self.at += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise LlamaError(f"{self.file.path}: {what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise LlamaError(f"{self.file.path}: {what} has unknown type {kind}")
        of, n = self.number("I", what), self.number("Q", what)
        if of in SCALARS:
            dtype = np.dtype("?" if of == 7 else "<" + SCALARS[of])
            values = array(self.file, self.at, (n,), dtype.str, what).tolist()
            self.at += n * dtype.itemsize
            return values
        if of != STRING:
            raise LlamaError(f"{self.file.path}: {what} is an array of type {of}, not known here")
        self.file.check(self.at, 8 * n, what)  # a string takes 8 bytes at least
        return [self.string(what) for _ in range(n)]


class Container:
    """A GGUF file's metadata and tensors (under their own names)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = File(path)
        cursor = _Cursor(self.file)
        n_tensors, n_metadata = self._header(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = cursor.string("a metadata key", MAX_NAME)
            if key in self.metadata:
                raise LlamaError(f"{path}: {key} stands twice in the metadata")
            self.metadata[key] = cursor.value(cursor.number("I", key), key)
        infos = [self._info(cursor) for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment % 8:
            raise LlamaError(
                f"{path}: general.alignment must be a multiple of 8, found {alignment}"
            )
        start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        self._places: list[tuple[int, int, str]] = []
        for name, shape, type_, offset in infos:
            if name in self.tensors:
                raise LlamaError(f"{path}: {name} stands twice among the tensors")
            self.tensors[name] = self._tensor(name, shape, type_, start, offset, alignment)
        check_apart(path, self._places)

    def _header(self, cursor: _Cursor) -> tuple[int, int]:
        magic = self.file.read(0, 4, "the header")
        if magic != MAGIC:
            raise LlamaError(f"{self.path}: expected a GGUF file, it starts with {magic!r}")
        cursor.at = 4
        version = cursor.number("I", "the version")
        if version & 0xFFFF == 0:
            raise LlamaError(f"{self.path}: a big-endian GGUF; only little-endian ones are read")
        if version not in (2, 3):
            raise LlamaError(f"{self.path}: expected GGUF version 2 or 3, found {version}")
        n_tensors = cursor.number("Q", "the tensor count")
        n_metadata = cursor.number("Q", "the metadata count")
        # A metadata entry takes 13 bytes at least, a tensor's 24.
        self.file.check(cursor.at, 13 * n_metadata + 24 * n_tensors, "its own directory")
        return n_tensors, n_metadata

    def _info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string("a tensor's name", MAX_NAME)
        n_dims = cursor.number("I", name)
        if not 1 <= n_dims <= 4:
            raise LlamaError(f"{self.path}: {name}: expected 1 to 4 dimensions, found {n_dims}")
        dims = [cursor.number("Q", name) for _ in range(n_dims)]
        if any(not 1 <= n <= 1 << 40 for n in dims):
            raise LlamaError(f"{self.path}: {name}: impossible shape {dims}")
        while len(dims) > 2 and dims[-1] == 1:
            dims.pop()
        return name, tuple(reversed(dims)), cursor.number("I", name), cursor.number("Q", name)

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_: int, start: int, offset: int, align: int
    ) -> Tensor:
        try:
            type_ = GGMLQuantizationType(type_)
            block, size = GGML_QUANT_SIZES[type_]
        except (ValueError, KeyError):
            raise LlamaError(f"{self.path}: {name}: unknown tensor type {type_}") from None
        weights = 1
        for n in shape:
            weights *= n
        if shape[-1] % block:
            raise LlamaError(
                f"{self.path}: {name}: {type_.name} needs columns in blocks of {block}, "
                f"found {shape[-1]}"
            )
        if offset % align:
            raise LlamaError(f"{self.path}: {name}: offset {offset} is not a multiple of {align}")
        n_bytes = weights // block * size
        self.file.check(start + offset, n_bytes, f"tensor {name}")
        self._places.append((offset, offset + n_bytes, name))
        if type_ in FLOAT_TYPES:
            return Plain(self.file, start + offset, FLOAT_TYPES[type_], shape, name)
        try:
            dequantize(np.zeros((1, size), np.uint8), type_)
        except (NotImplementedError, KeyError):
            raise LlamaError(
                f"{self.path}: {name}: {type_.name} is a type that the gguf package does not "
                "dequantise"
            ) from None
        return Quantised(self.file, start + offset, type_, shape, name)
