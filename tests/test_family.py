"""Each option of the Llama family that changes the numbers, on random small models of transformers.

transformers runs a prompt in one call and then, token by token, what is likeliest; the exported
model must give the same tokens and, at every position, the same logits. config.json is taken as
transformers 5 writes it, and as 4 did.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from numpy.typing import NDArray

from llama import Llama, SamplingParams, checkpoints
from llama import model as plain
from llama.checkpoints import hf
from llama.checkpoints.settings import Settings
from llama.config import Config
from llama.engine import Engine
from llama.errors import LlamaError
from llama.model import Cache, Transformer

transformers = pytest.importorskip("transformers")
F32 = NDArray[np.float32]
STEPS, SEEDS = 64, 20
LENGTH = 48  # max_position_embeddings; prompts go beyond it, and what follows does always
BIASES = {
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both biases": {"attention_bias": True, "mlp_bias": True},
}
ROPES = ["linear", "llama3", "yarn", "dynamic"]
pytestmark = pytest.mark.usefixtures("one_thread")


def random_rope(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """rope_parameters of KIND, those that may be left out sometimes there."""
    rope: dict[str, Any] = {"rope_type": kind, "factor": float(rng.choice([1.5, 2.0, 3.7, 8.0]))}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0]))}
        rope["original_max_position_embeddings"] = int(rng.integers(12, LENGTH))
    if kind == "yarn":
        several: list[dict[str, Any]] = [
            {"original_max_position_embeddings": int(rng.integers(12, LENGTH))},
            {"beta_fast": 16, "beta_slow": 2.5},
            {"attention_factor": 0.8},
            {"mscale": 0.7, "mscale_all_dim": 1.3},
            {"mscale": 0.7},
            {"truncate": False},
        ]
        for some in several:
            if rng.integers(2):
                rope |= some
    return rope


def random_shape(rng: np.random.Generator, **changes: Any) -> Config:
    n_kv, group, half = (int(n) for n in rng.integers((1, 1, 2), (4, 4, 11)))
    return small_models.config(
        vocab_size=int(rng.integers(20, 60)), dim=n_kv * group * int(rng.integers(3, 9)),
        hidden_dim=int(rng.integers(5, 60)), head_dim=2 * half, n_layers=int(rng.integers(1, 3)),
        n_heads=n_kv * group, n_kv_heads=n_kv, max_seq_len=LENGTH, tied=bool(rng.integers(2)),
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
        got = engine.forward(
            tokens[start:end], [3] * n, range(start, end), [True] * n,
            rope_lengths=[len(prompt)] * n,
        )  # fmt: skip
        assert got is not None
        rows.append(got)
        start = end
        if end >= len(prompt):
            tokens.append(int(got[-1].argmax()))
    engine.trim(3, 0)
    return tokens, np.concatenate(rows)


@pytest.mark.parametrize("option", [*BIASES, *ROPES])
@pytest.mark.filterwarnings("ignore")
def test_logits_and_greedy_tokens_are_transformers(tmp_path: Path, option: str) -> None:
    worst = 0.0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        shape = random_shape(rng, **BIASES.get(option, {}))
        rope = random_rope(option, rng) if option in ROPES else None
        model = small_models.transformers_llama(shape, seed=seed, rope=rope)
        model.save_pretrained(tmp_path / "hf")
        if seed % 3:
            file = tmp_path / "hf" / "config.json"
            as_transformers_4_wrote(file, ["type", "rope_type"][seed % 2])
        path = tmp_path / f"{seed}.bin"
        checkpoints.export(tmp_path / "hf", path, say=lambda line: None)
        length = int(rng.integers(5, 100))
        prompt = rng.integers(0, shape.vocab_size, length).tolist()
        tokens, logits = reference(model, prompt)
        with Engine(path, threads=1, max_seq_len=256) as engine:
            found, ours = run(engine, prompt, [])
            assert found == tokens, seed
            worst = max(worst, far(ours, logits))
            cuts = sorted({int(n) for n in rng.integers(1, length, 3)})
            again, pieces = run(engine, prompt, cuts)
            assert again == tokens and np.array_equal(pieces, ours), (seed, cuts)
        network = Transformer(path)
        cache = Cache(shape.n_layers)
        cut = int(rng.integers(1, length))
        parts = [network.forward(prompt[a:b], cache, length) for a, b in ((0, cut), (cut, length))]
        parts += [network.forward([token], cache) for token in tokens[length : length + 9]]
        assert far(torch.cat(parts).numpy(), logits[: length + 9]) <= 1e-4
    print(f"{option}: {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parametrize("kind", ROPES)
def test_logits_far_out(tmp_path: Path, kind: str) -> None:
    """A prompt of 4,000 tokens, some 80 times the original length."""
    rng = np.random.default_rng(5)
    shape = small_models.config(max_seq_len=LENGTH, dim=12, n_heads=2, n_kv_heads=1, head_dim=16)
    model = small_models.transformers_llama(shape, seed=5, rope=random_rope(kind, rng))
    model.save_pretrained(tmp_path / "hf")
    checkpoints.export(tmp_path / "hf", tmp_path / "a.bin", say=lambda line: None)
    n = 4000
    tokens = rng.integers(0, shape.vocab_size, n).tolist()
    with torch.inference_mode():
        right = model(torch.tensor([tokens]), logits_to_keep=50).logits[0].numpy()
    with Engine(tmp_path / "a.bin", max_seq_len=n) as engine:
        want = [False] * (n - 50) + [True] * 50
        got = engine.forward(tokens, [0] * n, range(n), want, rope_lengths=[n] * n)
    assert far(got, right) <= 1e-4


# --- dynamic scaling: the prompt's length counts, nothing else does


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model whose base grows beyond 48 tokens, and transformers' own."""
    folder = tmp_path_factory.mktemp("dynamic")
    shape = small_models.config(vocab_size=97, max_seq_len=LENGTH, head_dim=16)
    rope = {"rope_type": "dynamic", "factor": 4.0}
    model = small_models.transformers_llama(shape, seed=3, rope=rope)
    model.save_pretrained(folder / "hf")
    checkpoints.export(folder / "hf", folder / "a.bin", say=lambda line: None)
    return folder / "a.bin", model


