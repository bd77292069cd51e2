"""What calibration asks of the C library: a layer in stages, the moments of inputs, products.

lib/llama.h is the manual; here arrays become pointers and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llama._lib import check, ffi, lib
from llama.engine import Engine, Floats, Model
from llama.errors import LlamaError
from llama.quant import Kind

Blocks = tuple[Kind, NDArray[np.uint8]]  # a matrix as it is encoded, see aligned()
END, HEAD = int(lib.LLAMA_STAGE_END), int(lib.LLAMA_STAGE_HEAD)


def aligned(n: int) -> NDArray[np.uint8]:
    """N bytes at a multiple of 64, as the kernels read blocks."""
    raw = np.empty(n + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n]


def run_stage(
    engine: Engine, layer: int, stage: int, stream: Floats, given: Floats,
    blocks: Mapping[int, Blocks],
) -> Floats:  # fmt: skip
    """One stage of LAYER over one text. Changes STREAM (n, dim), takes what the stage before GAVE,
    and gives (n, columns) inputs of the matrices that are next. BLOCKS by place (wq, wk, wv, wo,
    w1, w3, w2) stand for the model's own."""
    c = engine.config
    width = {1: c.n_heads * c.head_dim, 3: c.hidden_dim}.get(stage, c.dim)
    inputs = np.empty((len(stream), width), np.float32)
    s = ffi.new("llama_stage *")
    s.layer, s.stage, s.n = layer, stage, len(stream)
    alive = [ffi.from_buffer("float[]", array) for array in (stream, given, inputs)]
    s.stream, s.given, s.inputs = alive
    for place, (kind, data) in blocks.items():
        alive.append(ffi.from_buffer(data))
        s.kinds[place], s.blocks[place] = int(kind), alive[-1]
    check(lib.llama_run_stage(engine.handle, s))
    return inputs


def multiply(
    model: Model, index: int, x: Floats, first: int = 0, n: int | None = None,
    blocks: Blocks | None = None, threads: int | None = None,
) -> Floats:  # fmt: skip
    """(n_x, n): rows [first, first + n) of MODEL's tensor INDEX, or the BLOCKS that stand for these
    rows, times X (n_x, columns), in f32 whatever the kind. N None: all that follow."""
    rows, columns = model.tensors[index].shape
    n = rows - first if n is None else n
    if x.shape[1:] != (columns,) or n < 0:
        raise LlamaError(f"inputs of {columns} columns for {n} rows: found shape {x.shape}")
    y = np.empty((len(x), n), np.float32)
    kind, data = blocks or (Kind.F32, np.empty(0, np.uint8))
    check(lib.llama_multiply(model.handle, index, first, n, int(kind),
                             ffi.from_buffer(data) if blocks else ffi.NULL, len(data),
                             ffi.from_buffer("float[]", x), len(x), threads or 0,
                             ffi.from_buffer("float[]", y)))  # fmt: skip
    return y


def add_moments(
    moments: Floats, x: Floats, threads: int | None = None, rotated: bool = False
) -> None:
    """MOMENTS (columns, columns), zeros at first, += x^T x for inputs X (n, columns), ROTATED as
    rotated kinds meet them; only the lower triangle."""
    n, columns = x.shape
    if moments.shape != (columns, columns):
        raise LlamaError(f"moments of {columns} columns: found shape {moments.shape}")
    check(lib.llama_add_moments(ffi.from_buffer("float[]", x), n, columns, rotated, threads or 0,
                                ffi.from_buffer("float[]", moments)))  # fmt: skip


def factor_moments(moments: Floats, damping: float, threads: int | None = None) -> None:
    """Factors MOMENTS in place, as llama_factor_moments says."""
    check(lib.llama_factor_moments(ffi.from_buffer("float[]", moments), len(moments), damping,
                                   threads or 0))  # fmt: skip
