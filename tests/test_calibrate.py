"""Calibration: moments and their factor against numpy, inputs against transformers, feedback
against LDLQ as its paper writes it, and files that are nearer to their source for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import SHAPE, command, write

from llama import checkpoints, format
from llama.calibrate import DAMPING, Calibration, hold_out, texts_of
from llama.config import Config, Head, Rope
from llama.distance import Deviation, Distance, measure
from llama.engine import Model
from llama.errors import LlamaError
from llama.quant import HADAMARD, Kind, matrix_bytes, tile, untile
from llama.receipt import read_receipt
from llama.shrink import Calibrate, Encoder, shrink
from llama.stages import add_moments, aligned, factor_moments

Matrix = np.ndarray
RNG = np.random.default_rng


def inputs(n: int, columns: int, seed: int = 0) -> Matrix:
    """Correlated, and of very different sizes, as real ones are."""
    rng = RNG(seed)
    mix = rng.normal(size=(columns, columns)) + 2 * rng.normal(size=(columns, 1))
    sizes = np.exp(rng.normal(size=columns))
    return (rng.normal(size=(n, columns)) @ mix * sizes).astype(np.float32)


def moments_of(x: Matrix) -> Matrix:
    moments = np.zeros((x.shape[1],) * 2, np.float32)
    add_moments(moments, x)
    return moments


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (3, 100), (300, 70), (129, 257)])
def test_moments(n: int, columns: int) -> None:
    x = inputs(n, columns)
    moments = moments_of(x)
    add_moments(moments, x[: n // 2])  # in two goes
    wide = x.astype(np.float64)
    right = wide.T @ wide + wide[: n // 2].T @ wide[: n // 2]
    assert np.abs(np.tril(moments - right)).max() < 1e-5 * np.abs(right).max()
    assert not np.triu(moments, 1).any()


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_factor(columns: int) -> None:
    """F^T D F is the damped moments; the columns of no inputs at all are on their own."""
    x = inputs(2 * columns, columns)
    x[:, columns // 2] = 0
    factor = moments_of(x)
    damped = x.astype(np.float64).T @ x
    damped += (0.01 * np.diag(damped).mean() or 1) * np.eye(columns)
    factor_moments(factor, 0.01)
    f = np.tril(factor, -1).astype(np.float64) + np.eye(columns)
    assert np.abs(f.T * np.diag(factor) @ f - damped).max() < 1e-5 * np.abs(damped).max()
    alone = columns // 2
    assert not f[alone, :alone].any() and not f[alone + 1 :, alone].any()


def test_bad_moments() -> None:
    for value in (np.nan, np.inf, -1e9):
        moments = moments_of(inputs(200, 100))
        moments[70, 70] = value
        with pytest.raises(LlamaError, match="moments"):
            factor_moments(moments, 0.01)
    with pytest.raises(LlamaError, match="damping is 2"):
        factor_moments(moments, 2.0)


def test_moments_for_any_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        moments = np.zeros((333, 333), np.float32)
        add_moments(moments, inputs(200, 333), threads)
        before = moments.copy()
        factor_moments(moments, 0.01, threads)
        found.append(before.tobytes() + moments.tobytes())
    assert found[0] == found[1] == found[2]


# --- feedback


class One:
    """A model file whose output matrix is WEIGHTS; encodes it."""

    def __init__(self, folder: Path, weights: Matrix) -> None:
        rows, columns = weights.shape
        shape = Config(rows, columns, 16, 2, 1, 1, 1, 8, 1e-5, 1e4)
        self.model = Model(write(folder / "m.bin", shape, output_weight=weights))
        self.index = [t.name for t in self.model.tensors].index("output.weight")
        self.shape = rows, columns

    def encode(self, factor: Matrix | None, threads: int | None = None) -> tuple[bytes, Matrix]:
        size = matrix_bytes(Kind.Q4, *self.shape)
        blocks, _ = self.model.quantize(
            self.index, 0, self.shape[0], Kind.Q4, size, threads, factor
        )
        data = np.frombuffer(bytes(blocks), np.uint8)
        return bytes(blocks), untile(data, Kind.Q4, *self.shape)


def codes_and_scales(blocks: bytes, rows: int, columns: int) -> tuple[Matrix, Matrix, Matrix]:
    """Of each weight, from docs/format.md: what is stored, its group's scale and its shift."""
    data = np.frombuffer(blocks, np.uint8).reshape(-(-rows // 16), -1, 288)
    d = np.ascontiguousarray(data[:, :, :32]).view("<u2")  # (strips, groups, 16)
    scale = (d & 0xFFC0).view("<f2").astype(np.float64) / 64
    shift = 2.0 * ((d & 63).astype(np.int64) - 32)

    def spread(x: Matrix) -> Matrix:
        by_row = x.transpose(0, 2, 1).reshape(-1, x.shape[1])
        return np.repeat(by_row, 32, axis=1)[:rows, :columns]

    values = untile(np.frombuffer(blocks, np.uint8), Kind.Q4, rows, columns)
    return values.astype(np.float64), spread(scale), spread(shift)


LEVELS = np.array([-127, -101, -80, -63, -48, -34, -22, -10, 2, 13, 26, 38, 53, 68, 85, 107])


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (37, 100), (70, 130)])
def test_feedback_is_ldlq(tmp_path: Path, rows: int, columns: int) -> None:
    """arXiv:2307.13304, equation 2, in float64: with the scales and shifts that were chosen, each
    weight is the level nearest to what the paper asks for, where no other is as near."""
    weights = RNG(1).normal(0, 0.1, (rows, columns)).astype(np.float32)
    factor = moments_of(inputs(3 * columns, columns))
    damped = np.tril(factor).astype(np.float64)
    damped += np.tril(damped, -1).T
    damped += 0.01 * np.diag(damped).mean() * np.eye(columns)
    factor_moments(factor, 0.01)
    found, scale, shift = codes_and_scales(One(tmp_path, weights).encode(factor)[0], rows, columns)
    # H = (U + I) D (U + I)^T by numpy: the Cholesky factor of H with both axes turned about
    lower = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    upper = lower / np.diag(lower) - np.eye(columns)
    near = 0
    for k in range(columns):
        asked = weights[:, k] + (weights[:, :k] - found[:, :k]) @ upper[:k, k]
        choices = scale[:, k, None] * (LEVELS + shift[:, k, None])
        distance = np.abs(choices - asked[:, None])
        ours = np.abs(found[:, k] - asked)
        best = distance.min(axis=1)
        assert (ours <= best + 1e-3 * np.abs(scale[:, k]) * 16).all()
        near += int((ours > best + 1e-12).sum())
    assert near < rows * columns / 500  # ties, decided by float32