def fresh(model: Any) -> Any:
    """The model with a rotary module that has seen nothing yet."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def test_dynamic_is_the_same_in_any_company(dynamic: tuple[Path, Any]) -> None:
    """Three prompts of other lengths in one batch, mixed pieces, with any number of threads."""
    path, model = dynamic
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, n).tolist() for n in (30, 60, 100)]
    right = [reference(fresh(model), prompt) for prompt in prompts]
    seen: list[list[F32]] = []
    for threads in (1, 3):
        with Engine(path, threads=threads, max_seq_len=256) as engine:
            at, rows = [0, 0, 0], [[], [], []]  # type: list[int], list[list[Any]]
            while any(at[s] < len(right[s][0]) - 1 for s in range(3)):
                step: list[tuple[int, int, int, int]] = []
                for s in range(3):
                    left = len(prompts[s]) - at[s]
                    n = min(int(rng.integers(1, 40)), left) if left > 0 else 1
                    n = min(n, len(right[s][0]) - 1 - at[s])
                    places = range(at[s], at[s] + n)
                    step += [(right[s][0][i], s, i, len(prompts[s])) for i in places]
                    at[s] += n
                tokens, sequences, positions, lengths = zip(*step, strict=True)
                got = engine.forward(
                    tokens, sequences, positions, [True] * len(step), rope_lengths=lengths
                )
                assert got is not None
                for row, s in zip(got, sequences, strict=True):
                    rows[s].append(row)
            seen.append([np.array(r) for r in rows])
            alone = [run(engine, prompt, []) for prompt in prompts]
        for s in range(3):
            assert alone[s][0] == right[s][0] and far(seen[-1][s], right[s][1]) <= 1e-4
            assert np.array_equal(alone[s][1], seen[-1][s])
    assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))


def test_dynamic_needs_the_prompts_length(dynamic: tuple[Path, Any]) -> None:
    """Without it a prompt's pieces would each have a base of their own: far other numbers."""
    path, model = dynamic
    prompt = np.random.default_rng(1).integers(0, 97, 100).tolist()
    _, right = reference(fresh(model), prompt)
    with Engine(path, max_seq_len=256) as engine:
        got = engine.forward(prompt, [0] * 100, range(100), [True] * 100)
        assert far(got, right[:100]) > 1e-2
        engine.trim(0, 0)
        for bad in (-1, 257, 2**40):
            with pytest.raises(LlamaError, match="rope length .*, expected 0 to 256"):
                engine.forward([1], [0], [0], rope_lengths=[bad])
        with pytest.raises(LlamaError, match="2 rope lengths"):
            engine.forward([1], [0], [0], rope_lengths=[1, 1])
        assert engine.length(0) == 0


