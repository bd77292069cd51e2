"""What meets quantised weights is rounded too: to 8 bits a group, or 16.

The right answer is the same weights, decoded to f32, in exact arithmetic: then only the
activations' rounding differs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models

from llama import format
from llama.config import Config
from llama.engine import Engine, isa_names
from llama.errors import LlamaError
from llama.format import Record, Writer
from llama.quant import Kind

SHAPE = Config(
    vocab_size=301, dim=100, hidden_dim=170, head_dim=20, n_layers=3, n_heads=5, n_kv_heads=5,
    max_seq_len=128, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
IDS = [(7 * i + i * i) % 301 for i in range(70)]


def decoded(path: Path, out: Path) -> Path:
    """PATH's weights as f32."""
    model = format.read(path)
    records = [Record(name, Kind.F32, r.shape) for name, r in model.records.items()]
    with Writer(out, model.config, records) as writer:
        for record in records:
            writer.write(record.name, model.tensors[record.name])
    return out


def logits(path: Path, **options: object) -> np.ndarray:
    with Engine(path, kv="f32", **options) as engine:  # type: ignore[arg-type]
        n = len(IDS)
        found = engine.forward(IDS, [0] * n, range(n), [True] * n)
        assert found is not None
        return found


# The errors seen when this was written: 1.2e-4 and 2.9e-2 of the largest logit.
@pytest.mark.parametrize(("bits", "bound"), [(16, 4e-4), (8, 8e-2)])
@pytest.mark.parametrize("kind", [Kind.Q8, Kind.Q4, Kind.Q8R, Kind.Q4R, Kind.Q4E])
def test_distance_from_exact(tmp_path: Path, kind: Kind, bits: int, bound: float) -> None:
    path = small_models.of_kind(tmp_path, SHAPE, kind)
    exact = logits(decoded(path, tmp_path / "exact.bin"))
    error = np.abs(logits(path, activations=bits) - exact).max() / np.abs(exact).max()
    assert bound / 40 < error < bound


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", [Kind.Q8, Kind.Q4, Kind.Q8R, Kind.Q4R, Kind.Q4E])
def test_identical_everywhere(tmp_path: Path, kind: Kind, bits: int) -> None:
    """Any ISA, any threads, whole or token by token."""
    path = small_models.of_kind(tmp_path, SHAPE, kind)
    first = logits(path, activations=bits, isa="scalar", threads=1)
    for isa in isa_names():
        assert np.array_equal(first, logits(path, activations=bits, isa=isa, threads=2))
    with Engine(path, kv="f32", activations=bits) as engine:
        for i, token in enumerate(IDS):
            row = engine.forward([token], [0], [i], [True])
            assert row is not None and np.array_equal(row[0], first[i])


def test_the_default(tmp_path: Path) -> None:
    """16 bits, and 8 where every layer's matrices are rotated."""
    whole = small_models.config(dim=64, hidden_dim=96, head_dim=32, n_heads=2, n_kv_heads=2)
    for seed, (kind, shape, bits) in enumerate([
        (Kind.Q8, SHAPE, 16), (Kind.Q4R, whole, 8), (Kind.Q8R, whole, 8), (Kind.Q4, whole, 16),
        (Kind.Q8R, replace(whole, head_dim=10), 16), (Kind.F16, whole, 16),
    ]):  # fmt: skip
        path = small_models.of_kind(tmp_path, shape, kind, seed)
        with Engine(path) as engine:
            assert engine.info().activations == bits
    with pytest.raises(LlamaError, match="activations is 4, expected 8 or 16"):
        Engine(path, activations=4)