def weighted(error: Matrix, x: Matrix) -> float:
    return float(np.square(error.astype(np.float64) @ x.T).sum())


@pytest.mark.parametrize("seed", range(4))
def test_products_lose_less(tmp_path: Path, seed: int) -> None:
    """On correlated inputs, those it learned from and fresh ones alike."""
    weights = RNG(seed).normal(0, 0.1, (64, 96)).astype(np.float32)
    x = inputs(2000, 96, seed)
    learned, fresh = x[:1000], x[1000:]
    factor = moments_of(learned)
    factor_moments(factor, 0.01)
    one = One(tmp_path, weights)
    plain, fed = one.encode(None)[1] - weights, one.encode(factor)[1] - weights
    assert weighted(fed, learned) < 0.7 * weighted(plain, learned)
    assert weighted(fed, fresh) < 0.8 * weighted(plain, fresh)


def test_blocks_for_any_threads_and_chunks(tmp_path: Path) -> None:
    weights = RNG(0).normal(0, 0.1, (150, 70)).astype(np.float32)
    factor = moments_of(inputs(200, 70))
    factor_moments(factor, 0.01)
    one = One(tmp_path, weights)
    whole = one.encode(factor, 1)[0]
    assert whole == one.encode(factor, 2)[0] == one.encode(factor, 3)[0]
    parts = b""
    for first in range(0, 150, 16):
        n = min(16, 150 - first)
        size = matrix_bytes(Kind.Q4, n, 70)
        parts += one.model.quantize(one.index, first, n, Kind.Q4, size, None, factor)[0]
    assert parts == whole


