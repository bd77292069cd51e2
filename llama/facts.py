"""What the library says of an open model and of a session with it."""

from __future__ import annotations

from dataclasses import dataclass

from llama.config import Config as Shape
from llama.quant import Kind


@dataclass(frozen=True, kw_only=True)
class Config(Shape):
    """The model's shape, and how it is stored."""

    dtype: str  # the kind that holds most of the weights: "f32", "f16", "bf16", "q8", "q4"
    file_bytes: int
    weight_bytes: int  # tensor data, padding included
    step_bytes: int  # of these, what decoding one token reads: an embedding table gives one row


@dataclass(frozen=True)
class Tensor:
    """One tensor's record; shape is (rows, columns), or (length,) for a vector."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Loss:
    """What storing weights in another kind lost, as sums over the true weights."""

    sum_squares: float
    sum_squared_error: float
    max_error: float


@dataclass(frozen=True)
class SessionInfo:
    """Where a session runs and what it holds; sizes in bytes."""

    device: str
    isa: str
    threads: int
    activations: int  # bits of what meets quantised weights
    kv_kind: str
    max_seq_len: int
    page_positions: int
    host_layers: int  # that the CPU runs for the GPU; 0 on the CPU
    kv_bytes: int
    scratch_bytes: int
    gpu_scratch_bytes: int  # of these, a GPU's
    kv_bytes_per_position: int
