"""llama/model.py, the network written to be read: it must be right, and stay readable.

That it agrees with transformers and the C engine is test_logits.py's; here are its parts against
other sources, and what its readers are promised.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch

from llama import model
from llama.config import Rope
from llama.engine import Engine, Model
from llama.format import read
from llama.model import Cache, Transformer
from llama.quant import Kind

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["embed", "attention_norm", "qkv", "rope", "store", "attend", "output", "ffn_norm",
         "gate_up", "down", "logits"]  # fmt: skip
SHAPE = small_models.config(
    vocab_size=61, dim=36, hidden_dim=50, head_dim=10, n_heads=6, n_kv_heads=3, n_layers=3,
    max_seq_len=64, tied=True,
)  # fmt: skip


def test_an_independent_forward_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """small_models.forward is numpy, with complex numbers for the rotation. Its frequencies are
    float64; model.py's are float32, as transformers has them, but for this once."""
    path = small_models.write_bin(tmp_path / "a.bin", SHAPE)
    tokens = np.random.default_rng(0).integers(0, 61, 40).tolist()
    right = small_models.forward(read(path), tokens)
    network = Transformer(path, torch.float64)
    pairs = torch.arange(SHAPE.head_dim // 2, dtype=torch.float64)
    exact = SHAPE.rope_theta ** (-2 * pairs / SHAPE.head_dim)
    monkeypatch.setattr(model, "rope_frequencies", lambda config, length: exact)
    ours = network.forward(tokens).numpy()
    assert np.abs(ours - right).max() <= 1e-12 * np.abs(right).max()


def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    network = Transformer(small_models.write_bin(tmp_path / "a.bin", SHAPE), torch.float64)
    tokens = np.random.default_rng(1).integers(0, 61, 30).tolist()
    whole, cache = network.forward(tokens), Cache(SHAPE.n_layers)
    parts = [network.forward(tokens[a:b], cache) for a, b in ((0, 1), (1, 9), (9, 10), (10, 30))]
    assert cache.length == 30
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_greedy_is_the_engines(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "a.bin", SHAPE)
    tokens = [5, 9]
    with Engine(path) as engine:
        for position in range(40):
            row = engine.forward(tokens[position : position + 1], [0], [position], [True])
            assert row is not None
            if position > 0:
                tokens.append(int(row.argmax()))
    assert Transformer(path).greedy([5, 9], 39) == tokens[2:]


def test_a_real_story(data: Path, stories: Path) -> None:
    known = json.loads((data / "reference" / "stories260K_greedy.json").read_text())
    ids = known["first_64_ids"]
    assert Transformer(stories).greedy([known["bos"]], len(ids)) == ids


@pytest.mark.parametrize("kind", list(Kind))
def test_weights_are_the_librarys(tmp_path: Path, kind: Kind) -> None:
    """Decoded without the C library, to the same bits."""
    path = small_models.of_kind(tmp_path, SHAPE, kind)
    weights = Transformer(path).weights
    with Model(path) as opened:
        for i, tensor in enumerate(opened.tensors):
            assert np.array_equal(weights[tensor.name].numpy(), opened.rows(i)), tensor.name


def test_rope_frequencies_are_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    for theta, numbers in ((5e5, (8.0, 1.0, 4.0, 8192.0)), (5e5, (32.0, 1.0, 4.0, 8192.0)),
                           (1e4, (2.0, 0.5, 3.0, 64.0))):  # fmt: skip
        shape = small_models.config(
            head_dim=128, dim=128, n_heads=1, n_kv_heads=1, rope_theta=theta,
            rope_scaling=Rope.LLAMA3, rope_numbers=numbers,
        )  # fmt: skip
        factor, low, high, original = numbers
        config = transformers.LlamaConfig(
            hidden_size=128, num_attention_heads=1, max_position_embeddings=99,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": theta, "factor": factor,
                "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            },
        )  # fmt: skip
        right, _ = functions["llama3"](config, "cpu")
        assert torch.equal(model.rope_frequencies(shape), right)


def test_the_steps_are_those_of_the_c_pass() -> None:
    """In forward.c and here, the same names in the same order."""
    source = inspect.getsource(Transformer.forward)
    places = [source.index(f"self.{step}(") for step in STEPS]
    assert places == sorted(places)
    c = (ROOT / "lib" / "cpu" / "forward.c").read_text()
    body = c[c.index("static int cpu_forward") :]
    body = body[: body.index("\n}")]
    assert [s for s in re.findall(r"\b(\w+)\(&p", body) if s in STEPS] == STEPS
    defined = [name for name in vars(Transformer) if name in STEPS]
    assert defined == STEPS  # and written down in that order


def test_it_needs_neither_library_nor_transformers(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "a.bin", SHAPE)
    code = (
        "import sys; from llama.model import Transformer; "
        f"Transformer({str(path)!r}).forward([1, 2]); "
        "print([m for m in ('llama._lib', 'cffi', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
    assert len(Path(model.__file__).read_text().splitlines()) < 260