def test_rotated_moments() -> None:
    """Those of inputs that numpy turned; half a group cannot be turned."""
    x = inputs(300, 96)
    turned = (x.reshape(-1, 32).astype(np.float64) @ HADAMARD / 4).reshape(x.shape)
    moments = np.zeros((96, 96), np.float32)
    add_moments(moments, x, rotated=True)
    expected = np.tril(turned.T @ turned)
    assert np.abs(np.tril(moments) - expected).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(LlamaError, match="80 columns are no whole groups of 32"):
        add_moments(np.zeros((80, 80), np.float32), inputs(10, 80), rotated=True)


def test_the_head_is_not_turned_with_the_layers(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin", replace(SHAPE, dim=64, head_dim=16))
    found = []
    for rotated in (False, True):
        with Calibration(source, [[5, 3, 8, 1, 7], [2, 9]], rotated=rotated) as calibration:
            encoder = Encoder(calibration.engine.model, None, lambda n: None)
            for _ in range(calibration.n_layers):
                calibration.layer(lambda name, *_: encoder.whole(name, Kind.F32))  # noqa: B023
            found += [calibration.head()[0], calibration.head(rotated=True)[0]]
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])
    assert not np.array_equal(found[0], found[1])


def test_rotated_feedback_is_that_of_rotated_weights(tmp_path: Path) -> None:
    """Weights that numpy turned, in q4, are the same blocks as the weights in q4r."""
    weights = RNG(1).integers(-99, 99, (40, 96)).astype(np.float32) / 512  # exact when turned
    turned = (weights.reshape(-1, 32) @ HADAMARD / 8).reshape(weights.shape)
    factor = np.zeros((96, 96), np.float32)
    add_moments(factor, inputs(300, 96), rotated=True)
    factor_moments(factor, 0.01)
    blocks = []
    for name, rows, kind in (("a", weights, Kind.Q4R), ("b", turned, Kind.Q4)):
        (tmp_path / name).mkdir()
        one = One(tmp_path / name, rows)
        data, loss = one.model.quantize(one.index, 0, 40, kind, matrix_bytes(kind, 40, 96), 2,
                                        factor)  # fmt: skip
        values = untile(np.frombuffer(bytes(data), np.uint8), kind, 40, 96)
        error = values.astype(np.float64) - rows
        assert loss.max_error == pytest.approx(np.abs(error).max(), rel=1e-4)
        assert loss.sum_squared_error == pytest.approx(np.square(error).sum(), rel=1e-4)
        blocks.append(bytes(data))
    assert blocks[0] == blocks[1]


def test_factor_of_another_size(tmp_path: Path) -> None:
    one = One(tmp_path, np.zeros((16, 32), np.float32))
    with pytest.raises(LlamaError, match="a factor of 32 columns"):
        one.encode(np.eye(31, dtype=np.float32))


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0.0, 1e4, -1e4, 1e-40, 65504.0, 0.3]), min_size=1, max_size=6),
    st.sampled_from([0.0, 1e-21, 1e-17, 1e-6, 1.0, 1e6, 1e15]),
)
def test_odd_weights(odd: list[float], size: float) -> None:
    """Outliers, zero rows, subnormals, columns that get no inputs: finite, and zeros stay."""
    import tempfile

    weights = RNG(0).normal(0, 0.1, (16, 64)).astype(np.float32)
    weights[: len(odd), 5] = odd
    weights[9] = 0
    x = size * inputs(100, 64)
    x[:, 32:] = 0
    factor = moments_of(x)
    factor_moments(factor, 0.01)
    with tempfile.TemporaryDirectory() as folder:
        found = One(Path(folder), weights).encode(factor)[1]
    assert np.isfinite(found).all() and not found[9].any()
    most = np.abs(weights).max(axis=1, keepdims=True)
    assert (np.abs(found[:, 32:] - weights[:, 32:]) <= 0.3 * np.abs(weights[:, 32:]).max()).all()
    assert (np.abs(found) <= 4 * most).all()


