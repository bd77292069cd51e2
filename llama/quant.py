"""How weights lie in blocks: the kinds, numbers to tiles, and tiles back to numbers.

Twin of lib/quant.c. A matrix is cut into strips of 16 rows, a strip into blocks from left to
right, and a block interleaves its 16 rows, so that one vector load in a kernel feeds every row
of the strip. This file writes the float kinds only; the others are encoded by the C library and
decoded here straight from docs/format.md, which makes this the independent second opinion.

bf16 has no numpy dtype: everywhere in Python it travels as its 16 bits in a uint16 array.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_ROWS = 16
GROUP = 32

Array = NDArray[Any]


class Kind(IntEnum):
    """A way to store weights; the number stands in files."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    Q4 = 5
    Q8R = 6
    Q4R = 7
    Q4E = 8

    @property
    def label(self) -> str:
        """The name people type: "f32", "q8"."""
        return self.name.lower()

    @property
    def rotated(self) -> bool:
        """Whether groups of GROUP columns are turned by a Hadamard matrix."""
        return self in (Kind.Q8R, Kind.Q4R)


@dataclass(frozen=True)
class Layout:
    """One row of the table in docs/format.md."""

    columns: int  # columns that one block covers
    block_bytes: int


LAYOUTS = {
    Kind.F32: Layout(1, 4 * TILE_ROWS),
    Kind.F16: Layout(1, 2 * TILE_ROWS),
    Kind.BF16: Layout(1, 2 * TILE_ROWS),
    Kind.Q8: Layout(GROUP, 544),
    Kind.Q4: Layout(GROUP, 288),
    Kind.Q8R: Layout(GROUP, 544),
    Kind.Q4R: Layout(GROUP, 288),
    Kind.Q4E: Layout(GROUP, 288),
}
# What a float kind is held as in numpy.
STORED: dict[Kind, np.dtype[Any]] = {
    Kind.F32: np.dtype("<f4"),
    Kind.F16: np.dtype("<f2"),
    Kind.BF16: np.dtype("<u2"),
}


# of 4-bit kinds, as in lib/quant.c
UNEVEN = np.array(
    [-127, -101, -80, -63, -48, -34, -22, -10, 2, 13, 26, 38, 53, 68, 85, 107], np.int16
)
EVEN = np.arange(-120, 121, 16).astype(np.int16)
LEVELS = {Kind.Q4: UNEVEN, Kind.Q4R: UNEVEN, Kind.Q4E: EVEN}

# of rotated kinds: +1 where row & column have an even number of ones
HADAMARD = np.array(
    [[1 - 2 * ((i & j).bit_count() & 1) for j in range(GROUP)] for i in range(GROUP)], np.float32
)


def matrix_bytes(kind: Kind, rows: int, columns: int) -> int:
    """Bytes that ROWS x COLUMNS weights take, padding included."""
    layout = LAYOUTS[kind]
    strips = -(-rows // TILE_ROWS)
    blocks = -(-columns // layout.columns)
    return strips * blocks * layout.block_bytes


def kind_of(array: Array) -> Kind:
    """The float kind that ARRAY holds: float32, float16, or uint16 for bf16."""
    for kind, dtype in STORED.items():
        if array.dtype == dtype:
            return kind
    raise TypeError(f"expected float32, float16 or uint16 (bf16), found {array.dtype}")


def widen(array: Array) -> NDArray[np.float32]:
    """Any float kind to float32, exactly."""
    if kind_of(array) == Kind.BF16:
        wide: NDArray[np.float32] = (array.astype("<u4") << 16).view(np.float32)
        return wide
    return array.astype(np.float32, copy=False)


def narrow(array: Array, kind: Kind) -> Array:
    """Any float kind to KIND, to the nearest, ties to even; too large becomes infinite."""
    if kind not in STORED:
        raise TypeError(f"expected a float kind, found {kind.label}")
    if kind_of(array) == kind:
        return array
    wide = widen(array)
    if kind == Kind.F32:
        return wide
    if kind == Kind.F16:
        with np.errstate(over="ignore", under="ignore"):
            return wide.astype("<f2")
    bits = np.ascontiguousarray(wide).view("<u4")
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(wide), quiet, nearest).astype("<u2")


def tile(array: Array, kind: Kind) -> Array:
    """Rows of a matrix (rows, columns) as they stand in a file, of float kind KIND.

    The result is (strips, columns, 16) and contiguous. Rows beyond the last are zeros, so a
    chunk whose rows are no multiple of 16 can only be a matrix's last.
    """
    values = narrow(array, kind)
    rows, columns = values.shape
    strips = -(-rows // TILE_ROWS)
    if rows % TILE_ROWS:
        padded = np.zeros((strips * TILE_ROWS, columns), values.dtype)
        padded[:rows] = values
        values = padded
    return np.ascontiguousarray(values.reshape(strips, TILE_ROWS, columns).transpose(0, 2, 1))


def untile(data: Array, kind: Kind, rows: int, columns: int) -> NDArray[np.float32]:
    """A matrix's bytes (uint8, exactly matrix_bytes of them) back to float32 (rows, columns)."""
    strips = -(-rows // TILE_ROWS)
    if kind in STORED:
        tiles = data.view(STORED[kind]).reshape(strips, columns, TILE_ROWS)
        values = widen(tiles.transpose(0, 2, 1).reshape(strips * TILE_ROWS, columns))
        return np.ascontiguousarray(values[:rows])
    blocks = data.reshape(strips, -1, LAYOUTS[kind].block_bytes)
    d = np.ascontiguousarray(blocks[:, :, : 2 * TILE_ROWS]).view("<u2")
    codes = np.ascontiguousarray(blocks[:, :, 2 * TILE_ROWS :])
    if kind in (Kind.Q8, Kind.Q8R):
        # i8 q[c / 4][r][c mod 4]
        signed = codes.view(np.int8).reshape(strips, -1, GROUP // 4, TILE_ROWS, 4)
        by_row: Array = signed.transpose(0, 1, 3, 2, 4).reshape(strips, -1, TILE_ROWS, GROUP)
        scales = d.view("<f2").astype(np.float32)
    else:
        # u8 q[c / 4][r][c mod 4]: columns 0..15 in the low halves, 16..31 in the high ones
        bytes_ = codes.reshape(strips, -1, GROUP // 8, TILE_ROWS, 4).transpose(0, 1, 3, 2, 4)
        halves = bytes_.reshape(strips, -1, TILE_ROWS, GROUP // 2)
        levels = LEVELS[kind][np.concatenate([halves & 15, halves >> 4], axis=3)]
        by_row = levels + 2 * ((d & 63).astype(np.int16) - 32)[..., None]
        scales = (d & 0xFFC0).view("<f2").astype(np.float32) * np.float32(1 / 64)
    values = by_row * scales[..., None]  # (strips, blocks, 16, 32)
    if kind.rotated:  # the sums are exact: they share a scale
        values = values @ (HADAMARD * np.float32(0.25))
    values = values.transpose(0, 2, 1, 3).reshape(strips * TILE_ROWS, -1)
    return np.ascontiguousarray(values[:rows, :columns], dtype=np.float32)
