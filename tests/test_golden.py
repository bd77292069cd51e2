"""The golden answers that export.py stores in a file: they are the network's, and they fit."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models
from fake_engine import byte_tokenizer

from llama import format, golden, selftest
from llama.config import Config
from llama.engine import Engine
from llama.format import TokenizerKind

SHAPE = Config(
    vocab_size=260, dim=40, hidden_dim=51, head_dim=6, n_layers=4, n_heads=4, n_kv_heads=2,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def test_signs_are_splitmix64() -> None:
    """The generator's published first numbers from seed 0, and the plain arithmetic after them."""

    def number(i: int) -> int:
        z = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert [number(i) for i in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F
    ]  # fmt: skip
    signs = golden._signs(300)
    for j in range(golden.PROJECTIONS):
        assert [number(i) >> j & 1 for i in range(300)] == [int(s > 0) for s in signs[j]]


def test_the_answers_are_the_networks(tmp_path: Path) -> None:
    model = small_models.write_bin(
        tmp_path / "m.bin", SHAPE, golden=True, tokenizer=(TokenizerKind.JSON, byte_tokenizer())
    )
    with Engine(model, max_seq_len=1) as engine:
        found = golden.load(engine.meta, engine.config)
    assert found is not None
    bin = format.read(model)
    assert found.text == golden.PROMPT and len(found.layers) == 5
    assert list(found.ids) == [byte + 3 for byte in golden.PROMPT.encode()]
    expected = small_models.forward(bin, list(found.ids[: golden.POSITIONS]))[-1]
    assert list(found.top) == list(np.argsort(-expected, kind="stable")[: golden.TOP])
    for index, value in found.top.items():
        assert value == pytest.approx(expected[index], rel=1e-4, abs=1e-4)
    rows = bin.tensors["tok_embeddings.weight"][list(found.ids[: golden.POSITIONS])]
    first = found.layers[0]
    assert first.crc32 == zlib.crc32(rows.astype("<f4").tobytes())
    assert first.rms == pytest.approx(math.sqrt((rows[-1].astype(float) ** 2).mean()))
    again = golden.compute(model)
    assert selftest.difference(found, again, 0.0) is None and again.json() == found.json()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1])
def test_a_distance_is_about_the_true_one(size: float) -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(50):
        x, noise = rng.standard_normal((2, 3, 500)).astype(np.float32)
        y = (x + size * noise).astype(np.float32)
        signs = golden._signs(1500)
        told = golden._layer(x, signs).distance(golden._layer(y, signs))
        ratios.append(told / np.sqrt(((x - y) ** 2).mean() / (x**2).mean()))
    assert min(ratios) > 0.4 and max(ratios) < 2 and 0.8 < np.mean(ratios) < 1.2


@pytest.mark.parametrize("layers", [1, 120])
def test_there_is_room_for_the_longest_numbers(layers: int) -> None:
    shape = replace(SHAPE, n_layers=layers)
    layer = golden.Layer(2**32 - 1, 1.17549435e-38, (-1.17549435e-38,) * golden.PROJECTIONS)
    top = {2**24 - 1 - i: -1.17549435e-38 for i in range(golden.TOP)}
    most = golden.Golden(
        golden.PROMPT, (2**24 - 1,) * golden.MAX_IDS, golden.POSITIONS, (layer,) * (layers + 1),
        2**32 - 1, top, top,
    )  # fmt: skip
    assert len(most.json().encode()) <= len(golden.room(shape)) <= golden.MAX_BYTES
    assert len(golden.PROMPT.encode()) + 1 < golden.MAX_IDS