# --- the model's inputs


THEIRS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip


class Same:
    """Gives a layer its own matrices back, as blocks of f32, and keeps the moments it is shown."""

    def __init__(self, path: Path) -> None:
        self.tensors = format.read(path).tensors
        self.moments: dict[str, Matrix] = {}

    def __call__(self, name: str, factor: Matrix, inputs: Matrix) -> tuple[Kind, Matrix]:
        self.moments[name] = product(factor)
        data = tile(self.tensors[name], Kind.F32).reshape(-1).view(np.uint8)
        blocks = aligned(data.size)
        blocks[:] = data
        return Kind.F32, blocks


def product(factor: Matrix) -> Matrix:
    f = np.tril(factor, -1).astype(np.float64) + np.eye(len(factor))
    return f.T * np.diag(factor) @ f


@pytest.mark.parametrize("shape", [
    small_models.config(),
    small_models.config(n_kv_heads=2, attention_bias=True, mlp_bias=True, tied=True,
                        rope_scaling=Rope.DYNAMIC, rope_numbers=(2.0, 16.0)),
])  # fmt: skip
def test_inputs_are_those_of_transformers(tmp_path: Path, shape: Config) -> None:
    """The moments of every matrix's inputs, by hooks on another's model, over three texts."""
    torch = pytest.importorskip("torch")
    theirs = small_models.transformers_llama(shape)
    theirs.save_pretrained(tmp_path / "hf")
    checkpoints.export(tmp_path / "hf", tmp_path / "m.bin")
    texts = [list(map(int, RNG(i).integers(0, shape.vocab_size, n))) for i, n in
             enumerate((32, 5, 19))]  # fmt: skip
    seen: dict[str, Matrix] = {}

    def hook(name: str) -> Any:
        def add(_: Any, given: Any) -> None:
            x = given[0].reshape(-1, given[0].shape[-1]).double().numpy()
            seen[name] = seen.get(name, 0) + x.T @ x

        return add

    for number, layer in enumerate(theirs.model.layers):
        for ours, name in THEIRS.items():
            part = layer.get_submodule(name)
            part.register_forward_pre_hook(hook(f"layers.{number}.{ours}.weight"))
    theirs.lm_head.register_forward_pre_hook(hook("output.weight"))
    with torch.no_grad():
        for text in texts:
            theirs(torch.tensor([text]), use_cache=False)
    same = Same(tmp_path / "m.bin")
    with Calibration(tmp_path / "m.bin", texts) as calibration:
        for _ in range(shape.n_layers):
            calibration.layer(same)
        same.moments["output.weight"] = product(calibration.head()[0])
    assert same.moments.keys() == seen.keys()
    for name, right in seen.items():
        right += DAMPING * np.diag(right).mean() * np.eye(len(right))
        assert np.abs(same.moments[name] - right).max() < 1e-4 * np.abs(right).max(), name


def test_encoded_matrices_are_used(tmp_path: Path) -> None:
    """With wo and w2 all zeros a layer adds nothing: the head reads the embeddings, normed."""
    path = small_models.write_bin(tmp_path / "m.bin", small_models.config())
    same = Same(path)
    for name in list(same.tensors):
        if name.endswith(("wo.weight", "w2.weight")):
            same.tensors = {**same.tensors, name: np.zeros_like(same.tensors[name])}
    text = list(range(20))
    with Calibration(path, [text]) as calibration:
        for _ in range(2):
            calibration.layer(same)
        found = product(calibration.head()[0])
    x = same.tensors["tok_embeddings.weight"][text].astype(np.float64)
    x *= same.tensors["norm.weight"] / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5)
    right = x.T @ x
    right += DAMPING * np.diag(right).mean() * np.eye(len(right))
    assert np.abs(found - right).max() < 1e-5 * np.abs(right).max()


