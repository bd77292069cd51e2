"""Streams a checkpoint into a .bin: a few rows at a time are read, rounded, tiled and written.

A chunk is 16 MB of weights as float32, so memory does not grow with the model. Rounding to a
smaller kind is to the nearest; a weight that is not finite, or too large for the kind, stops
the export by name, for it would silently turn into infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama.checkpoints.checkpoint import Checkpoint
from llama.checkpoints.tensors import Tensor
from llama.errors import LlamaError
from llama.format import Head, Record, Writer, expected_tensors
from llama.quant import TILE_ROWS, Array, Kind, kind_of, narrow

CHUNK_BYTES = 1 << 24


def records_of(checkpoint: Checkpoint, kind: Kind) -> list[Record]:
    """The file's directory: matrices in KIND, vectors and a small head of labels in f32."""
    exact = {"output.weight"} if checkpoint.config.head >= Head.SEQUENCE else set()
    return [
        Record(name, kind if len(shape) == 2 and name not in exact else Kind.F32, shape)
        for name, shape in expected_tensors(checkpoint.config).items()
    ]


def convert(
    checkpoint: Checkpoint,
    out: Path,
    kind: Kind,
    *,
    force: bool = False,
    progress: Callable[[int], object] = lambda n: None,
    finish: Callable[[Writer], object] = lambda writer: None,
) -> int:
    """Writes OUT and returns its size in bytes; PROGRESS hears the bytes of each chunk written,
    FINISH gets the writer when all is written and the file has not got its name yet.

    Raises LlamaError; then, and on Ctrl-C, nothing is left of OUT.
    """
    checkpoint.check()
    tokenizer = (checkpoint.tokenizer.kind, checkpoint.tokenizer.data)
    writer = Writer(
        out, checkpoint.config, records_of(checkpoint, kind), tokenizer=tokenizer,
        meta=checkpoint.meta, force=force,
    )  # fmt: skip
    with writer:
        for record in writer.records:
            tensor = checkpoint.tensors[record.name]
            step = _chunk_rows(record)
            for first in range(0, record.rows, step):
                last = min(first + step, record.rows)
                writer.write(record.name, _rows(tensor, record, first, last))
                done = [record.n_bytes * row // record.rows for row in (first, last)]
                progress(done[1] - done[0])
        finish(writer)
    return writer.file_bytes


def _chunk_rows(record: Record) -> int:
    rows = CHUNK_BYTES // (4 * record.columns)
    return max(rows // TILE_ROWS, 1) * TILE_ROWS


def _rows(tensor: Tensor, record: Record, first: int, last: int) -> Array:
    rows = tensor.rows(first, last)
    stored = narrow(rows, record.kind)
    bad = ~_finite(stored)
    if bad.any():
        place = np.argwhere(bad)[0]
        value = narrow(rows, Kind.F32)[tuple(place)]
        where = ", ".join(str(n) for n in (first + place[0], *place[1:]))
        problem = f"is too large for {record.kind.label}" if np.isfinite(value) else "is not finite"
        raise LlamaError(f"{record.name}: weight ({where}) {problem}: {value:g}")
    return stored


def _finite(array: Array) -> Array:
    bf16 = kind_of(array) == Kind.BF16
    finite: Array = (array & 0x7F80) != 0x7F80 if bf16 else np.isfinite(array)
    return finite
