"""The emulated GPU of tests/cuda_on_cpu, and how tests hold what it computes to the CPU's."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from building import build

from llama import _lib
from llama.engine import Engine
from llama.errors import LlamaError
from llama.quant import Kind

FEW, MANY = 5e-6, 2e-3  # of the largest logit: with 22 and with 11 bits of a product's input
ROUNDED = {"f32": 0.0, "f16": 1e-3, "q8": 0.03}  # and what keys and values may add to that
SHAPE = small_models.config(vocab_size=101, n_kv_heads=2, max_seq_len=160)
WIDE = small_models.config(vocab_size=53, dim=96, hidden_dim=130, head_dim=64, n_heads=6,
                           n_kv_heads=2, max_seq_len=160)  # fmt: skip


@cache
def built(sanitizer: str, *targets: str) -> Path:
    """The folder where CMake has built TARGETS for the emulator."""
    folder = _lib.BUILD / f"cuda-{sanitizer or 'on-cpu'}"
    flags = ("-DCUDA_ON_CPU=ON",)
    if sanitizer == "address":  # and a load or store across its own alignment
        sanitizer += ",alignment -fno-sanitize-recover=alignment"
    if sanitizer:
        flags += (f"-DCMAKE_CXX_FLAGS=-fsanitize={sanitizer} -g1", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    return build(*targets, folder=folder, options=flags)


def as_f32(path: Path) -> Path:
    """The same weights as f32."""
    out = path.with_name(f"{path.stem}-as-f32.bin")
    return out if out.exists() else small_models.quantized(path, out, Kind.F32)


def distance(ours: Any, theirs: Any) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def feed(e: Engine, tokens: Any, sequence: int = 0, **more: Any) -> Any:
    start, n = e.length(sequence), len(tokens)
    return e.forward(tokens, [sequence] * n, range(start, start + n), [True] * n, **more)


def greedy(e: Engine, tokens: list[int], n: int) -> list[int]:
    row = feed(e, tokens)[-1]
    for _ in range(n):
        tokens = [*tokens, int(row.argmax())]
        row = feed(e, tokens[-1:])[0]
    return tokens


def run_out(e: Engine, cpu: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of a text until E's GPU has no memory left: an error, after which all goes on."""
    before = feed(e, range(20))
    monkeypatch.setenv("CUDA_ON_CPU_MEMORY", "1")
    held = 1
    with pytest.raises(LlamaError, match='device "cuda": memory for a KV page: out of memory'):
        while True:
            e.fork(0, held, 20)
            feed(e, np.arange(140) % 101, held)
            held += 1
    monkeypatch.delenv("CUDA_ON_CPU_MEMORY")
    assert e.length(held) == 20
    assert distance(feed(e, [3]), (feed(cpu, range(20)), feed(cpu, [3]))[1]) < FEW
    e.trim(0, 0)
    assert np.array_equal(feed(e, range(20)), before)


def free_bytes() -> int:
    """Of the emulated device."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library = ctypes.CDLL(str(built("", "llama") / "libllama.so"))
    library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return free.value
