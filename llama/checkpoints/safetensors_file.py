"""The safetensors container, every length checked before it is used.

  u64 n | n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

Offsets count from the start of the data.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from llama.checkpoints.tensors import Plain, Tensor, Unreadable, check_apart
from llama.errors import LlamaError
from llama.quant import STORED, Kind
from llama.reading import File

LARGEST_HEADER = 100_000_000  # the format's own limit
KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raises LlamaError."""
    file = File(path)
    (size,) = struct.unpack("<Q", file.read(0, 8, "the header's length"))
    if size > LARGEST_HEADER:
        raise LlamaError(f"{path}: not safetensors: a header of {size} bytes")
    raw = file.read(8, size, "the header")
    try:
        header = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LlamaError(f"{path}: not safetensors: its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise LlamaError(f"{path}: not safetensors: its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, 8 + size, name, entry) for name, entry in header.items()}
    check_apart(path, [(*entry["data_offsets"], name) for name, entry in header.items()])
    return tensors


def _tensor(file: File, start: int, name: str, entry: Any) -> Tensor:
    where = f"{file.path}: {name[:80]}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise LlamaError(f"{where}: expected dtype, shape and data_offsets") from None
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers) or len(numbers) > 10:
        raise LlamaError(f"{where}: impossible shape or offsets")
    if begin > end:
        raise LlamaError(f"{where}: its data ends before it begins")
    file.check(start + begin, end - begin, f"tensor {name[:80]}")
    if not isinstance(dtype, str) or dtype not in KINDS:
        return Unreadable(str(dtype)[:20], tuple(shape), name)
    kind = KINDS[dtype]
    expected = math.prod(shape) * STORED[kind].itemsize
    if end - begin != expected:
        raise LlamaError(f"{where}: expected {expected} bytes of data, found {end - begin}")
    return Plain(file, start + begin, kind, tuple(shape), name)
