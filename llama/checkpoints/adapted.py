"""A tensor that an adapter changes, computed a few rows at a time while it is read.

Steps follow each other in float64 and are rounded to float32 once, so that merging adds no error
of its own: what a file then holds is the exact sum, rounded to its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llama.checkpoints.tensors import Tensor
from llama.quant import Array, widen

Wide = NDArray[np.float64]


class Step(Protocol):
    """One change of a tensor."""

    def change(self, values: Wide, first: int, last: int) -> Wide:
        """Rows [first, last) as they were to what they become; VALUES may be written over."""


@dataclass(frozen=True)
class LowRank:
    """W + scale B A (arXiv:2106.09685, section 4.1); with a magnitude m, DoRA's rows
    m (W + scale B A) / |W + scale B A| (arXiv:2402.09353, equation 5)."""

    b: Tensor  # (rows, r)
    a: Tensor  # (r, columns)
    scale: float
    magnitude: Tensor | None = None  # (rows)

    def change(self, values: Wide, first: int, last: int) -> Wide:
        a = _wide(self.a.rows(0, self.a.shape[0]))
        values += (_wide(self.b.rows(first, last)) * self.scale) @ a
        if self.magnitude is not None:
            norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros is named later
                values *= (_wide(self.magnitude.rows(first, last)) / norms)[:, None]
        return values


@dataclass(frozen=True)
class Offset:
    """b + scale c of a bias."""

    by: Tensor  # (rows)
    scale: float

    def change(self, values: Wide, first: int, last: int) -> Wide:
        values += _wide(self.by.rows(first, last)) * self.scale
        return values


@dataclass(frozen=True)
class Adapted:
    """SOURCE changed by STEPS; DTYPE is that of the tensor in whose place it stands."""

    source: Tensor
    dtype: str
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def rows(self, first: int, last: int) -> Array:
        rows = self.source.rows(first, last)
        if not self.steps:
            return rows
        values = _wide(rows)
        for step in self.steps:
            values = step.change(values, first, last)
        with np.errstate(over="ignore"):  # infinite: refused by name when it is written
            return values.astype(np.float32)


@dataclass(frozen=True)
class Transposed:
    """A matrix whose rows are another's columns."""

    part: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.part.dtype

    def rows(self, first: int, last: int) -> Array:
        columns: Array = self.part.rows(0, self.part.shape[0])[:, first:last].T
        return columns


def _wide(rows: Array) -> Wide:
    return widen(rows).astype(np.float64)
