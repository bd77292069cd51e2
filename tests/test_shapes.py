"""Random models of real size: published shapes, valid blocks, ordinary numbers all the way."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from llama import shapes
from llama.config import Config, expected_tensors
from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import read
from llama.quant import Kind
from llama.shapes import SHAPES

SMALL = Config(
    vocab_size=300, dim=96, hidden_dim=160, head_dim=32, n_layers=3, n_heads=3, n_kv_heads=1,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"), [("7b", 6738.4), ("1b", 1100.0), ("135m", 134.5)]
)  # the parameters that their makers count
def test_sizes_are_the_published_ones(name: str, millions: float) -> None:
    counted = sum(int(np.prod(shape)) for shape in expected_tensors(SHAPES[name]).values())
    assert counted / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("tied", [False, True])
def test_numbers_stay_ordinary(tmp_path: Path, bits: int, tied: bool) -> None:
    """It opens; its weights have the sizes that training leaves and no zeros or subnormals as
    scales; logits are the float64 network's of the same weights, and differ from token to token."""
    path = tmp_path / "a.bin"
    shapes.write(path, replace(SMALL, tied=tied), bits)
    model = read(path)
    for name, weights in model.tensors.items():
        if weights.ndim == 2 and name != "tok_embeddings.weight":
            assert weights.std() * weights.shape[1] ** 0.5 == pytest.approx(1, abs=0.1), name
            assert abs(weights.mean()) < 0.05 * weights.std()
    kind = {4: Kind.Q4, 8: Kind.Q8, 16: Kind.F16, 32: Kind.F32}[bits]
    first = "tok_embeddings.weight"
    for record in model.records.values():
        edge = bits == 4 and record.name in (first, "output.weight")
        expected = Kind.Q8 if edge else kind if len(record.shape) == 2 else Kind.F32
        assert record.kind == expected
    ids = [5, 90, 7, 7, 200, 31]
    with Engine(path, kv="f32") as engine:
        engine.model.verify(1)
        logits = engine.forward(ids, [0] * 6, range(6), [True] * 6)
    assert logits is not None and np.isfinite(logits).all()
    assert 0.3 < logits.std() < 10 and len(set(logits.argmax(-1))) > 2
    theirs = small_models.forward(model, ids)
    error = np.sqrt(np.mean((logits - theirs) ** 2)) / theirs.std()
    assert error < (1e-4 if bits > 8 else 1e-2)


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "135m", SMALL)
    made = shapes.random_model("135m", 8, tmp_path / "deep" / "er")
    before = made.stat().st_mtime_ns, made.read_bytes()
    assert shapes.random_model("135m", 8, tmp_path / "deep" / "er") == made
    assert (made.stat().st_mtime_ns, made.read_bytes()) == before
    assert [p.name for p in made.parent.iterdir()] == ["135m-8.bin"]
    again = shapes.random_model("135m", 8, tmp_path)
    assert again.read_bytes() == before[1]


def test_a_small_disk_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12345))
    with pytest.raises(LlamaError, match=r"7b-8.bin: needs 7,\d{3},\d{3},\d{3} bytes of disk, 12,"):
        shapes.random_model("7b", 8, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(LlamaError, match="file: cannot make this folder: File exists"):
        shapes.random_model("7b", 8, tmp_path / "file")


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (8, "Q8_0")])
def test_rows_for_ggml_are_blocks_of_it(bits: int, name: str) -> None:
    parts = list(shapes.gguf_rows(np.random.default_rng(0), bits, 700, 256))
    data: Any = np.concatenate(parts)
    values = dequantize(data, GGMLQuantizationType[name])
    assert values.shape == (700, 256) and values.std() * 16 == pytest.approx(1, abs=0.1)
    assert abs(values.mean()) < 0.02 * values.std()