@pytest.mark.parametrize(
    ("name", "shape", "place", "says"),
    [
        ("layers.1.ffn_norm.weight", (40,), (7,), r"weight \(7\) is nan"),
        ("layers.1.feed_forward.w2.weight", (40, 51), (7, 9), r"weight \(7, 9\) is nan"),
        ("tok_embeddings.weight", (45, 40), (44, 39), r"weight \(44, 39\) is nan"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], place: tuple[int, ...], says: str
) -> None:
    """Also where the model cannot even write its texts for them."""
    bad = np.zeros(shape, np.float32)
    bad[place] = np.nan
    source = write(tmp_path / "m.bin", **{name.replace(".", "_"): bad})
    with pytest.raises(LlamaError, match=re.escape(name) + ": " + says):
        shrink(source, tmp_path / "q.bin", 4, calibrate=SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin"]


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """Of texts from a file, the matrix whose inputs a norm spoils says so."""
    bad = np.full(40, np.inf, np.float32)
    source = write(tmp_path / "m.bin", layers_1_ffn_norm_weight=bad)
    same = Same(source)
    with Calibration(source, [[1, 2, 3]]) as calibration:
        calibration.layer(same)
        with pytest.raises(LlamaError, match=r"layers\.1\.feed_forward\.w1\.weight: .* not finite"):
            calibration.layer(same)


# --- texts


def test_texts_that_the_model_writes(tmp_path: Path) -> None:
    """As many as asked for, each from the begin token, not beyond the context nor an end token,
    and the same ones for any number of threads."""
    path = small_models.write_bin(tmp_path / "m.bin", small_models.config(bos_id=3, eos_ids=(5, 6)))
    texts = texts_of(path, 3000, threads=1)
    assert texts == texts_of(path, 3000, threads=3)
    assert 3000 <= sum(map(len, texts)) < 3100
    assert all(text[0] == 3 and len(text) <= 32 for text in texts)
    assert not any({5, 6} & set(text[1:-1]) for text in texts)
    drawn = np.bincount([token for text in texts for token in text[1:]], minlength=44)
    assert (drawn > 0).all() and len({tuple(text) for text in texts}) > 0.9 * len(texts)


def test_texts_of_a_file(stories: Path, tmp_path: Path) -> None:
    """A short file whole; of a long one pieces from beginning to end."""
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a cat. " * 20)
    short = texts_of(stories, 4096, file)
    assert len(short) == 1 and short[0][0] == 1 and 100 < len(short[0]) < 512
    file.write_text("a cat. " * 20000 + "One dog! " * 15000)
    long = texts_of(stories, 2048, file)
    assert [len(text) for text in long] == [512] * 4
    used = [{*text} for text in long]
    assert len(used[0] ^ used[1]) < 3 < len(used[0] ^ used[3])
    assert all(text[0] == 1 for text in long)
    file.write_text("")
    with pytest.raises(LlamaError, match=r"text\.txt: there is no text"):
        texts_of(stories, 2048, file)
    with pytest.raises(LlamaError, match="nothing: cannot read"):
        texts_of(stories, 2048, tmp_path / "nothing")


@pytest.mark.parametrize("lengths", [[2], [40], [512, 512], [30] * 50])
def test_what_is_held_out(lengths: list[int]) -> None:
    texts = [[i] * n for i, n in enumerate(lengths)]
    kept, out = hold_out(texts)
    assert sum(map(len, kept)) + sum(map(len, out)) == sum(lengths)
    assert all(kept) and all(out) and sum(map(len, out)) * 16 >= sum(lengths) - 16


# --- files


SHORT = Calibrate(tokens=300)


@pytest.mark.parametrize("head", [Head.LM, Head.NONE, Head.SEQUENCE])
def test_any_head(
    stories: Path, tmp_path: Path, head: Head, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that writes no texts, nor has a tokenizer to read one, is told so and rounded."""
    labels = 3 if head == Head.SEQUENCE else 0
    source = write(tmp_path / "m.bin", replace(SHAPE, head=head, n_labels=labels))
    receipt = shrink(source, tmp_path / "q.bin", 4, calibrate=SHORT)
    assert (receipt.calibration_tokens >= 300) == (head == Head.LM)
    assert (receipt.held_out is None) == (head != Head.LM)
    assert ("not calibrated" in capsys.readouterr().err) == (head != Head.LM)
    (tmp_path / "text.txt").write_text("Once upon a time. " * 100)
    with pytest.raises(LlamaError, match="tokenizer"):
        shrink(source, tmp_path / "r.bin", 4, calibrate=Calibrate(tmp_path / "text.txt"))


def test_a_head_of_labels_reads_a_file(stories: Path, tmp_path: Path) -> None:
    found = format.read(stories)
    shape = replace(found.config, head=Head.SEQUENCE, n_labels=3, tied=False)
    source = small_models.write_bin(
        tmp_path / "m.bin", shape, tokenizer=found.tokenizer, meta=found.meta
    )
    (tmp_path / "text.txt").write_text("Once upon a time. " * 100)
    calibrate = Calibrate(tmp_path / "text.txt", 256)
    receipt = shrink(source, tmp_path / "q.bin", 4, calibrate=calibrate)
    assert receipt.calibration == "text.txt" and receipt.calibration_tokens >= 200
    assert isinstance(receipt.held_out, Deviation)


def test_same_file_twice_and_for_any_threads(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin")
    found = set()
    for threads in (1, 2, 3, 3):
        shrink(source, tmp_path / "q.bin", 4, threads=threads, force=True, calibrate=SHORT)
        found.add((tmp_path / "q.bin").read_bytes())
    assert len(found) == 1


def test_a_real_model_is_nearer_its_source(stories: Path, data: Path, tmp_path: Path) -> None:
    """stories260K calibrated on what it writes itself, judged on stories and on other prose."""
    plain, ours = tmp_path / "plain.bin", tmp_path / "ours.bin"
    shrink(stories, plain, 4)
    receipt = shrink(stories, ours, 4, calibrate=Calibrate(tokens=4096))
    fresh = texts_of(stories, 6000)[-4:]
    prose = texts_of(stories, 1024, data / "text" / "war-and-peace.txt")
    for texts, gain in ((fresh, 0.8), (prose, 0.95)):
        before, after = (measure(stories, path, texts=texts) for path in (plain, ours))
        assert isinstance(before, Distance) and isinstance(after, Distance)
        assert after.mean_kl < gain * before.mean_kl
    assert isinstance(receipt.held_out, Distance)
    with Model(ours) as model, Model(stories) as source:
        assert read_receipt(model.meta["quantize.receipt"]) == receipt
        assert receipt.source_sha256 == source.fingerprint.hex()


def test_the_command(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin")
    done = command("--bits", 4, "--bin", source, "--calibration-tokens", 256)
    assert (done.returncode, done.stdout) == (0, "")
    assert "tokens of texts that the model wrote by itself" in done.stderr
    assert done.stderr.count("from the source: ") == 2
    with Model(tmp_path / "m-q4.bin") as model:
        receipt = read_receipt(model.meta["quantize.receipt"])
    assert receipt.command == f"quantize.py --bits 4 --bin {source} --calibration-tokens 256"
    done = command("--bits", 4, "--bin", source, "--calibrate", "none", "--force")
    assert done.returncode == 0 and "calibrated" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--bits=8", "--calibrate=self"), "for --bits 4"),
        (("--bits=4", "--calibrate=none", "--calibration-tokens=99"), "for --bits 4 with a text"),
        (("--bits=4", "--calibration-tokens=3"), "--calibration-tokens is 3"),
        (("--bits=4", "--calibrate=no.txt"), "no.txt: cannot read: No such file"),
        (("--bits=4", "--calibrate=/"), "/: cannot read: Is a directory"),
    ],
)
def test_bad_words(stories: Path, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = command("--bin", stories, "--out", tmp_path / "q.bin", *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert list(tmp_path.iterdir()) == []
