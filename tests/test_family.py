"""Each option of the Llama family that changes the numbers, on random small models of transformers.

transformers runs a prompt in one call and then, token by token, what is likeliest; the exported
model must give the same tokens and, at every position, the same logits. config.json is taken as
transformers 5 writes it, and as 4 did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from numpy.typing import NDArray

from llama import checkpoints
from llama.config import Config
from llama.engine import Engine
from llama.model import Cache, Transformer

pytest.importorskip("transformers")
F32 = NDArray[np.float32]
STEPS, SEEDS = 64, 20
OPTIONS: dict[str, dict[str, Any]] = {
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both biases": {"attention_bias": True, "mlp_bias": True},
}


def random_shape(rng: np.random.Generator, **changes: Any) -> Config:
    n_kv, group, half = (int(n) for n in rng.integers((1, 1, 2), (4, 4, 11)))
    return small_models.config(
        vocab_size=int(rng.integers(20, 60)), dim=n_kv * group * int(rng.integers(3, 9)),
        hidden_dim=int(rng.integers(5, 60)), head_dim=2 * half, n_layers=int(rng.integers(1, 3)),
        n_heads=n_kv * group, n_kv_heads=n_kv, max_seq_len=48, tied=bool(rng.integers(2)),
        rope_theta=float(rng.choice([500.0, 1e4, 5e5])), **changes,
    )  # fmt: skip


def as_transformers_4_wrote(file: Path, key: str) -> None:
    """config.json with rope_theta and rope_scaling, its kind under KEY ("type" or "rope_type")."""
    settings = json.loads(file.read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    settings["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    file.write_text(json.dumps(settings))


def reference(model: Any, prompt: list[int]) -> tuple[list[int], F32]:
    """PROMPT and STEPS tokens more, and the logits of each but the last."""
    with torch.inference_mode():
        out = model(torch.tensor([prompt]), use_cache=True)
        tokens, rows = list(prompt), [out.logits[0]]
        for _ in range(STEPS):
            tokens.append(int(rows[-1][-1].argmax()))
            if len(tokens) < len(prompt) + STEPS:
                out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
                rows.append(out.logits[0])
    return tokens, torch.cat(rows).numpy()


def far(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def run(engine: Engine, prompt: list[int], cuts: list[int]) -> tuple[list[int], F32]:
    """The same with the engine, the prompt in pieces that end at CUTS."""
    tokens, rows, start = list(prompt), [], 0
    for end in [*cuts, *range(len(prompt), len(prompt) + STEPS)]:
        n = end - start
        got = engine.forward(tokens[start:end], [3] * n, range(start, end), [True] * n)
        assert got is not None
        rows.append(got)
        start = end
        if end >= len(prompt):
            tokens.append(int(got[-1].argmax()))
    engine.trim(3, 0)
    return tokens, np.concatenate(rows)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_logits_and_greedy_tokens_are_transformers(tmp_path: Path, option: str) -> None:
    worst = 0.0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        shape = random_shape(rng, **OPTIONS[option])
        model = small_models.transformers_llama(shape, seed=seed)
        model.save_pretrained(tmp_path / "hf")
        if seed % 3:
            file = tmp_path / "hf" / "config.json"
            as_transformers_4_wrote(file, ["type", "rope_type"][seed % 2])
        path = tmp_path / f"{seed}.bin"
        checkpoints.export(tmp_path / "hf", path, say=lambda line: None)
        length = int(rng.integers(5, 100))
        prompt = rng.integers(0, shape.vocab_size, length).tolist()
        tokens, logits = reference(model, prompt)
        with Engine(path, threads=2, max_seq_len=256) as engine:
            found, ours = run(engine, prompt, [])
            assert found == tokens, seed
            worst = max(worst, far(ours, logits))
            cuts = sorted({int(n) for n in rng.integers(1, length, 3)})
            again, pieces = run(engine, prompt, cuts)
            assert again == tokens and np.array_equal(pieces, ours), (seed, cuts)
        network = Transformer(path)
        cache = Cache(shape.n_layers)
        parts = [network.forward(prompt, cache)]
        parts += [network.forward([token], cache) for token in tokens[length : length + 9]]
        assert far(torch.cat(parts).numpy(), logits[: length + 9]) <= 1e-4
    print(f"{option}: {worst:.1e}")
    assert worst <= 1e-4
