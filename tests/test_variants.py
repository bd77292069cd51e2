"""Weights that stood on another 4-bit grid are met on it again; all others keep uneven levels."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from llama import format, variants
from llama.engine import Model
from llama.format import Config, Record, Writer
from llama.mixed import Goal, mix
from llama.quant import Kind
from llama.shrink import Calibrate, plan, shrink

SHAPE = Config(
    vocab_size=96, dim=64, hidden_dim=160, head_dim=16, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
FEW = Calibrate(tokens=64)


def write(path: Path, grid: str | None, dtype: Kind = Kind.F32, where: str = "layers.") -> Path:
    """Random weights, those of layers as gguf's own code has them after a kind of 4 bits."""
    rng = np.random.default_rng(1)
    records = [
        Record(name, dtype if len(size) == 2 else Kind.F32, size)
        for name, size in format.expected_tensors(SHAPE).items()
    ]
    with Writer(path, SHAPE, records) as writer:
        for record in records:
            values = rng.normal(0, 0.1, record.shape).astype(np.float32)
            if grid and where in record.name and "norm" not in record.name:
                kind = GGMLQuantizationType[grid]
                values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            writer.write(record.name, values)
    return path


def layers(path: Path) -> set[Kind]:
    return {record.kind for record in format.read(path).records.values()
            if record.name.startswith("layers.") and len(record.shape) == 2}  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "rotate", "wanted"),
    [
        (None, False, Kind.Q4), ("Q4_0", False, Kind.Q4E), ("Q4_1", False, Kind.Q4E),
        ("Q4_1", None, Kind.Q4E), ("Q4_1", True, Kind.Q4R), ("Q5_1", False, Kind.Q4),
    ],
)  # fmt: skip
def test_a_grid_is_found(
    tmp_path: Path, grid: str | None, rotate: bool | None, wanted: Kind
) -> None:
    source = write(tmp_path / "m.bin", grid)
    with Model(source) as model:
        found = variants.suited(rotate, model, plan(model.tensors, 4))
    for record in found:
        if len(record.shape) == 2:
            assert record.kind == (wanted if record.name.startswith("layers.") else Kind.Q8)


@pytest.mark.parametrize("calibrate", [None, FEW])
@pytest.mark.parametrize("dtype", [Kind.F32, Kind.F16])
def test_it_keeps_what_was_there(
    tmp_path: Path, dtype: Kind, calibrate: Calibrate | None
) -> None:
    """Of the error that uneven levels would leave, 7%, a quarter at most."""
    source, out = write(tmp_path / "m.bin", "Q4_1", dtype), tmp_path / "q.bin"
    receipt = shrink(source, out, 4, calibrate=calibrate)
    assert layers(out) == {Kind.Q4E}
    before, after = format.read(source).tensors, format.read(out).tensors
    for name in (name for name in before if name.startswith("layers.") and "norm" not in name):
        a, b = before[name].astype(np.float64), after[name]
        error = np.sqrt(((a - b) ** 2).sum() / (a**2).sum())
        assert error < 0.0225
        assert receipt.errors[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("rotate", [None, False])
def test_no_layer_mixes_them_with_rotated_ones(tmp_path: Path, rotate: bool | None) -> None:
    """As after Q4_K_M, which has some matrices in other kinds."""
    source, out = write(tmp_path / "m.bin", "Q4_1", where="attention.w"), tmp_path / "q.bin"
    shrink(source, out, 4, calibrate=FEW, rotate=rotate)
    assert layers(out) == {Kind.Q4, Kind.Q4E}
    shrink(source, out, 4, calibrate=FEW, rotate=True, force=True)
    assert layers(out) == {Kind.Q4R}


def test_again_nothing_moves(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin", "Q4_1")
    shrink(source, tmp_path / "a.bin", 4)
    shrink(tmp_path / "a.bin", tmp_path / "f.bin", 32)
    shrink(tmp_path / "f.bin", tmp_path / "b.bin", 4)
    a, b = format.read(tmp_path / "a.bin"), format.read(tmp_path / "b.bin")
    for name, record in a.records.items():
        if record.kind == Kind.Q4E:
            assert b.records[name].kind == Kind.Q4E
            error = np.square(a.tensors[name] - b.tensors[name]).sum()
            assert error <= 1e-5 * np.square(a.tensors[name]).sum()


def test_a_mixture_has_them_too(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin", "Q4_1")
    mix(source, tmp_path / "q.bin", Goal(size=105_000), calibrate=FEW)
    assert Kind.Q4E in layers(tmp_path / "q.bin")
    assert not {Kind.Q4, Kind.Q4R, Kind.Q8R} & layers(tmp_path / "q.bin")