def test_dynamic_prompts_share_only_what_is_alike(dynamic: tuple[Path, Any]) -> None:
    """Beginnings computed for a prompt of another length are not taken over."""
    path, model = dynamic
    rng = np.random.default_rng(2)
    trunk = rng.integers(0, 97, 120).tolist()
    greedy = SamplingParams(temperature=0.0, max_tokens=STEPS)
    prompts = [trunk[:40], trunk[:44], trunk[:90], trunk, trunk, trunk[:80] + trunk[:40]]
    right = [reference(fresh(model), prompt)[0][len(prompt) :] for prompt in prompts]
    with Llama(path, max_seq_len=256) as llm:
        cached = []
        for prompt, wanted in zip(prompts, right, strict=True):
            out = llm.generate(prompt, greedy)
            cached.append(out.cached_tokens)
            assert out.token_ids == wanted
        assert cached == [0, 40, 0, 0, 119, 80]
        together = llm.generate(prompts, greedy)
        assert [out.token_ids for out in together] == right
        logits = llm.logits(trunk)
    with torch.inference_mode():
        assert far(logits, fresh(model)(torch.tensor([trunk])).logits[0].numpy()) <= 1e-4


# --- the angles themselves, far out


@pytest.fixture(scope="module")
def rope_c(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """lib/rope.c by itself, with its own ffi."""
    from llama._lib import ROOT, ffi

    out = tmp_path_factory.mktemp("rope") / "rope.so"
    flags = ["-std=c11", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'lib'}"]
    subprocess.run(["cc", *flags, ROOT / "lib" / "rope.c", "-o", out, "-lm"], check=True)
    own = type(ffi)()
    own.include(ffi)
    header = (ROOT / "lib" / "rope.h").read_text()
    own.cdef(re.sub(r"(?m)^#.*$", "", header))
    return own, own.dlopen(str(out))


FAR = [0, 1, 2, 47, 48, 49, 1000, 4097, 8191, 16384, 32769, 65535, 99_999, 100_000]


@pytest.mark.parametrize("kind", ["default", *ROPES])
@pytest.mark.filterwarnings("ignore")
def test_angles_to_position_100000(tmp_path: Path, rope_c: tuple[Any, Any], kind: str) -> None:
    """The frequencies are transformers' but for a last bit of pow here and there; cos and sin are
    as near as that lets them be."""
    ffi, lib = rope_c
    same = total = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        half, length = int(rng.choice([2, 13, 32, 40, 64])), int(rng.choice([LENGTH, 4096, 8192]))
        theta = float(rng.choice([500.0, 1e4, 5e5, 1e6]))
        rope = {"rope_type": "default"} if kind == "default" else random_rope(kind, rng)
        settings = small_models.hf_settings(
            small_models.config(head_dim=2 * half, max_seq_len=length),
            rope_parameters={**rope, "rope_theta": theta}, pad_token_id=None,
        )  # fmt: skip
        for old in ("rope_theta", "rope_scaling"):
            settings.pop(old)
        theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
            transformers.LlamaConfig(**settings)
        )
        (tmp_path / "config.json").write_text(json.dumps(settings))
        config = hf.config_of(Settings.read(tmp_path / "config.json"))
        c = ffi.new("llama_config *")
        c.head_dim, c.rope_theta, c.rope_scaling = 2 * half, theta, int(config.rope_scaling)
        c.rope_numbers[0 : len(config.rope_numbers)] = config.rope_numbers
        frequencies, cos, sin = (np.empty(half, np.float32) for _ in range(3))
        at = [ffi.from_buffer("float[]", array) for array in (frequencies, cos, sin)]
        scale = theirs.attention_scaling
        for position in FAR:
            with torch.inference_mode():
                both = theirs(torch.zeros(1), torch.tensor([[position]]))
            right = theirs.inv_freq.numpy()
            lib.rope_frequencies(c, lib.rope_length(c, 0, position), at[0])
            assert np.all(np.abs(frequencies - right) <= 2.5e-7 * right)
            same, total = same + int((frequencies == right).sum()), total + half
            lib.rope_angles(c, at[0], position, at[1], at[2])
            twin = plain.rope_angles(config, torch.tensor([position]), position + 1)
            assert np.array_equal(plain.rope_frequencies(config, position + 1).numpy(), right)
            bound = 3e-7 * scale + np.abs(frequencies - right) * position * scale
            bound += (frequencies != right) * position * right * 1.3e-7 * scale  # two products'
            for ours, plainly, his in zip((cos, sin), twin, both, strict=True):
                wanted = his[0, 0, :half].numpy()
                assert np.all(np.abs(ours - wanted) <= bound), (seed, position)
                assert np.array_equal(plainly[0].numpy(), wanted), (seed, position)
    print(f"{kind}: {same} of {total} frequencies are the same to the last bit")
    assert same >= 0.97 * total
