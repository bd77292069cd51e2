"""What this machine allows and what a model asks of it: the two sides of every share.

Decoding a token reads all weights, and the keys and values before it; reading a prompt multiplies
and adds. The C library measures how fast the machine does either; here stands how much there is
to do, and so how fast it could be done. Attention's own arithmetic is left out of the latter: it
is small beside the matrices' until a text is very long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from llama._lib import check, ffi, lib
from llama.engine import measure_bandwidth
from llama.facts import Config, Tensor
from llama.quant import Kind

# products of int8 codes; the others' are f32
INTEGER = (Kind.Q8, Kind.Q4, Kind.Q8R, Kind.Q4R, Kind.Q4E)


@dataclass(frozen=True)
class Limits:
    """Of so many threads: bytes read a second, and multiply-adds a second."""

    bandwidth: float
    f32: float
    int8: float

    def best(self, other: Limits) -> Limits:
        """The larger of each: other work on a machine only ever makes it look slower."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Limits(*(max(pair) for pair in pairs))


def measure_peaks(threads: int | None = None, isa: str | None = None) -> tuple[float, float]:
    """Multiply-adds a second of f32 and of int8, with the best instructions for the kernels ISA."""
    f32, int8 = ffi.new("double *"), ffi.new("double *")
    name = ffi.new("char[]", isa.encode()) if isa else ffi.NULL
    check(lib.llama_measure_peaks(threads or 0, name, f32, int8))
    return float(f32[0]), float(int8[0])


def measure(threads: int, isa: str) -> Limits:
    """All three; takes about a second."""
    return Limits(measure_bandwidth(threads), *measure_peaks(threads, isa))


def time_opening(path: str | os.PathLike[str], threads: int, activations: int, isa: str) -> float:
    """Seconds from llama_open to the first logits of a one-token text, in the library alone."""
    name, chosen = os.fsencode(path), ffi.new("char[]", isa.encode())
    model, session = ffi.new("llama_model **"), ffi.new("llama_session **")
    options, config = ffi.new("llama_session_options *"), ffi.new("llama_config *")
    options.isa, options.threads, options.activations = chosen, threads, activations
    options.kv_kind = -1
    batch, zeros = ffi.new("llama_batch *"), ffi.new("int32_t[]", 1)
    want = ffi.new("uint8_t[]", [1])
    batch.n, batch.want = 1, want
    batch.tokens = batch.sequences = batch.positions = zeros
    start = time.perf_counter()
    try:
        check(lib.llama_open(name, model))
        check(lib.llama_get_config(model[0], config))
        logits = ffi.new("float[]", config.n_outputs)
        check(lib.llama_session_open(model[0], options, session))
        check(lib.llama_forward(session[0], batch, logits))
        return time.perf_counter() - start
    finally:
        lib.llama_session_close(session[0])
        lib.llama_close(model[0])


@dataclass(frozen=True)
class Load:
    """What a model asks. Multiply-adds: of each token in the layers, and of each row of logits;
    either as (f32, int8), the latter once for each pass that the activations take."""

    step_bytes: int  # of weights that a decoded token, or several at once, must read
    kv_bytes: int  # of keys and values that each position before it adds
    token: tuple[int, int]
    row: tuple[int, int]

    def prompt_seconds(self, n: int, limits: Limits) -> float:
        """The least time that a prompt of N tokens, with one row of logits, can take."""
        return self._arithmetic(n, 1, limits)

    def step_bytes_at(self, depth: float, batch: int) -> float:
        """Bytes that one step of BATCH sequences reads, each with DEPTH positions."""
        return self.step_bytes + batch * depth * self.kv_bytes

    def step_seconds(self, depth: float, batch: int, limits: Limits) -> tuple[float, str]:
        """The least time that such a step can take, and which limit says so: "bandwidth", or
        "int8" or "f32" where many sequences share what is read."""
        reading = self.step_bytes_at(depth, batch) / limits.bandwidth
        adding = self._arithmetic(batch, batch, limits)
        return (adding, self.peak) if adding > reading else (reading, "bandwidth")

    @property
    def peak(self) -> str:
        """Which arithmetic most of the work is."""
        return "int8" if self.token[1] > self.token[0] else "f32"

    def _arithmetic(self, tokens: int, rows: int, limits: Limits) -> float:
        f32, int8 = (tokens * t + rows * r for t, r in zip(self.token, self.row, strict=True))
        return f32 / limits.f32 + int8 / limits.int8


def load_of(config: Config, tensors: Iterable[Tensor], kv_bytes: int, activations: int) -> Load:
    """What a model of these TENSORS asks; KV_BYTES a position, ACTIVATIONS 8 or 16 bits."""
    token, row = [0, 0], [0, 0]
    head = "tok_embeddings.weight" if config.tied else "output.weight"
    for tensor in tensors:
        if len(tensor.shape) != 2 or not (tensor.name == head or tensor.name.startswith("layers.")):
            continue
        integer = tensor.kind in INTEGER
        passes = 2 if integer and activations == 16 else 1
        sums = row if tensor.name == head else token
        sums[integer] += passes * tensor.shape[0] * tensor.shape[1]
    return Load(config.step_bytes, kv_bytes, (token[0], token[1]), (row[0], row[1]))
